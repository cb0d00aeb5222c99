"""Training metrics of an epoch: sums on the device, which are read only when they are logged or saved."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of an epoch so far, over all processes. Loss and accuracy are measured before each update."""

    loss_sum: float
    correct: int
    """Number of correct predictions."""
    seen: int
    """Number of examples."""
    seconds: float
    """Time from the start of the epoch to the end of the last update. Evaluation and saving do not count."""
    compute_seconds: float
    """Time of all updates, each from the arrival of its batch on the device to its end."""
    first_nonfinite_step: int | None
    """First step of the run, counted from 0, whose loss was not finite."""

    @property
    def loss(self) -> float:
        """Return the mean training loss, including label smoothing, class weights and mixup."""
        return self.loss_sum / self.seen

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct predictions."""
        return self.correct / self.seen

    @property
    def rate(self) -> float:
        """Return examples per second, including data loading."""
        return self.seen / self.seconds

    @property
    def compute_rate(self) -> float:
        """Return examples per second without data loading, as the D2L recipe counts them."""
        return self.seen / self.compute_seconds


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Position of a run, and the metrics of its epoch so far."""

    epoch: int
    """Epoch in progress, counted from 1."""
    epoch_step: int
    """Updates completed in the epoch."""
    step: int
    """Updates completed in the run."""
    metrics: Metrics
    lr: dict[str, float]
    """Parameter group -> learning rate of the last update."""


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best epoch so far."""

    epoch: int
    step: int
    value: float
    """Metric that selects the best epoch; higher is better, so a log loss is negative."""
    loss: float

    @property
    def score(self) -> tuple[float, float]:
        """Return the key to compare epochs by: a higher metric, then a lower loss."""
        return self.value, -self.loss


@dataclass(frozen=True, kw_only=True)
class MetricState:
    """Metric sums of an unfinished epoch, for a checkpoint."""

    rows: tuple[tuple[float, int, int], ...]
    """Summed loss, number of correct predictions and number of examples of each process."""
    seconds: float
    compute_seconds: float


class Meter:
    """Accumulates the metrics of one epoch without waiting for the device. `compute` waits, and gathers all ranks."""

    def __init__(self, accelerator: Accelerator, earlier: MetricState | None = None) -> None:
        """Start an epoch, or resume one from saved sums."""
        self._accelerator, self._device = accelerator, accelerator.device
        rank, world_size = accelerator.process_index, accelerator.num_processes
        local = _local_sums(earlier, rank, world_size) if earlier else (0, 0, 0)
        self._sums = torch.tensor(local, dtype=torch.float64, device=self._device)  # loss, correct, seen
        self._nonfinite_step = torch.full((), torch.inf, dtype=torch.float64, device=self._device)
        self._gpu_times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._compute_seconds = earlier.compute_seconds if earlier else 0.0
        self._step_began: float | torch.cuda.Event = 0.0
        self._began = time.perf_counter() - (earlier.seconds if earlier else 0.0)

    def start_step(self) -> None:
        """Record that a batch is on the device and its update begins."""
        self._step_began = self._now()

    def end_step(self, step: int, seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        """Add the sums of this process for update `step` (from 0 over the run)."""
        self._sums[0] += loss_sum
        self._sums[1] += correct
        self._sums[2] += seen
        self._nonfinite_step = torch.where(
            torch.isfinite(loss_sum), self._nonfinite_step, self._nonfinite_step.clamp(max=step)
        )
        end = self._now()
        if isinstance(end, float) and isinstance(self._step_began, float):
            self._compute_seconds += end - self._step_began
        elif isinstance(end, torch.cuda.Event) and isinstance(self._step_began, torch.cuda.Event):
            self._gpu_times.append((self._step_began, end))

    def compute(self) -> Metrics:
        """Return the metrics of the epoch so far, the same on every rank. Every process must call it."""
        ranks = self._gather()
        return Metrics(
            loss_sum=sum(row[0] for row in ranks),
            correct=int(sum(row[1] for row in ranks)),
            seen=int(sum(row[2] for row in ranks)),
            seconds=time.perf_counter() - self._began,
            compute_seconds=self._compute_seconds,
            first_nonfinite_step=_first_nonfinite_step(ranks),
        )

    def state(self) -> tuple[MetricState, int | None]:
        """Return the sums of the epoch so far, and the first step whose loss was not finite.

        Every process must call it.
        """
        ranks = self._gather()
        rows = tuple((row[0], int(row[1]), int(row[2])) for row in ranks)
        seconds = time.perf_counter() - self._began
        state = MetricState(rows=rows, seconds=seconds, compute_seconds=self._compute_seconds)
        return state, _first_nonfinite_step(ranks)

    def _gather(self) -> list[list[float]]:
        """Return (loss, correct, seen, first non-finite step) of each rank; wait for the device."""
        local = torch.cat([self._sums, self._nonfinite_step.view(1)])
        ranks: list[list[float]] = self._accelerator.gather(local).view(-1, 4).tolist()
        if self._gpu_times:
            torch.cuda.synchronize(self._device)
            milliseconds = sum(start.elapsed_time(end) for start, end in self._gpu_times)
            self._compute_seconds += milliseconds / 1000
            self._gpu_times.clear()
        return ranks

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _first_nonfinite_step(ranks: list[list[float]]) -> int | None:
    first = min(row[3] for row in ranks)
    return None if first == torch.inf else int(first)


def _local_sums(earlier: MetricState, rank: int, world_size: int) -> tuple[float, float, float]:
    """Return the sums that `rank` resumes from: its own, or if the world size has changed, the total on rank 0."""
    if len(earlier.rows) == world_size:
        return earlier.rows[rank]
    if rank > 0:
        return 0, 0, 0
    loss, correct, seen = zip(*earlier.rows, strict=True)
    return sum(loss), sum(correct), sum(seen)

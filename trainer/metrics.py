"""Sums and clocks of an epoch, kept where the work is done and read only when they are shown."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """An epoch so far, over all processes. Losses and answers are of the forward passes before each update."""

    loss_sum: float
    correct: int
    seen: int
    """Examples."""
    seconds: float
    """From the start of the epoch to the end of the last update; evaluation and saving lie outside."""
    compute_seconds: float
    """Of these, from each batch's arrival on the device to the end of its update."""
    first_nonfinite_step: int | None
    """The first step of the run, counted from 0, whose loss was not finite."""

    @property
    def loss(self) -> float:
        """Return the mean loss: what was differentiated, smoothed, weighted and mixed as that was."""
        return self.loss_sum / self.seen

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return self.correct / self.seen

    @property
    def rate(self) -> float:
        """Return examples a second, end to end."""
        return self.seen / self.seconds

    @property
    def compute_rate(self) -> float:
        """Return examples a second of computing alone, as the note counts them."""
        return self.seen / self.compute_seconds


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The position of a run, and the metrics of its epoch so far."""

    epoch: int
    """The epoch in progress, counted from 1."""
    epoch_step: int
    """Updates completed in the epoch."""
    step: int
    """Updates completed in the run."""
    metrics: Metrics
    lr: dict[str, float]
    """Parameter group -> learning rate of the last update."""


@dataclass(frozen=True, kw_only=True)
class MetricState:
    """What an epoch has added up so far, as a checkpoint keeps it."""

    rows: tuple[tuple[float, int, int], ...]
    """Of each process: summed loss, right answers, examples seen."""
    seconds: float
    compute_seconds: float


class Meter:
    """Adds up one epoch without waiting for the device; `read` waits, and reduces over the ranks."""

    def __init__(self, accelerator: Accelerator, earlier: MetricState | None = None) -> None:
        """Begin with what the same epoch had added up before it was cut short."""
        self._accelerator = accelerator
        self._device = accelerator.device
        mine = _share(earlier, accelerator.process_index, accelerator.num_processes) if earlier else (0, 0, 0)
        self._sums = torch.tensor(mine, dtype=torch.float64, device=self._device)  # loss, correct, seen
        self._bad = torch.full((), torch.inf, dtype=torch.float64, device=self._device)
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._compute = earlier.compute_seconds if earlier else 0.0
        self._arrival: float | torch.cuda.Event = 0.0
        self._began = time.perf_counter() - (earlier.seconds if earlier else 0.0)

    def start_step(self) -> None:
        """Note that a batch is on its device and its update begins."""
        self._arrival = self._now()

    def end_step(self, step: int, seen: int, loss_sum: Tensor, correct: Tensor) -> None:
        """Note the end of update `step`, with this process's sums."""
        self._sums[0] += loss_sum
        self._sums[1] += correct
        self._sums[2] += seen
        self._bad = torch.where(torch.isfinite(loss_sum), self._bad, self._bad.clamp(max=step))
        end = self._now()
        if isinstance(end, float) and isinstance(self._arrival, float):
            self._compute += end - self._arrival
        elif isinstance(end, torch.cuda.Event) and isinstance(self._arrival, torch.cuda.Event):
            self._spans.append((self._arrival, end))

    def compute(self) -> Metrics:
        """Return the figures of the epoch so far; every rank must call it, and gets the same sums."""
        every = self._gathered()
        first_bad = min(row[3] for row in every)
        return Metrics(
            loss_sum=sum(row[0] for row in every),
            correct=int(sum(row[1] for row in every)),
            seen=int(sum(row[2] for row in every)),
            seconds=time.perf_counter() - self._began,
            compute_seconds=self._compute,
            first_nonfinite_step=None if first_bad == torch.inf else int(first_bad),
        )

    def state(self) -> tuple[MetricState, int | None]:
        """Return the epoch so far as a checkpoint keeps it, and the first step whose loss was not finite.

        Every rank must call it.
        """
        every = self._gathered()
        first_bad = min(row[3] for row in every)
        rows = tuple((row[0], int(row[1]), int(row[2])) for row in every)
        sums = MetricState(
            rows=rows, seconds=time.perf_counter() - self._began, compute_seconds=self._compute
        )
        return sums, None if first_bad == torch.inf else int(first_bad)

    def _gathered(self) -> list[list[float]]:
        """Return loss, correct, seen and first bad step of each rank; waits for the device."""
        mine = torch.cat([self._sums, self._bad.view(1)])
        every: list[list[float]] = self._accelerator.gather(mine).view(-1, 4).tolist()
        if self._spans:
            torch.cuda.synchronize(self._device)
            self._compute += sum(start.elapsed_time(end) for start, end in self._spans) / 1000  # given in ms
            self._spans.clear()
        return every

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _share(earlier: MetricState, rank: int, world_size: int) -> tuple[float, float, float]:
    """Return what `rank` begins with: its own sums, or the whole on rank 0 where the processes are others."""
    if len(earlier.rows) == world_size:
        return earlier.rows[rank]
    if rank > 0:
        return 0, 0, 0
    loss, correct, seen = zip(*earlier.rows, strict=True)
    return sum(loss), sum(correct), sum(seen)

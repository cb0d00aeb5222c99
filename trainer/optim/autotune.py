"""Choose precision and memory layout by measuring a few updates of the real model on real images.

Which is fastest depends on processor and model: bf16 takes 0.4 of the time of fp32 on a CPU with AVX-512 BF16, and more
than its time where it is emulated. A precision is taken only if rounding changes the gradient much less than another
batch of examples does.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from trainer.distributed.precision import Execution, Precision, set_float32_precision
from trainer.model.head import split_outputs
from trainer.optim.core_wait import MAX_FRACTION, CoreWait

MAX_LOSS_ERROR = 0.05
"""Largest accepted difference of the loss from that in fp32, as a fraction of it."""
MAX_GRADIENT_ERROR = 0.5
"""Largest accepted `Measurement.gradient_error`. Without pretrained weights, bf16 has 0.3 in resnet18."""
MIN_GAIN = 1.05
"""How much faster a precision must be than the more exact ones."""
_ROUNDS = 2  # of timed updates in each stage, if preparing the kernels is not timed; otherwise one
_MORE_ROUNDS = 3  # if other processes use the cores
_MAX_GAIN = 1.5  # a candidate that is slower by this factor is out of the race
_LOSS_SCALE = 1024.0  # keeps fp16's gradients from underflow


@dataclass(frozen=True)
class Measurement:
    """Speed of a candidate, and how far its result is from that in fp32."""

    execution: Execution
    images_per_sec: float
    """Forward and backward of one batch, on the slowest process."""
    loss_error: float
    """Difference of the loss from that in fp32, as a fraction of it."""
    gradient_error: float
    """Difference of the gradient from that in fp32, as a fraction of it or, if that is too much, of the difference
    between the gradients of two batches, where that is more. All in the Euclidean norm."""

    @property
    def is_accurate(self) -> bool:
        """Return whether the result is close enough to that in fp32."""
        return self.loss_error <= MAX_LOSS_ERROR and self.gradient_error <= MAX_GRADIENT_ERROR

    def __str__(self) -> str:
        error = "" if self.is_accurate else f" (not accurate: gradient error {self.gradient_error:.2g})"
        return f"{self.execution} {self.images_per_sec:.3g}{error}"


def autotune(
    model: nn.Module,
    batches: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    precisions: Sequence[Precision],
    layouts: Sequence[bool],
    max_across_ranks: Callable[[float], float] = lambda value: value,
) -> list[Measurement]:
    """Measure each precision in the first memory layout, and the fast ones in the others too.

    Args:
        model: on its device. Its layout, gradients and running statistics change: pass a model that is not used later.
        batches: two batches of different examples: the model's input, float [B, 3, H, W], and labels int64 [B].
        batch_size: number of images of a timed update; the first batch is repeated up to it.
        precisions: candidates, the most exact one first. The first one is the reference.
        layouts: candidates of channels_last.
        max_across_ranks: returns the maximum of a value over all processes. Every process must call this function.

    Returns:
        The measurements, the best one first.

    """
    probe = _Probe(model, batches, batch_size, max_across_ranks)
    measured = probe.measure([Execution(precision, layouts[0]) for precision in precisions])
    best = _best(measured)
    fast = [one.execution.precision for one in measured if one.images_per_sec * _MAX_GAIN >= best.images_per_sec]
    if others := [Execution(precision, layout) for layout in layouts[1:] for precision in fast]:
        rest = [one for one in measured if one is not best]
        measured = probe.measure([best.execution, *others])
        best = _best(measured)
        measured += rest
    slower = (one for one in measured if one is not best)
    return [best, *sorted(slower, key=lambda measurement: -measurement.images_per_sec)]


def _best(measured: Sequence[Measurement]) -> Measurement:
    best = measured[0]
    for other in measured[1:]:
        if other.is_accurate and other.images_per_sec >= MIN_GAIN * best.images_per_sec:
            best = other
    return best


class _Probe:
    """Forward and backward of a few batches, without an optimizer."""

    def __init__(
        self,
        model: nn.Module,
        batches: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        batch_size: int,
        max_across_ranks: Callable[[float], float],
    ) -> None:
        images, labels = batches[0]
        self._batches = batches
        self._model, self._max = model, max_across_ranks
        copies = -(-batch_size // len(labels))
        self._timed = images.repeat(copies, 1, 1, 1)[:batch_size], labels.repeat(copies)[:batch_size]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd | StochasticDepth):
                module.eval()  # their masks depend on the memory layout
        self._has_timed_size = len(self._timed[1]) == len(labels)
        self._reference: tuple[Execution, float, Tensor] | None = None
        self._batch_difference: float | None = None
        self._errors: dict[Execution, tuple[float, float]] = {}
        self._times: defaultdict[Execution, list[float]] = defaultdict(list)

    def measure(self, candidates: Sequence[Execution]) -> list[Measurement]:
        """Measure candidates in turns, so that other load on the machine slows all of them.

        If other processes use the cores, no candidate is dropped, and the fastest of more updates counts: a short
        disturbance may slow one candidate by several times.
        """
        wait = CoreWait()
        for candidate in candidates:
            if candidate not in self._errors:
                self._errors[candidate] = self._compare(candidate)
        for _ in range(1 if self._has_timed_size else _ROUNDS):
            # Those without a time come first: they tell which of the others are too slow to win.
            for candidate in sorted(candidates, key=lambda one: len(self._times[one])):
                fastest = min((min(self._times[one]) for one in candidates if self._times[one]), default=math.inf)
                times = self._times[candidate]
                if not times or min(times) < _MAX_GAIN * fastest:
                    times.append(self._max(self._time(candidate)))
        if self._max(wait.fraction()) > MAX_FRACTION:
            for candidate in list(candidates) * _MORE_ROUNDS:
                self._times[candidate].append(self._max(self._time(candidate)))
        size = len(self._timed[1])
        return [Measurement(one, size / min(self._times[one]), *self._errors[one]) for one in candidates]

    def _compare(self, execution: Execution) -> tuple[float, float]:
        """Return the errors of loss and gradient against the first candidate. Its kernels are prepared on the way."""
        loss, gradient, seconds = self._update(execution, self._batches[0])
        if self._has_timed_size:
            self._times[execution].append(self._max(seconds))
        else:
            self._time(execution)
        if self._reference is None:
            self._reference = execution, loss, gradient
        _, exact_loss, exact_gradient = self._reference
        difference, norm = float((gradient - exact_gradient).norm()), float(exact_gradient.norm())
        error = self._error(difference, norm)
        if error > MAX_GRADIENT_ERROR:  # on any process; most precisions do not need this second gradient
            error = self._error(difference, max(norm, self._difference_between_batches()))
        return self._error(abs(loss - exact_loss), max(abs(exact_loss), 1.0)), error

    def _difference_between_batches(self) -> float:
        """Return the difference between the gradients of the two batches, by the first candidate."""
        if self._batch_difference is None:
            assert self._reference is not None  # for mypy
            execution, _, gradient = self._reference
            _, other, _ = self._update(execution, self._batches[1])
            self._batch_difference = float((other - gradient).norm())
        return self._batch_difference

    def _time(self, execution: Execution) -> float:
        try:
            return self._update(execution, self._timed)[2]
        except torch.OutOfMemoryError:  # of a GPU; a precision that needs less memory may fit
            return math.inf

    def _error(self, difference: float, scale: float) -> float:
        error = difference / scale if scale else math.inf if difference else 0.0
        return self._max(error if math.isfinite(error) else math.inf)

    def _update(self, execution: Execution, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor, float]:
        """Return the loss, the gradient of all parameters [P], and the seconds that it took."""
        images, labels = batch
        device = images.device
        set_float32_precision(execution.precision, device)
        self._model.to(memory_format=execution.memory_format)
        images = images.contiguous(memory_format=execution.memory_format)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(execution.precision)
        scale = _LOSS_SCALE if execution.precision == "fp16" else 1.0
        torch.manual_seed(0)  # the same masks of dropout for every candidate
        _wait(device)
        began = time.perf_counter()
        with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
            logits, auxiliary = split_outputs(self._model(images))
        loss = cross_entropy(logits.float(), labels)
        total = loss + sum(weight * cross_entropy(other.float(), labels) for weight, other in auxiliary)
        gradients = torch.autograd.grad(total * scale, self._parameters, allow_unused=True)
        _wait(device)
        seconds = time.perf_counter() - began
        flat = [gradient.flatten().float() / scale for gradient in gradients if gradient is not None]
        return loss.item(), torch.cat(flat), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

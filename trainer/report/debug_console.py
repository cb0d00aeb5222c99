"""Console output of debug mode: tensors, layers, and the metrics of a few batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer.evaluate import Evaluations
from trainer.metrics import Progress


class ConsoleLogger:
    """Logger that prints the metrics of each batch."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Do nothing."""

    def log_step(self, progress: Progress) -> None:
        """Print the metrics of the epoch so far."""
        metrics = progress.metrics
        self._console.print(
            f"batch {progress.epoch_step}: loss so far {metrics.loss:.4f}, accuracy {metrics.accuracy:.3f}, "
            f"{1000 * metrics.compute_seconds:,.0f} ms computing of {1000 * metrics.seconds:,.0f} ms"
        )

    def draw_curves(self) -> None:
        """Do nothing."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations, evaluation_seconds: float) -> None:
        """Print the evaluations."""
        for split, evaluation in evaluations.items():
            correct = sum(evaluation.correct)
            self._console.print(f"evaluated {evaluation.seen} images of {split}: {correct} correct")


def describe_tensor(console: Console, name: str, tensor: Tensor) -> None:
    """Print the type, shape, device and range of a tensor."""
    values = tensor.detach().float()
    console.print(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}, "
        f"from {values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}"
    )


@contextmanager
def print_layers(model: nn.Module, console: Console, device: torch.device) -> Iterator[None]:
    """Print output shape and time of each child module, for the forward passes inside a `with` block."""
    start_times: dict[str, float] = {}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def enter(name: str) -> None:
        start_times[name] = clock()

    def leave(name: str, output: object) -> None:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        console.print(f"  {name:<16} {shape!s:<24} {1000 * (clock() - start_times[name]):8.1f} ms")

    handles = []
    for name, child in model.named_children():
        handles.append(child.register_forward_pre_hook(lambda _m, _i, name=name: enter(name)))
        handles.append(child.register_forward_hook(lambda _m, _i, output, name=name: leave(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

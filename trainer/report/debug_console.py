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
    """Prints what the loop reports."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Say nothing: the figures follow."""

    def log_step(self, progress: Progress) -> None:
        """Print the figures so far."""
        figures = progress.metrics
        self._console.print(
            f"batch {progress.epoch_step}: loss so far {figures.loss:.4f}, accuracy {figures.accuracy:.3f}, "
            f"{1000 * figures.compute_seconds:,.0f} ms computing of {1000 * figures.seconds:,.0f} ms"
        )

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Print the evaluations."""
        for part, found in evaluations.items():
            self._console.print(f"evaluated {found.seen} images of {part}: {sum(found.correct)} right")


def describe_tensor(console: Console, name: str, tensor: Tensor) -> None:
    """Print a tensor's type, shape, device and range."""
    shown = tensor.detach().float()
    console.print(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}, "
        f"from {shown.min():.3g} to {shown.max():.3g}, mean {shown.mean():.3g}"
    )


@contextmanager
def print_layers(model: nn.Module, console: Console, device: torch.device) -> Iterator[None]:
    """Print each direct child's output shape and time, for the forward passes within the block."""
    began: dict[str, float] = {}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def enter(name: str) -> None:
        began[name] = clock()

    def leave(name: str, output: object) -> None:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        console.print(f"  {name:<16} {shape!s:<24} {1000 * (clock() - began[name]):8.1f} ms")

    handles = []
    for name, child in model.named_children():
        handles.append(child.register_forward_pre_hook(lambda _m, _i, name=name: enter(name)))
        handles.append(child.register_forward_hook(lambda _m, _i, output, name=name: leave(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

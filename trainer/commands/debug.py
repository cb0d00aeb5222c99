"""`--debug`: one process, no workers, a handful of batches; each stage shown with its shapes and its time.

Nothing is written to the run folder. Batches are read in this very process, so that `breakpoint()` works
anywhere; with a terminal, an unexpected error opens the debugger where it happened.
"""

import itertools
import pdb
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer.config.build_data import (
    Evaluator,
    RunData,
    dataset_summary,
    make_batches,
    make_epoch_order,
    progress_hooks,
)
from trainer.config.build_model import make_l2_sp, make_model, make_optimizer
from trainer.config.build_training import make_schedule, make_train_state, make_train_step
from trainer.config.preflight import check_run_data
from trainer.config.resolve import ResolvedConfig
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import Batch
from trainer.data.prepare import prepare
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.evaluate import Evaluations
from trainer.loop import NullCheckpoints, fit
from trainer.metrics import Progress
from trainer.model.head import split_outputs
from trainer.optim.param_groups import set_lr
from trainer.optim.train_step import TrainStep
from trainer.state import TrainState

BATCHES = 3
EVALUATED = 32
OVERFIT_STEPS = 20
SHOWN_EVERY = 5


def debug(config: ResolvedConfig, ctx: DistributedContext, console: Console) -> None:
    """Run all steps of a run on a little of its data, and say whether the model can overfit one batch.

    Raises:
        UserError: an error that the run itself would end with.

    """
    try:
        with torch.autograd.set_detect_anomaly(True):
            _run_steps(replace(config, data=replace(config.data, num_workers=0)), ctx, console)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        traceback.print_exc()
        console.print("the debugger is open where this happened: p NAME shows a value, u goes up, q quits")
        pdb.post_mortem()
        raise


def _run_steps(config: ResolvedConfig, ctx: DistributedContext, console: Console) -> None:
    @contextmanager
    def timed(name: str) -> Iterator[None]:
        console.rule(name, align="left")
        began = time.perf_counter()
        yield
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        console.print(f"{name}: {1000 * (time.perf_counter() - began):,.1f} ms")

    with timed("data"):
        data = _load_data(config, ctx, console)
    with timed("model"):
        for line in _left_out(config):
            console.print(line)
        config = _without_options(config)
        built = make_model(config, data.index.classes, config.model.weights, on_progress=console.print)
        console.print("\n".join(built.summary))
        built.model.to(ctx.device)
        optimizer = make_optimizer(built, config, console)
        state, unfreezing = make_train_state(built, optimizer, config, ctx, console)
    train_step = make_train_step(config, data.examples_per_class, ctx, make_l2_sp(built, config))
    schedule = make_schedule(config, data)
    schedule = replace(schedule, batch_sizes=schedule.batch_sizes[:BATCHES], epochs=1, logs_per_epoch=BATCHES)
    batches = make_batches(config, data, ctx, epochs=1)
    with timed("first batch: read, decode, augment"):
        first = next(batches)
        _describe_tensor(console, "images", first.images)
        _describe_tensor(console, "labels", first.labels)
    with timed("normalize"):
        _describe_tensor(console, "input", train_step.normalize(first.images))
    with timed("forward, layer by layer"), _layers_printed(state.model, console, ctx.device), torch.no_grad():
        state.model.train()
        logits, _ = split_outputs(state.model(train_step.normalize(first.images)))
        _describe_tensor(console, "logits", logits)
    with timed(f"train on {len(schedule.batch_sizes)} batches, then evaluate, with anomaly detection on"):
        fit(
            state,
            batches.through(partial(itertools.chain, [first])),
            schedule,
            train_step,
            start_epoch=unfreezing.start_epoch,
            evaluate=Evaluator(data.index, config, ctx),
            checkpoints=NullCheckpoints(),
            logger=_ConsoleLogger(console),
        )
    with timed(f"overfit one batch, {OVERFIT_STEPS} updates at the peak learning rate"):
        losses: list[float] = []
        for loss in _overfit(unfreezing.model, state, train_step.plain(), first):
            losses.append(loss)
            if len(losses) % SHOWN_EVERY == 1:
                console.print(f"update {len(losses)}: loss {loss:.4f}")
        console.print(verdict(losses))


def _load_data(config: ResolvedConfig, ctx: DistributedContext, console: Console) -> RunData:
    """Return the data with a few images to evaluate.

    The few images that are used are read later. All are checked here, as the run does, only if some may be skipped.
    """
    check = config.data.on_unreadable == "skip"
    prepared = prepare(config.data, workers=ctx.cores, displays=progress_hooks(console), check=check)
    console.print(dataset_summary(prepared))
    data = RunData(prepared=prepared, order=make_epoch_order(config, prepared.index))
    check_run_data(config, data, ctx)
    return replace(data, prepared=replace(prepared, index=_few(prepared.index)))


def _left_out(config: ResolvedConfig) -> Iterator[str]:
    """Yield what the run does before it trains and debug mode does not."""
    if config.pretrain.root:
        yield f"pretraining ({config.pretrain.root}) is left out: random weights take the place of its own"
    if config.regularization.ema or config.transfer.l2_sp:
        yield "regularization.ema and transfer.l2_sp are left out"
    if isinstance(config.transfer.trainable, dict):
        yield "of the stages of transfer.trainable, the first one is run"
    if config.model.head_init == "linear-probe":
        yield "the linear probe is left out: a random output layer takes the place of its own"


def _without_options(config: ResolvedConfig) -> ResolvedConfig:
    return replace(
        config,
        regularization=replace(config.regularization, ema=None),
        transfer=replace(config.transfer, l2_sp=0.0),
    )


def _overfit(model: nn.Module, state: TrainState, train_step: TrainStep, batch: Batch) -> Iterator[float]:
    """Yield the mean cross-entropy of one batch before each of a few updates on it."""
    set_lr(state.optimizer, 1.0)
    size = len(batch.labels)
    for step in range(OVERFIT_STEPS):
        loss_sum, _ = train_step(model, state.optimizer, batch, step, size)
        yield loss_sum.item() / size


def verdict(losses: Sequence[float]) -> str:
    """Return whether the loss of one batch, seen again and again, goes down."""
    path = f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    if losses[-1] < 0.9 * losses[0]:
        return f"{path}: it goes down, the model can learn this batch by heart"
    return (
        f"{path}: it does NOT go down; look at optim.lr (too small, or so large that it diverges), the labels, "
        "and data.mean and data.std"
    )


class _ConsoleLogger:
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


def _few(index: DatasetIndex) -> DatasetIndex:
    """Return the index with a few images to evaluate, spread over the classes."""

    def spread(part: tuple[Example, ...]) -> tuple[Example, ...]:
        return part[:: max(1, len(part) // EVALUATED)][:EVALUATED]

    return replace(index, val=spread(index.val), test=spread(index.test))


def _describe_tensor(console: Console, name: str, tensor: Tensor) -> None:
    shown = tensor.detach().float()
    console.print(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}, "
        f"from {shown.min():.3g} to {shown.max():.3g}, mean {shown.mean():.3g}"
    )


@contextmanager
def _layers_printed(model: nn.Module, console: Console, device: torch.device) -> Iterator[None]:
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

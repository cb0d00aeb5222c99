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
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from trainer.config.builders import (
    Evaluator,
    batch_paths,
    dataset_summary,
    displays_on,
    make_criterion,
    make_epoch_order,
    make_loader,
    make_mixup,
    make_preprocessing,
    make_schedule,
    training_images,
)
from trainer.config.model_builder import make_model, make_param_groups
from trainer.config.preflight import require_val_split
from trainer.config.schema import Config
from trainer.data.augment import Normalize
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import Batch, DistributedBatchSampler
from trainer.data.prepare import prepare
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.loop import Evaluations, NullCheckpointManager, Progress, ResumePoint, fit, update
from trainer.model.head import split_outputs
from trainer.optim.param_groups import make_optimizer, set_lr
from trainer.report.block_table import block_table

BATCHES = 3
EVALUATED = 32
OVERFIT_STEPS = 20
SHOWN_EVERY = 5


def debug(config: Config, ctx: DistributedContext, console: Console) -> None:
    """Walk once through all stages of a run on a little of its data, and say whether one batch can be learnt.

    Raises:
        UserError: whatever of what is walked through would stop the run itself.

    """
    try:
        with torch.autograd.set_detect_anomaly(True):
            _walk(replace(config, data=replace(config.data, num_workers=0)), ctx, console)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        traceback.print_exc()
        console.print("the debugger is open where this happened: p NAME shows a value, u goes up, q leaves")
        pdb.post_mortem()
        raise


def _walk(config: Config, ctx: DistributedContext, console: Console) -> None:
    accelerator, device = ctx.accelerator, ctx.accelerator.device

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        console.rule(name, align="left")
        began = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        console.print(f"{name}: {1000 * (time.perf_counter() - began):,.1f} ms")

    with stage("data"):
        # The few images used are read below. Every one is checked, as the run does, only where some are to be skipped.
        check = config.data.on_unreadable == "skip"
        prepared = prepare(config.data, workers=ctx.cores, displays=displays_on(console), check=check)
        console.print(dataset_summary(prepared))
    require_val_split(config, prepared.index)
    index = _few(prepared.index)

    with stage("model"):
        for line in _left_out(config):
            console.print(line)
        created = make_model(config, index.classes, config.model.weights, on_progress=console.print)
        console.print("\n".join(created.summary))
        created.model.to(device)
        groups = make_param_groups(created, config)
        console.print(block_table(created, groups))
        optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
        model, optimizer = accelerator.prepare(created.model, optimizer)

    order = make_epoch_order(config, index)
    plan = make_schedule(config, order)
    plan = replace(plan, batch_sizes=plan.batch_sizes[:BATCHES], epochs=1, logs_per_epoch=BATCHES)
    preprocessing = make_preprocessing(config.data)
    normalize = Normalize(preprocessing, device)
    images = training_images(index, preprocessing, config, ctx)
    shares = iter(make_loader(images, DistributedBatchSampler(order, epochs=1), config, ctx))

    with stage("first batch: read, decode, augment"):
        first = next(shares)
        _describe_tensor(console, "images", first.images)
        _describe_tensor(console, "labels", first.labels)
    with stage("normalise"):
        _describe_tensor(console, "input", normalize(first.images))
    with stage("forward, layer by layer"), _narrated(accelerator.unwrap_model(model), console, device):
        with torch.no_grad():
            model.train()
            logits, _ = split_outputs(model(normalize(first.images)))
        _describe_tensor(console, "logits", logits)

    with stage(f"train on {len(plan.batch_sizes)} batches, then evaluate, with anomaly detection on"):
        fit(
            model,
            optimizer,
            itertools.chain([first], shares),
            plan,
            ResumePoint(),
            accelerator=accelerator,
            normalize=normalize,
            evaluate=Evaluator(index, preprocessing, config, ctx),
            keeper=NullCheckpointManager(),
            listener=_Narrator(console),
            batch_paths=partial(batch_paths, images, order),
            criterion=make_criterion(config, index, device),
            mixup=make_mixup(config, ctx),
        )

    with stage(f"overfit one batch, {OVERFIT_STEPS} updates at the peak learning rate"):
        losses: list[float] = []
        for loss in _overfit(
            model, optimizer, first, config=config, normalize=normalize, accelerator=accelerator
        ):
            losses.append(loss)
            if len(losses) % SHOWN_EVERY == 1:
                console.print(f"update {len(losses)}: loss {loss:.4f}")
        console.print(verdict(losses))


def _left_out(config: Config) -> Iterator[str]:
    """Yield what the run does before it trains and this walk does not."""
    if config.pretrain.root:
        yield f"the source stage ({config.pretrain.root}) is left out: random weights stand for its own"
    if config.regularization.ema or config.transfer.l2_sp:
        yield "regularization.ema and transfer.l2_sp are left out"
    if isinstance(config.transfer.trainable, dict):
        yield "of the stages of transfer.trainable, the first is walked"
    if config.model.head_init == "linear-probe":
        yield "the linear probe is left out: a drawn output layer stands for its own"


def _overfit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    config: Config,
    normalize: Normalize,
    accelerator: Accelerator,
) -> Iterator[float]:
    """Yield the mean loss of one batch (plain cross-entropy, unmixed) before each of a few updates on it."""
    set_lr(optimizer, 1.0)
    size = len(batch.labels)
    scale = 1 / size if config.optim.loss_reduction == "mean" else 1.0
    for _ in range(OVERFIT_STEPS):
        loss_sum, _ = update(
            model,
            optimizer,
            batch,
            scale,
            accelerator=accelerator,
            normalize=normalize,
            parts=config.train.grad_accum_steps,
            max_grad_norm=config.optim.max_grad_norm,
        )
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


class _Narrator:
    """Prints what the loop tells."""

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
def _narrated(model: nn.Module, console: Console, device: torch.device) -> Iterator[None]:
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

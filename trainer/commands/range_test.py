"""Learning-rate range test (Smith 2017): raise the learning rate at each update until the loss diverges."""

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console

from trainer.commands.lr_range import Suggestion, has_diverged, suggest
from trainer.config.build_data import load_run_data
from trainer.config.build_loaders import make_batches, make_eval_loader
from trainer.config.build_micro_batch import with_largest_micro_batch
from trainer.config.build_model import (
    apply_last_stage,
    fit_linear_probe,
    make_l2_sp,
    make_model,
    make_optimizer,
    make_param_groups,
)
from trainer.config.build_training import make_train_step
from trainer.config.execution import Workload, choose_execution
from trainer.config.preflight import check_run_data
from trainer.config.resolve import ResolvedConfig
from trainer.distributed.context import DistributedContext
from trainer.distributed.precision import Precision
from trainer.distributed.signals import Stopped, StopSignals
from trainer.optim.param_groups import set_lr
from trainer.report.block_table import block_table
from trainer.report.lr_range import lr_range_progress


@dataclass(frozen=True)
class RangeTest:
    """Result of a learning-rate range test."""

    rates: tuple[float, ...]
    """Learning rate of each update, as optim.lr; the rates of all parameter groups are scaled by the same factor."""
    losses: tuple[float, ...]
    """Mean loss of each global batch before its update; all values are finite."""
    diverged: bool
    """Whether the loss diverged before the last rate."""
    suggestion: Suggestion
    precision: Precision
    """Precision that the updates were computed in."""


def run_range_test(
    config: ResolvedConfig, ctx: DistributedContext, console: Console, signals: StopSignals, rates: Sequence[float]
) -> RangeTest:
    """Make one update at each learning rate until the loss diverges. Every process must call it.

    Args:
        config: config of the run; the test starts from its weights.
        ctx: the processes.
        console: prints on rank 0 only.
        signals: requests to stop.
        rates: rising learning rates, as optim.lr.

    Raises:
        UserError: something that the user can fix.
        Stopped: the test was asked to stop.

    """
    data = load_run_data(config, ctx, console)
    check_run_data(config, data, ctx)
    weights, examples, classes = config.model.weights, data.index.train, data.index.classes
    workload = Workload(config=config, examples=examples, classes=classes, weights=weights)
    config, ctx = choose_execution(workload, ctx, console)
    built = ctx.main_process_first(
        lambda: make_model(config, classes, weights, world_size=ctx.world_size, on_progress=console.print), local=True
    )
    console.print("\n".join(built.summary))
    built.model.to(ctx.device)
    l2_sp = make_l2_sp(built, config)
    if config.model.head_init == "linear-probe":
        loader = make_eval_loader(data.index.train, config, ctx, data.images)
        labels = [label for _, label in data.index.train]
        fit_linear_probe(built, loader, labels, config, ctx, console, groups=data.train_groups, watchdog=nullcontext)
    if len(built.unfreeze_stages) > 1:
        console.print("transfer.trainable has stages: the test uses the last one, in which the most parameters train")
        apply_last_stage(built, config)
    groups = make_param_groups(built, config)
    console.print(block_table(built, groups))
    model, optimizer = ctx.prepare(built.model, make_optimizer(groups, config))
    train_step = make_train_step(config, data.examples_per_class, ctx, l2_sp)
    train_step = with_largest_micro_batch(train_step, ctx.unwrap(model), optimizer, config, console)
    sizes = data.order.batch_sizes
    epochs = -(-len(rates) // len(sizes))
    batches = make_batches(config, data.index, data.order, ctx, epochs=epochs, images=data.images)
    losses: list[float] = []
    diverged = False
    model.train()
    with signals.deferred(), lr_range_progress(console, len(rates)) as show:
        for step, (rate, batch) in enumerate(zip(rates, batches, strict=False)):
            (received,) = ctx.all_reduce_max([signals.received or 0])
            if received:
                raise Stopped(signal.Signals(received).name)
            set_lr(optimizer, rate / config.optim.lr)
            size = sizes[step % len(sizes)]
            loss_sum, _ = train_step(model, optimizer, batch, step, size)
            # Summed in the same order on all ranks, so that they get the same loss and stop together.
            losses.append(float(ctx.accelerator.gather(loss_sum.view(1)).sum()) / size)
            show(rate, losses[-1])
            if has_diverged(losses):
                diverged = True
                break
    finite = losses[:-1] if diverged else losses
    used = tuple(rates[: len(finite)])
    return RangeTest(used, tuple(finite), diverged, suggest(used, finite), ctx.precision)

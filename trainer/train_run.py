"""One model trained on one data set: data, model, optimizer, loop and what is left, put together."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.resume import (
    describe_resume,
    is_finished,
    load_latest_checkpoint,
    restore_checkpoint,
    run_identity,
    run_metadata,
)
from trainer.checkpoint.store import CheckpointId, LoadedCheckpoint
from trainer.config.builders import (
    Evaluator,
    batch_paths,
    dataset_summary,
    load_dataset,
    make_batches,
    make_criterion,
    make_epoch_order,
    make_mixup,
    make_preprocessing,
    make_retention_policy,
    make_schedule,
    training_images,
)
from trainer.config.model_builder import fit_linear_probe, make_l2_sp, make_model, make_param_groups
from trainer.config.preflight import require_sync_batch_norm, require_val_split
from trainer.config.schema import Config
from trainer.data.augment import Normalize
from trainer.data.loader import EpochOrder
from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import StopSignals
from trainer.distributed.watchdog import Heartbeat, Watchdog
from trainer.errors import UserError
from trainer.loop import Evaluations, ResumePoint, fit
from trainer.model.file import ModelMetadata
from trainer.optim.ema import ModelEma
from trainer.optim.param_groups import make_optimizer
from trainer.report.block_table import block_table
from trainer.report.console import Display
from trainer.report.logger import NullLogger, RunLogger
from trainer.report.metrics import Row, epoch_rows, parse_rows, restore_metrics
from trainer.report.summary import best_row
from trainer.run.folder import METRICS, MODEL
from trainer.run.lock import RunLock
from trainer.run.versions import own_version
from trainer.transfer import wise_ft
from trainer.transfer.gradual_unfreezing import GradualUnfreezing


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    folder: Path
    rows: tuple[Row, ...]
    """Its epochs."""
    examples: tuple[int, int]
    """How many there are to train on, and to report on."""
    selection: str | None
    """The part that the best epoch was selected on, where it is not the one reported."""
    seconds: float
    """Of this start, from the data to the last save."""
    alpha: float = 1.0
    """How far from the start to the best epoch the model file's weights are: less than 1 where WiSE-FT has won."""

    @property
    def model_file(self) -> Path:
        """Return the best epoch's weights."""
        return self.folder / MODEL


def train_run(  # noqa: PLR0915 (that it reads from top to bottom is worth its length)
    config: Config,
    ctx: DistributedContext,
    console: Console,
    *,
    weights: str | None,
    attempt: RunLock | None,
    signals: StopSignals,
) -> TrainResult:
    """Train, evaluate and save; or go on with, or just report, what the run folder holds.

    The state is initialised in this order, in every run:
     1. the list of examples, each checked, and their order;
     2. the newest checkpoint of an earlier start, if there is one: rank 0 chooses it;
     3. the model with fresh weights from `run.seed`; its head found and replaced; source weights copied in;
     4. device, the output layer of a linear probe, parameter groups and the optimizer over them;
     5. precision and process group (accelerate);
     6. model, optimizer and loss scaling from the checkpoint;
     7. loaders that begin at its position.

    Args:
        config: the whole of it, resolved.
        machine: what it runs on.
        console: rank 0's speaks.
        weights: where the model's start comes from; None: from scratch.
        attempt: rank 0's right to write; None on the other ranks.
        signals: what asks the run to stop.

    Raises:
        UserError: whatever the user can mend.
        Stopped: the run was asked to stop, and its state is saved.

    """
    began = time.monotonic()
    accelerator, folder = ctx.accelerator, Path(config.run.dir)

    # 1.
    prepared = load_dataset(config.data, ctx, console)
    index = prepared.index
    console.print(dataset_summary(prepared))
    order = make_epoch_order(config, index)
    require_sync_batch_norm(config, order, ctx)
    require_val_split(config, index)
    plan = make_schedule(config, order)
    context.check_equal_across_ranks(accelerator, prepared.fingerprint, "the images")

    # 2.
    subject = run_identity(config, prepared)
    stand = partial(
        load_latest_checkpoint,
        config,
        prepared,
        subject,
        order,
        log=console.print,
        writes=ctx.is_main_process,
    )
    found = ctx.broadcast(context.main_process_first(accelerator, stand))
    state = found.state if found else None
    outcome = partial(
        TrainResult, folder=folder, selection=index.val_split, examples=(len(index.train), len(index.test))
    )
    preprocessing = make_preprocessing(config.data)
    number = ctx.broadcast(attempt.record.attempt if attempt else 0)
    watch = partial(_watch, config, ctx, attempt, number)
    line = wise_ft.WiseFT(
        folder=folder,
        split=index.val_split if config.transfer.wise_ft else None,
        ctx=ctx,
        attempt=attempt,
        signals=signals,
        watch=watch,
        log=console.print,
    )
    finished = found is not None and is_finished(found, config, index.val_split)
    if found and finished:
        rows = context.main_process_first(accelerator, lambda: _finished(found, config, attempt, console))
        alpha = line.select_alpha(
            lambda: wise_ft.load_for_eval(folder, ctx, channels_last=config.train.channels_last),
            Evaluator(index, preprocessing, config, ctx),
            step=found.state.step,
        )
        return outcome(rows=rows, alpha=alpha, seconds=time.monotonic() - began)

    # 3.
    created = context.main_process_first(
        accelerator,
        lambda: make_model(
            config, index.classes, weights, world_size=ctx.world_size, on_progress=console.print
        ),
        local=True,
    )
    console.print("\n".join(created.summary))

    # 4. On the device already: the optimizer's kernels are chosen by where its parameters lie.
    created.model.to(accelerator.device)
    l2_sp = make_l2_sp(created, config)  # towards what the source gave, not what a checkpoint puts back
    head_seconds = 0.0
    if found is None and config.model.head_init == "linear-probe":
        head_seconds = fit_linear_probe(
            created, index, preprocessing, config, ctx, watch=watch, log=console.print
        )
    groups = make_param_groups(created, config)
    console.print(block_table(created, groups))
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)

    # 5.
    _forget_earlier_stage(accelerator)
    unfreezing = GradualUnfreezing(
        accelerator,
        created.model,
        optimizer,
        stages=created.unfreeze_stages,
        policy=config.transfer.batch_norm,
        log=console.print,
    )
    bare, optimizer = unfreezing.bare, unfreezing.optimizer
    ema = ModelEma(bare, config.regularization.ema) if config.regularization.ema else None

    # 6.
    start = _put_back(found, unfreezing, ema, config=config, order=order, ctx=ctx, console=console)

    description = ModelMetadata(
        version=own_version(),
        architecture=config.model.name,
        classes=index.classes,
        preprocessing=preprocessing,
        source=created.source,
        metrics={},
    )
    line.save_initial_weights(bare, description, goes_on=state is not None)

    # 7.
    images = training_images(index, preprocessing, config, ctx)
    batches = make_batches(images, order, start, plan, config=config, ctx=ctx, attempt=number)
    evaluator = Evaluator(index, preprocessing, config, ctx)

    display = Display(
        console,
        epochs=config.train.epochs,
        steps_per_epoch=order.steps_per_epoch,
        done_steps=start.step,
    )
    report = _report(
        display, ctx, attempt, folder=folder, title=f"{config.model.name}, {created.source}", found=found
    )
    keeper = CheckpointManager(
        ctx=ctx,
        signals=signals,
        attempt=attempt,
        folder=folder,
        model=bare,
        optimizer=optimizer,
        scaler=accelerator.scaler,
        order=order,
        epochs=config.train.epochs,
        policy=make_retention_policy(config, order),
        run_metadata=run_metadata(config, order, ctx),
        lr_multiplier=plan.lr_multiplier,
        identity=subject,
        description=description,
        selection=index.val_split,
        logger=report,
        best=state.best if state else None,
        last=CheckpointId(state.step, state.epoch) if state else None,
        ema=ema,
        patience=config.regularization.early_stopping,
    )
    keeper.repair_best_model(console.print)
    if found is None and config.model.head_init in ("source-labels", "linear-probe"):
        with watch(Heartbeat()) as heartbeat:
            report.log_start(_before_training(evaluator, bare, heartbeat), head_seconds)
    try:
        with signals.deferred(), display.shown(), watch(keeper.heartbeat), keeper:
            fit(
                unfreezing.model,
                optimizer,
                batches,
                plan,
                start,
                accelerator=accelerator,
                normalize=Normalize(preprocessing, accelerator.device),
                evaluate=evaluator,
                keeper=keeper,
                listener=report,
                batch_paths=partial(batch_paths, images, order),
                begin_epoch=unfreezing.start_epoch,
                criterion=make_criterion(config, index, accelerator.device),
                mixup=make_mixup(config, ctx),
                ema=ema,
                l2_sp=l2_sp,
            )
    finally:
        report.draw()
        report.close()
    if report.failure is not None:  # the last curves alone: what came before them was raised
        console.print(str(report.failure))
    rows = tuple(epoch_rows(report.rows))
    if keeper.stopped_early:
        console.print(_ended_early(rows, config))
    alpha = line.select_alpha(lambda: bare, evaluator, step=keeper.heartbeat.step)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return outcome(rows=rows, alpha=alpha, seconds=time.monotonic() - began)


def _put_back(
    found: LoadedCheckpoint | None,
    unfreezing: GradualUnfreezing,
    ema: ModelEma | None,
    *,
    config: Config,
    order: EpochOrder,
    ctx: DistributedContext,
    console: Console,
) -> ResumePoint:
    """Put everything back to where the checkpoint stands, if there is one, and return where that is."""
    if found is None:
        return ResumePoint()
    state, accelerator = found.state, ctx.accelerator
    # Moments there are of what has trained so far, statistics of what was not frozen then.
    unfreezing.restore_stage(max(0, state.step - 1) // order.steps_per_epoch)
    context.raise_on_all_ranks(
        accelerator,
        restore_checkpoint(
            found, unfreezing.bare, unfreezing.optimizer, accelerator.scaler, ctx=ctx, ema=ema
        ),
    )
    console.print("\n".join(describe_resume(state, config, order, ctx)))
    return ResumePoint(epoch=state.epoch, step=state.step, sums=state.sums)


def _report(
    display: Display,
    ctx: DistributedContext,
    attempt: RunLock | None,
    *,
    folder: Path,
    title: str,
    found: LoadedCheckpoint | None,
) -> RunLogger | NullLogger:
    """Return what rank 0 tells of the run, what was told of it before included; the others tell nothing."""
    device = ctx.accelerator.device
    return context.main_process_first(
        ctx.accelerator,
        lambda: (
            RunLogger(
                display,
                folder=folder,
                title=title,
                device=device,
                text=found.metrics if found else "",
                check=attempt.check,
            )
            if attempt is not None
            else NullLogger()
        ),
    )


def _before_training(evaluator: Evaluator, model: nn.Module, heartbeat: Heartbeat) -> Evaluations:
    """Return what the model is worth before the first step.

    A signal ends the run here: nothing is lost that would not be made again.

    Raises:
        UserError: its output is not finite.

    """

    def passed() -> bool:
        heartbeat.tick(0)
        return False

    found = evaluator(model, passed)
    if not all(math.isfinite(part.loss_sum) for part in found.values()):
        raise UserError(
            "the loss of the model before the first step is not finite: see model.weights, data.mean and data.std, "
            "or try train.precision fp32"
        )
    return found


def _watch(
    config: Config, ctx: DistributedContext, attempt: RunLock | None, number: int, heartbeat: Heartbeat
) -> Watchdog:
    """Return the watch over this process, in the attempt of that number; raises a UserError on all if one has none."""
    return context.main_process_first(
        ctx.accelerator,
        lambda: Watchdog(
            config.run.hang_timeout,
            heartbeat,
            folder=Path(config.run.dir),
            attempt=number,
            rank=ctx.rank,
            world_size=ctx.world_size,
            lock=attempt,
        ),
    )


def _finished(
    found: LoadedCheckpoint, config: Config, attempt: RunLock | None, console: Console
) -> tuple[Row, ...]:
    """Say that the run has come to its last epoch already, and return its epochs, which metrics.jsonl then holds."""
    state = found.state
    rows = tuple(epoch_rows(parse_rows(found.metrics, str(found.path))))
    if state.epoch < config.train.epochs:
        console.print(f"finished already: {_ended_early(rows, config)}")
    else:
        console.print(
            f"finished already, after epoch {state.epoch}: nothing to train. A larger train.epochs goes on from here; "
            "--run.resume never starts anew"
        )
    if attempt is not None:
        attempt.update(step=state.step, steps=state.step, epoch=state.epoch, epochs=state.epoch)
        restore_metrics(Path(config.run.dir) / METRICS, found.metrics)
    return rows


def _ended_early(rows: Sequence[Row], config: Config) -> str:
    """Return why training has ended before its last epoch."""
    if not rows:  # not rank 0, which speaks
        return ""
    return (
        f"stopped early, after epoch {rows[-1]['epoch']} of {config.train.epochs}: none of the last "
        f"{config.regularization.early_stopping} was better on val than epoch {best_row(rows, 'val')['epoch']}. "
        "A larger regularization.early_stopping goes on from here"
    )


def _forget_earlier_stage(accelerator: Accelerator) -> None:
    """Drop what an earlier stage of this process (the source model's) has left behind."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)

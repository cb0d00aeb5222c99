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

from trainer import runtime, wise
from trainer.assemble import (
    Evaluator,
    describe,
    load_examples,
    make_batches,
    make_mixing,
    make_objective,
    make_order,
    make_plan,
    make_policy,
    paths_of,
    preprocessing_of,
    training_images,
)
from trainer.attempts import Attempt
from trainer.checkpoint.store import Found, Place
from trainer.config import Config
from trainer.data.augment import Normalise
from trainer.data.loader import Order
from trainer.ema import Shadow
from trainer.errors import UserError
from trainer.hang import Beats, HangWatch
from trainer.keeper import Keeper
from trainer.loop import Evaluations, Start, fit
from trainer.model_file import Description
from trainer.optim import make_optimizer
from trainer.preflight import require_selection, require_synchronisable
from trainer.report.blocks import block_table
from trainer.report.console import ProgressBar
from trainer.report.metrics import Row, epoch_rows, parse_rows, restore_metrics
from trainer.report.run_report import RunReport, Silent
from trainer.report.summary import best_row
from trainer.resume import facts_of, find, going_on, is_finished, put_back, subject_of
from trainer.run_folder import METRICS, MODEL
from trainer.runtime import Runtime
from trainer.signals import StopSignals
from trainer.staging import Staged
from trainer.target import make_groups, make_model, make_pull, probe_head
from trainer.versions import own_version


@dataclass(frozen=True, kw_only=True)
class Outcome:
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


def finetune(  # noqa: PLR0915 (that it reads from top to bottom is worth its length)
    config: Config,
    machine: Runtime,
    console: Console,
    *,
    weights: str | None,
    attempt: Attempt | None,
    signals: StopSignals,
) -> Outcome:
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
    accelerator, folder = machine.accelerator, Path(config.run.dir)

    # 1.
    prepared = load_examples(config.data, machine, console)
    index = prepared.index
    console.print(describe(prepared))
    order = make_order(config, index)
    require_synchronisable(config, order, machine)
    require_selection(config, index)
    plan = make_plan(config, order)
    runtime.require_equal(accelerator, prepared.fingerprint, "the images")

    # 2.
    subject = subject_of(config, prepared)
    stand = partial(find, config, prepared, subject, order, say=console.print, writes=machine.is_main)
    found = machine.from_main(runtime.in_turn(accelerator, stand))
    state = found.state if found else None
    outcome = partial(
        Outcome, folder=folder, selection=index.selection, examples=(len(index.train), len(index.test))
    )
    preprocessing = preprocessing_of(config.data)
    number = machine.from_main(attempt.record.attempt if attempt else 0)
    watch = partial(_watch, config, machine, attempt, number)
    line = wise.Search(
        folder=folder,
        part=index.selection if config.transfer.wise_ft else None,
        machine=machine,
        attempt=attempt,
        signals=signals,
        watch=watch,
        say=console.print,
    )
    finished = found is not None and is_finished(found, config, index.selection)
    if found and finished:
        rows = runtime.in_turn(accelerator, lambda: _finished(found, config, attempt, console))
        alpha = line.settle(
            lambda: wise.alone(folder, machine, channels_last=config.train.channels_last),
            Evaluator(index, preprocessing, config, machine),
            step=found.state.step,
        )
        return outcome(rows=rows, alpha=alpha, seconds=time.monotonic() - began)

    # 3.
    created = runtime.in_turn(
        accelerator,
        lambda: make_model(config, index.classes, weights, world=machine.world, on_progress=console.print),
        local=True,
    )
    console.print("\n".join(created.lines))

    # 4. On the device already: the optimizer's kernels are chosen by where its parameters lie.
    created.model.to(accelerator.device)
    pull = make_pull(created, config)  # towards what the source gave, not what a checkpoint puts back
    head_seconds = 0.0
    if found is None and config.model.head_init == "linear-probe":
        head_seconds = probe_head(
            created, index, preprocessing, config, machine, watch=watch, say=console.print
        )
    groups = make_groups(created, config)
    console.print(block_table(created, groups))
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)

    # 5.
    _forget_earlier_stage(accelerator)
    staged = Staged(
        accelerator,
        created.model,
        optimizer,
        stages=created.stages,
        policy=config.transfer.batch_norm,
        say=console.print,
    )
    bare, optimizer = staged.bare, staged.optimizer
    shadow = Shadow(bare, config.regularise.ema) if config.regularise.ema else None

    # 6.
    start = _put_back(found, staged, shadow, config=config, order=order, machine=machine, console=console)

    description = Description(
        version=own_version(),
        architecture=config.model.name,
        classes=index.classes,
        preprocessing=preprocessing,
        source=created.source,
        metrics={},
    )
    line.begin(bare, description, goes_on=state is not None)

    # 7.
    images = training_images(index, preprocessing, config, machine)
    batches = make_batches(images, order, start, plan, config=config, machine=machine, attempt=number)
    evaluator = Evaluator(index, preprocessing, config, machine)

    progress_bar = ProgressBar(
        console,
        epochs=config.train.epochs,
        steps_per_epoch=order.steps_per_epoch,
        done_steps=start.step,
    )
    report = _report(
        progress_bar,
        machine,
        attempt,
        folder=folder,
        title=f"{config.model.name}, {created.source}",
        found=found,
    )
    keeper = Keeper(
        machine=machine,
        signals=signals,
        attempt=attempt,
        folder=folder,
        model=bare,
        optimizer=optimizer,
        scaler=accelerator.scaler,
        order=order,
        epochs=config.train.epochs,
        policy=make_policy(config, order),
        facts=facts_of(config, order, machine),
        lr_factor=plan.lr_factor,
        subject=subject,
        description=description,
        selection=index.selection,
        report=report,
        best=state.best if state else None,
        last=Place(state.step, state.epoch) if state else None,
        shadow=shadow,
        patience=config.regularise.early_stopping,
    )
    keeper.mend_model(console.print)
    if found is None and config.model.head_init in ("source-labels", "linear-probe"):
        with watch(Beats()) as beats:
            report.start(_before_training(evaluator, bare, beats), head_seconds)
    try:
        with signals.as_flags(), progress_bar.show(), watch(keeper.beats), keeper:
            fit(
                staged.model,
                optimizer,
                batches,
                plan,
                start,
                accelerator=accelerator,
                normalise=Normalise(preprocessing, accelerator.device),
                evaluate=evaluator,
                keeper=keeper,
                listener=report,
                paths_of=partial(paths_of, images, order),
                begin_epoch=staged.begin,
                objective=make_objective(config, index, accelerator.device),
                mixing=make_mixing(config, machine),
                shadow=shadow,
                pull=pull,
            )
    finally:
        report.draw()
        report.close()
    if report.failure is not None:  # the last curves alone: what came before them was raised
        console.print(str(report.failure))
    rows = tuple(epoch_rows(report.rows))
    if keeper.over:
        console.print(_ended_early(rows, config))
    alpha = line.settle(lambda: bare, evaluator, step=keeper.beats.step)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return outcome(rows=rows, alpha=alpha, seconds=time.monotonic() - began)


def _put_back(
    found: Found | None,
    staged: Staged,
    shadow: Shadow | None,
    *,
    config: Config,
    order: Order,
    machine: Runtime,
    console: Console,
) -> Start:
    """Put everything back to where the checkpoint stands, if there is one, and return where that is."""
    if found is None:
        return Start()
    state, accelerator = found.state, machine.accelerator
    # Moments there are of what has trained so far, statistics of what was not frozen then.
    staged.stand(max(0, state.step - 1) // order.steps_per_epoch)
    runtime.raise_together(
        accelerator,
        put_back(found, staged.bare, staged.optimizer, accelerator.scaler, machine=machine, shadow=shadow),
    )
    console.print("\n".join(going_on(state, config, order, machine)))
    return Start(epoch=state.epoch, step=state.step, sums=state.sums)


def _report(
    progress_bar: ProgressBar,
    machine: Runtime,
    attempt: Attempt | None,
    *,
    folder: Path,
    title: str,
    found: Found | None,
) -> RunReport | Silent:
    """Return what rank 0 tells of the run, what was told of it before included; the others tell nothing."""
    device = machine.accelerator.device
    return runtime.in_turn(
        machine.accelerator,
        lambda: (
            RunReport(
                progress_bar,
                folder=folder,
                title=title,
                device=device,
                text=found.metrics if found else "",
                check=attempt.check,
            )
            if attempt is not None
            else Silent()
        ),
    )


def _before_training(evaluator: Evaluator, model: nn.Module, beats: Beats) -> Evaluations:
    """Return what the model is worth before the first step.

    A signal ends the run here: nothing is lost that would not be made again.

    Raises:
        UserError: its output is not finite.

    """

    def passed() -> bool:
        beats.beat(0)
        return False

    found = evaluator(model, passed)
    if not all(math.isfinite(part.loss_sum) for part in found.values()):
        raise UserError(
            "the loss of the model before the first step is not finite: see model.weights, data.mean and data.std, "
            "or try train.precision fp32"
        )
    return found


def _watch(config: Config, machine: Runtime, attempt: Attempt | None, number: int, beats: Beats) -> HangWatch:
    """Return the watch over this process, in the attempt of that number; raises a UserError on all if one has none."""
    return runtime.in_turn(
        machine.accelerator,
        lambda: HangWatch(
            config.run.hang_timeout,
            beats,
            folder=Path(config.run.dir),
            number=number,
            rank=machine.rank,
            world=machine.world,
            attempt=attempt,
        ),
    )


def _finished(found: Found, config: Config, attempt: Attempt | None, console: Console) -> tuple[Row, ...]:
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
        f"{config.regularise.early_stopping} was better on val than epoch {best_row(rows, 'val')['epoch']}. A larger "
        "regularise.early_stopping goes on from here"
    )


def _forget_earlier_stage(accelerator: Accelerator) -> None:
    """Drop what an earlier stage of this process (the source model's) has left behind."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)

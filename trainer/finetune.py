"""One model trained on one data set: data, model, optimizer, loop and what is left, put together."""

import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from torch import nn

from trainer import runtime
from trainer.assemble import (
    Evaluator,
    describe,
    load_examples,
    loader_of,
    make_groups,
    make_model,
    make_plan,
    paths_of,
    preprocessing_of,
    training_images,
)
from trainer.checkpoint import Counters, load_state, save_state
from trainer.config import Config
from trainer.data.augment import Normalise
from trainer.data.index import write_split
from trainer.data.loader import Order, Shares
from trainer.data.prepare import Prepared
from trainer.errors import UserError
from trainer.loop import Evaluations, Progress, fit
from trainer.model_file import Description, write_model
from trainer.optim import make_optimizer
from trainer.parse import dump
from trainer.report.console import Display, group_table
from trainer.report.metrics import Row, check_epochs, epoch_rows, read_rows
from trainer.report.run_report import RunReport, Silent
from trainer.report.summary import best_row
from trainer.run_folder import LAST, METRICS, MODEL, SPLIT, check_seen, find_state, open_folder
from trainer.runtime import Runtime


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

    @property
    def model_file(self) -> Path:
        """Return the best epoch's weights."""
        return self.folder / MODEL


def finetune(config: Config, machine: Runtime, console: Console, *, weights: str | None) -> Outcome:
    """Train, evaluate and save; or go on with, or just report, what the run folder holds.

    The state is initialised in this order, in every run:
     1. the list of examples, each checked;
     2. the model with fresh weights from `run.seed`; its head found and replaced; source weights copied in;
     3. device, parameter groups and the optimizer over them;
     4. precision and process group (accelerate);
     5. model, optimizer and position of an earlier start, if there is one;
     6. loaders that begin at that position.
    """
    began = time.monotonic()
    accelerator, folder = machine.accelerator, Path(config.run.dir)

    # 1.
    prepared = load_examples(config.data, machine, console)
    index = prepared.index
    console.print(describe(prepared))
    counters = runtime.in_turn(accelerator, partial(_stand, config, prepared, writes=machine.is_main))
    done = counters.epoch if counters else 0
    runtime.require_equal(
        accelerator,
        (done, prepared.fingerprint),
        "the epoch that the run has come to, or its training images",
    )
    outcome = partial(
        Outcome, folder=folder, selection=index.selection, examples=(len(index.train), len(index.test))
    )
    if done == config.train.epochs:
        console.print(
            f"finished already, after epoch {done}: nothing to train (--run.resume never starts anew)"
        )
        return outcome(rows=tuple(epoch_rows(read_rows(folder / METRICS))), seconds=time.monotonic() - began)

    # 2.
    preprocessing = preprocessing_of(config.data)
    created = runtime.in_turn(
        accelerator,
        lambda: make_model(config, len(index.classes), weights, on_progress=console.print),
        local=True,
    )
    console.print("\n".join(created.lines))

    # 3. On the device already: the optimizer's kernels are chosen by where its parameters lie.
    created.model.to(accelerator.device)
    groups = make_groups(created, config)
    console.print(group_table(groups))
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)

    # 4.
    model, optimizer = _prepare(accelerator, created.model, optimizer)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)

    # 5.
    if counters is not None:
        load_state(folder / LAST, bare, optimizer)
        if accelerator.scaler is not None and counters.scaler:  # none where the run began without fp16
            accelerator.scaler.load_state_dict(dict(counters.scaler))
        console.print(f"going on after epoch {done} of {config.train.epochs} (step {counters.step})")

    # 6.
    order = Order(examples=len(index.train), batch_size=config.train.batch_size, seed=config.run.seed)
    images = training_images(index, preprocessing, config, machine)
    shares = Shares(
        order,
        epochs=config.train.epochs,
        start_step=done * order.steps_per_epoch,
        rank=machine.rank,
        world=machine.world,
    )
    batches = loader_of(images, shares, config, machine)
    evaluator = Evaluator(index, preprocessing, config, machine)

    display = Display(
        console, epochs=config.train.epochs, steps_per_epoch=order.steps_per_epoch, done_epochs=done
    )
    report: RunReport | Silent = Silent()
    if machine.is_main:
        title = f"{config.model.name}, {created.source}"
        report = RunReport(display, folder=folder, title=title, device=accelerator.device, done_epochs=done)
    save = Saver(
        folder=folder,
        model=bare,
        optimizer=optimizer,
        scaler=accelerator.scaler,
        fingerprint=prepared.fingerprint,
        selection=index.selection,
        description=Description(
            version=own_version(),
            architecture=config.model.name,
            classes=index.classes,
            preprocessing=preprocessing,
            source=created.source,
            metrics={},
        ),
    )

    plan = make_plan(config, order, start_epoch=done)
    try:
        with display.shown():
            fit(
                model,
                optimizer,
                iter(batches),
                plan,
                accelerator=accelerator,
                normalise=Normalise(preprocessing, accelerator.device),
                evaluate=evaluator,
                save=save if machine.is_main else lambda progress, evaluations: None,
                listener=report,
                paths_of=partial(paths_of, images, order),
            )
    finally:
        report.draw()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return outcome(rows=tuple(epoch_rows(read_rows(folder / METRICS))), seconds=time.monotonic() - began)


def _stand(config: Config, prepared: Prepared, *, writes: bool) -> Counters | None:
    """Open the run folder, and return where the run in it stands; None where it has yet to begin."""
    folder = Path(config.run.dir)
    if writes:
        open_folder(folder, dump(config), resume="auto")
        if prepared.index.split_made:
            write_split(prepared.index, folder / SPLIT)
    check_seen(folder)
    found = find_state(folder, data=prepared.fingerprint)
    check_epochs(folder / METRICS, found.epoch if found else 0)
    return found


def _prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap model and optimizer; what an earlier stage of this process has left behind is not this one's."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    prepared: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(model, optimizer)
    return prepared


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Leaves the best weights and the state of training; each file is whole or absent. Rank 0's."""

    folder: Path
    model: nn.Module
    """Bare: neither DDP's wrapper nor its prefixes are written."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    fingerprint: str
    """Of the training examples."""
    selection: str | None
    description: Description
    """Of the model; its metrics are filled in as they come."""

    def __call__(self, progress: Progress, _: Evaluations) -> None:
        """Write the state at the end of an epoch, whose row stands in the metrics already.

        Raises:
            UserError: it could not be written, as on a full disk.

        """
        try:
            self._write(progress)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder}: epoch {progress.epoch} could not be saved ({error}). What was saved before is whole: "
                "make room, and the same command goes on from there"
            ) from None

    def _write(self, progress: Progress) -> None:
        rows = epoch_rows(read_rows(self.folder / METRICS))
        if best_row(rows, self.selection) is rows[-1]:
            metrics = {**rows[-1], "selected_on": self.selection or "test"}
            write_model(
                self.folder / MODEL, self.model.state_dict(), replace(self.description, metrics=metrics)
            )
        counters = Counters(
            epoch=progress.epoch,
            step=progress.step,
            data=self.fingerprint,
            scaler=self.scaler.state_dict() if self.scaler is not None else {},
        )
        save_state(self.folder / LAST, self.model, self.optimizer, counters)


def own_version() -> str:
    """Return regraft's version; a checkout that is not installed has none."""
    try:
        return version("regraft")
    except PackageNotFoundError:
        return "uninstalled"

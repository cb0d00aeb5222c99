"""The note's steps in their order: a source model, fine-tuning on the target, and scratch to compare with."""

import dataclasses
import os
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console

from trainer import runtime
from trainer.assemble import load_examples
from trainer.attempts import Attempt, Record, latest, require_free, restarted
from trainer.config import Config, ScratchConfig, SourceConfig, TransferConfig
from trainer.data.augment import Preprocessing
from trainer.data.known import cache_folder, is_known
from trainer.debug import debug
from trainer.errors import UserError
from trainer.finetune import Outcome, finetune
from trainer.model.build import preset
from trainer.model_file import read_description
from trainer.parse import dump
from trainer.preflight import preflight
from trainer.report.console import make_console
from trainer.report.summary import comparison, summary
from trainer.run.environment import record_environment
from trainer.run_folder import STOP, examine, holds_run, kept_precision, move_aside, write_config
from trainer.runtime import Runtime
from trainer.signals import Stopped, StopSignals


def run(config: Config, signals: StopSignals) -> Outcome | None:
    """Do all that the config asks for; returns the fine-tuned run, None in debug mode.

    Raises:
        UserError: whatever the user can mend.
        Stopped: the run was asked to stop.

    """
    if config.debug and not runtime.stand_alone(os.environ):
        return None
    folder = Path(_absolute("run.dir", config.run.dir))
    kept = kept_precision(folder) if config.run.resume != "never" else None
    machine = runtime.start(
        device=config.run.device,
        precision=config.train.precision,
        threads=config.run.threads,
        kept=None if config.debug else kept,
    )
    console = make_console(speaks=machine.is_main)
    config = resolve(config)
    # What was chosen is part of the run: it does not change where the run goes on.
    config = replace(config, train=replace(config.train, precision=machine.precision))
    for note in machine.notes:
        console.print(note)
    if config.debug:
        debug(config, machine, console)
        return None

    attempt = runtime.in_turn(
        machine.accelerator, lambda: _open(config, console, signals) if machine.is_main else None
    )
    try:
        with signals.as_flags():  # the first stage asks for them
            message = record_environment(folder, attempt, machine)
        if message is not None:
            console.print(message)
        outcome = _stages(config, machine, console, attempt, signals)
    except BaseException as error:
        if attempt is not None:
            _end(attempt, error)
        raise
    if attempt is not None:
        attempt.end("done")
    runtime.shut_down()
    return outcome


def _stages(
    config: Config, machine: Runtime, console: Console, attempt: Attempt | None, signals: StopSignals
) -> Outcome:
    weights = config.model.weights

    def stage(name: str, config: Config, weights: str | None) -> Outcome:
        # A signal that came while the stage before was finishing has only left its flag.
        (asked,) = machine.agree([signals.asked or 0])
        if asked:
            raise Stopped(signal.Signals(asked).name)

        def note_down() -> None:
            if attempt is not None:
                attempt.update(stage=name, step=0, steps=0, epoch=0, epochs=config.train.epochs)

        runtime.in_turn(machine.accelerator, note_down)
        return finetune(config, machine, console, weights=weights, attempt=attempt, signals=signals)

    if config.source.root:
        preflight(config, load_examples(config.data, machine, console).index, machine)
        console.rule("source model", align="left")
        source = stage("source", source_stage(config), None)
        weights = str(source.model_file)
    if config.source.root or config.scratch.lr:
        console.rule("fine-tuning" if weights else "training", align="left")
    outcome = stage("", config, weights)
    if machine.is_main:
        console.print(summary(outcome, alpha=outcome.alpha))
    if config.scratch.lr:
        console.rule("from scratch", align="left")
        scratch = stage("scratch", scratch_stage(config), None)
        if machine.is_main:
            console.rule("fine-tuned or from scratch", align="left")
            console.print(comparison(outcome, scratch))
            console.print(f"run folder {outcome.folder}; from scratch {scratch.folder}")
    return outcome


def _open(config: Config, console: Console, signals: StopSignals) -> Attempt:
    """Make the run folder this process's, with a config in it."""
    folder, resume = Path(config.run.dir), config.run.resume
    # torchrun starts its processes again with the words that they were first started with.
    if resume == "never" and restarted(folder):
        resume = "auto"
    note = examine(folder, dump(config), resume=resume)
    _, before = latest(folder)
    free = require_free(folder, say=console.print)
    with signals.as_flags():  # or a number would be taken, and nobody be there to say how it ended
        attempt = Attempt.claim(folder, say=console.print, free=free)
        try:
            if resume == "never" and holds_run(folder):
                attempt.end("stopped", "moved aside")
                note = move_aside(folder)
                attempt, before = Attempt.claim(folder, say=console.print), None
            if note is not None:
                console.print(note)
            _settle_stop_file(folder, before, console)
            if not holds_run(folder):
                write_config(folder, dump(config))  # the others look for it; `find` writes it anew
        except BaseException as error:
            _end(attempt, error)
            raise
    return attempt


def _settle_stop_file(folder: Path, before: Record | None, console: Console) -> None:
    """Remove a STOP that an earlier start has left; one that came after it had been killed is still meant."""
    path = folder / STOP
    try:
        made = path.lstat().st_mtime
        if before is not None and before.state in ("running", "failed"):
            began = datetime.fromisoformat(before.began).timestamp()
            if made > began:
                return
        path.unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: asks the run to stop, and cannot be removed ({error}): remove it") from None
    console.print(f"{path}: from before this start, removed")


def _end(attempt: Attempt, error: BaseException) -> None:
    """Say how an attempt ended that has not come to its end; what it says must not hide why."""
    state: Literal["stopped", "failed"] = "stopped" if isinstance(error, Stopped) else "failed"
    try:
        attempt.end(state, str(error) or type(error).__name__)
    except UserError as trouble:
        error.add_note(f"(nor could {attempt.folder} be told: {trouble})")


def resolve(config: Config) -> Config:
    """Return the config with absolute paths and the preprocessing that its weights ask for.

    Raises:
        UserError: an unknown model or weights name, or a file of another model.

    """
    data = config.data
    if data.root is None or not data.root.strip():
        raise UserError("data.root is not set: give the folder of your images, a CSV, or a known name")
    weights = config.model.weights
    if weights is not None and Path(there := _absolute("model.weights", weights)).is_file():
        weights = there
    labels = config.model.source_labels
    if labels != "auto":
        labels = _absolute("model.source_labels", labels)
    config = replace(config, model=replace(config.model, weights=weights, source_labels=labels))
    found = _preprocessing(config)
    size = data.image_size or found.image_size
    in_proportion = round(found.resize_size * size / found.image_size)
    data = replace(
        data,
        root=data.root if is_known(data.root) else _absolute("data.root", data.root),
        image_size=size,
        resize_size=data.resize_size or in_proportion,
        resize=data.resize or found.resize,
        interpolation=data.interpolation or found.interpolation,
        mean=data.mean or found.mean,
        std=data.std or found.std,
        cache=str(cache_folder(data.cache)),
    )
    if data.resize_size is not None and data.resize_size < size:
        raise UserError(
            f"data.resize_size is {data.resize_size}, data.image_size {size}: the central crop cannot be larger than "
            "the picture it is cut from"
        )
    source = config.source
    if source.root and not is_known(source.root):
        source = replace(source, root=_absolute("source.root", source.root))
    return replace(
        config,
        run=replace(config.run, dir=_absolute("run.dir", config.run.dir)),
        data=data,
        source=source,
    )


def _absolute(key: str, path: str) -> str:
    """Return a path of the config as a whole one."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # a misspelt ~user, or a container's user without a name
        raise UserError(
            f"{key} is {path}, and there is no such home folder here: give the whole path"
        ) from None


def _preprocessing(config: Config) -> Preprocessing:
    name, weights = config.model.name, config.model.weights
    usual = preset(name, weights)
    if weights and weights.endswith(".safetensors") and Path(weights).is_file():
        described = read_description(weights)
        if described is not None:
            if described.architecture != name:
                raise UserError(
                    f"model.weights {weights} is a {described.architecture}, but model.name is {name}: "
                    "set model.name to what the file holds"
                )
            return described.preprocessing
    return Preprocessing(resize="squash", **dataclasses.asdict(usual))


def source_stage(config: Config) -> Config:
    """Return the run that trains the source model: from scratch, one learning rate, in `source/`."""
    return replace(
        _from_scratch(config, "source", lr=config.source.lr),
        data=replace(config.data, root=config.source.root, val_fraction=0.0),
        regularise=replace(config.regularise, early_stopping=None),  # it has nothing to select on
        train=replace(config.train, epochs=config.source.epochs),
    )


def with_weights(config: Config, file: Path) -> Config:
    """Return the config with a source model trained before in place of the stage that trains one."""
    return replace(
        config,
        model=replace(config.model, weights=str(file)),
        source=replace(config.source, root=None),
    )


def scratch_stage(config: Config) -> Config:
    """Return the comparison: the same network, data and budget, from scratch, in `scratch/`."""
    assert config.scratch.lr is not None  # for mypy: the caller asks only where it is set
    return _from_scratch(config, "scratch", lr=config.scratch.lr)


def _from_scratch(config: Config, name: str, *, lr: float) -> Config:
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / name)),
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=TransferConfig(
            batch_norm="sync" if config.transfer.batch_norm == "sync" else TransferConfig.batch_norm
        ),
        optim=replace(config.optim, lr=lr, head_lr_scale=1.0, layer_decay=1.0, lr_scales={}),
        source=SourceConfig(),
        scratch=ScratchConfig(),
    )

"""The note's steps in their order: a source model, fine-tuning on the target, and scratch to compare with."""

import dataclasses
import os
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console

from trainer import environment
from trainer.commands.debug import debug
from trainer.config.builders import load_dataset
from trainer.config.parse import dump
from trainer.config.preflight import preflight
from trainer.config.schema import BaselineConfig, Config, PretrainConfig, TransferConfig
from trainer.data.augment import Preprocessing
from trainer.data.registry import cache_folder, is_known
from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.model.build import preset
from trainer.model.file import read_metadata
from trainer.report.console import make_console
from trainer.report.summary import comparison, summary
from trainer.run.folder import (
    BASELINE,
    PRETRAIN,
    STOP,
    archive_run,
    check_resumable,
    holds_run,
    saved_precision,
    write_config,
)
from trainer.run.lock import AttemptRecord, RunLock, is_torchrun_restart, latest_attempt, wait_until_released
from trainer.train_run import TrainResult, train_run


def run(config: Config, signals: StopSignals) -> TrainResult | None:
    """Do all that the config asks for; returns the fine-tuned run, None in debug mode.

    Raises:
        UserError: whatever the user can mend.
        Stopped: the run was asked to stop.

    """
    if config.debug and not context.leave_process_group_env(os.environ):
        return None
    folder = Path(_absolute("run.dir", config.run.dir))
    kept = saved_precision(folder) if config.run.resume != "never" else None
    ctx = context.start(
        device=config.run.device,
        precision=config.train.precision,
        threads=config.run.threads,
        kept=None if config.debug else kept,
    )
    console = make_console(speaks=ctx.is_main_process)
    config = resolve(config)
    # What was chosen is part of the run: it does not change where the run goes on.
    config = replace(config, train=replace(config.train, precision=ctx.precision))
    for note in ctx.notes:
        console.print(note)
    if config.debug:
        debug(config, ctx, console)
        return None

    attempt = context.main_process_first(
        ctx.accelerator, lambda: _open(config, console, signals) if ctx.is_main_process else None
    )
    try:
        with signals.deferred():  # the first stage asks for them
            told = environment.keep(folder, attempt, ctx)
        if told is not None:
            console.print(told)
        outcome = _stages(config, ctx, console, attempt, signals)
    except BaseException as error:
        if attempt is not None:
            _end(attempt, error)
        raise
    if attempt is not None:
        attempt.end("done")
    context.shut_down()
    return outcome


def _stages(
    config: Config, ctx: DistributedContext, console: Console, attempt: RunLock | None, signals: StopSignals
) -> TrainResult:
    weights = config.model.weights

    def stage(name: str, config: Config, weights: str | None) -> TrainResult:
        # A signal that came while the stage before was finishing has only left its flag.
        (asked,) = ctx.all_reduce_max([signals.received or 0])
        if asked:
            raise Stopped(signal.Signals(asked).name)

        def note_down() -> None:
            if attempt is not None:
                attempt.update(stage=name, step=0, steps=0, epoch=0, epochs=config.train.epochs)

        context.main_process_first(ctx.accelerator, note_down)
        return train_run(config, ctx, console, weights=weights, attempt=attempt, signals=signals)

    if config.pretrain.root:
        preflight(config, load_dataset(config.data, ctx, console).index, ctx)
        console.rule("source model", align="left")
        pretrained = stage(PRETRAIN, pretrain_config(config), None)
        weights = str(pretrained.model_file)
    if config.pretrain.root or config.baseline.lr:
        console.rule("fine-tuning" if weights else "training", align="left")
    outcome = stage("", config, weights)
    if ctx.is_main_process:
        console.print(summary(outcome, alpha=outcome.alpha))
    if config.baseline.lr:
        console.rule("from scratch", align="left")
        baseline = stage(BASELINE, baseline_config(config), None)
        if ctx.is_main_process:
            console.rule("fine-tuned or from scratch", align="left")
            console.print(comparison(outcome, baseline))
            console.print(f"run folder {outcome.folder}; baseline {baseline.folder}")
    return outcome


def _open(config: Config, console: Console, signals: StopSignals) -> RunLock:
    """Make the run folder this process's, with a config in it."""
    folder, resume = Path(config.run.dir), config.run.resume
    # torchrun starts its processes again with the words that they were first started with.
    if resume == "never" and is_torchrun_restart(folder):
        resume = "auto"
    note = check_resumable(folder, dump(config), resume=resume)
    _, before = latest_attempt(folder)
    free = wait_until_released(folder, log=console.print)
    with signals.deferred():  # or a number would be taken, and nobody be there to say how it ended
        attempt = RunLock.acquire(folder, log=console.print, released=free)
        try:
            if resume == "never" and holds_run(folder):
                attempt.end("stopped", "moved aside")
                note = archive_run(folder)
                attempt, before = RunLock.acquire(folder, log=console.print), None
            if note is not None:
                console.print(note)
            _settle_stop_file(folder, before, console)
            if not holds_run(folder):
                write_config(folder, dump(config))  # the others look for it; `find` writes it anew
        except BaseException as error:
            _end(attempt, error)
            raise
    return attempt


def _settle_stop_file(folder: Path, before: AttemptRecord | None, console: Console) -> None:
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


def _end(attempt: RunLock, error: BaseException) -> None:
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
    pretrain = config.pretrain
    if pretrain.root and not is_known(pretrain.root):
        pretrain = replace(pretrain, root=_absolute("pretrain.root", pretrain.root))
    return replace(
        config,
        run=replace(config.run, dir=_absolute("run.dir", config.run.dir)),
        data=data,
        pretrain=pretrain,
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
        described = read_metadata(weights)
        if described is not None:
            if described.architecture != name:
                raise UserError(
                    f"model.weights {weights} is a {described.architecture}, but model.name is {name}: "
                    "set model.name to what the file holds"
                )
            return described.preprocessing
    return Preprocessing(resize="squash", **dataclasses.asdict(usual))


def pretrain_config(config: Config) -> Config:
    """Return the run that trains the source model: from scratch, one learning rate, in `source/`."""
    return replace(
        _from_scratch(config, PRETRAIN, lr=config.pretrain.lr),
        data=replace(config.data, root=config.pretrain.root, val_fraction=0.0),
        regularization=replace(config.regularization, early_stopping=None),  # it has nothing to select on
        train=replace(config.train, epochs=config.pretrain.epochs),
    )


def with_pretrained(config: Config, file: Path) -> Config:
    """Return the config with a source model trained before in place of the stage that trains one."""
    return replace(
        config,
        model=replace(config.model, weights=str(file)),
        pretrain=replace(config.pretrain, root=None),
    )


def baseline_config(config: Config) -> Config:
    """Return the comparison: the same network, data and budget, from scratch, in `scratch/`."""
    assert config.baseline.lr is not None  # for mypy: the caller asks only where it is set
    return _from_scratch(config, BASELINE, lr=config.baseline.lr)


def _from_scratch(config: Config, name: str, *, lr: float) -> Config:
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / name)),
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=TransferConfig(
            batch_norm="sync" if config.transfer.batch_norm == "sync" else TransferConfig.batch_norm
        ),
        optim=replace(config.optim, lr=lr, head_lr_scale=1.0, layer_decay=1.0, lr_mult={}),
        pretrain=PretrainConfig(),
        baseline=BaselineConfig(),
    )

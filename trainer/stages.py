"""The note's steps in their order: a source model, fine-tuning on the target, and scratch to compare with."""

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

from trainer import runtime
from trainer.config import Config, ScratchConfig, SourceConfig, TransferConfig
from trainer.data.augment import Preprocessing
from trainer.data.known import cache_folder, is_known
from trainer.debug import debug
from trainer.errors import UserError
from trainer.finetune import Outcome, finetune
from trainer.model.build import preset
from trainer.model_file import read_description
from trainer.parse import dump
from trainer.report.console import make_console
from trainer.report.summary import comparison, summary
from trainer.run_folder import open_folder


def run(config: Config) -> Outcome | None:
    """Do all that the config asks for; returns the fine-tuned run, None in debug mode."""
    if config.debug and not runtime.stand_alone(os.environ):
        return None
    machine = runtime.start(
        device=config.run.device, precision=config.train.precision, threads=config.run.threads
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

    folder = Path(config.run.dir)

    def settle() -> str | None:
        return open_folder(folder, dump(config), resume=config.run.resume) if machine.is_main else None

    found = runtime.in_turn(machine.accelerator, settle)
    if found is not None:
        console.print(found)
    weights = config.model.weights
    if config.source.root:
        console.rule("source model", align="left")
        source = finetune(source_stage(config), machine, console, weights=None)
        weights = str(source.model_file)
    if config.source.root or config.scratch.lr:
        console.rule("fine-tuning" if weights else "training", align="left")
    outcome = finetune(config, machine, console, weights=weights)
    if machine.is_main:
        console.print(summary(outcome))
    if config.scratch.lr:
        console.rule("from scratch", align="left")
        scratch = finetune(scratch_stage(config), machine, console, weights=None)
        if machine.is_main:
            console.rule("fine-tuned or from scratch", align="left")
            console.print(comparison(outcome, scratch))
            console.print(f"run folder {outcome.folder}; from scratch {scratch.folder}")
    runtime.shut_down()
    return outcome


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
    config = replace(config, model=replace(config.model, weights=weights))
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
        train=replace(config.train, epochs=config.source.epochs),
    )


def scratch_stage(config: Config) -> Config:
    """Return the comparison: the same network, data and budget, from scratch, in `scratch/`."""
    assert config.scratch.lr is not None  # for mypy: the caller asks only where it is set
    return _from_scratch(config, "scratch", lr=config.scratch.lr)


def _from_scratch(config: Config, name: str, *, lr: float) -> Config:
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / name)),
        model=replace(config.model, weights=None),
        transfer=TransferConfig(),
        optim=replace(config.optim, lr=lr, head_lr_scale=1.0),
        source=SourceConfig(),
        scratch=ScratchConfig(),
    )

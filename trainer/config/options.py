"""Names of the options, `section.key` for every field of the config, and their old names."""

import dataclasses
from collections.abc import Iterator
from typing import get_args, get_origin, get_type_hints

from trainer.config.schema import Config
from trainer.config.suggest import suggest
from trainer.errors import UserError

COMMAND_LINE = "command line"
"""Where an option was found, in error messages."""
_LAUNCHER_OPTIONS = (
    *("nproc", "nproc_per_node", "gpus", "num_gpus", "n_gpu", "n_gpus", "ngpu", "ngpus", "devices", "num_devices"),
    *("num_processes", "nprocs", "n_procs", "np", "max_restarts"),
)
_GENERAL = {
    **dict.fromkeys(("cfg", "conf", "c", "config_file", "config_path", "configs", "hyp", "yaml"), "--config"),
    **dict.fromkeys(("h", "help", "usage", "?"), "--help"),
    **dict.fromkeys(("v", "version"), "--version"),
    **dict.fromkeys(("print_config", "show_config", "dump_config"), "--print_config"),
}
"""Names of other programs -> options that belong to no section."""
_NO_OPTIONS = {
    **dict.fromkeys(
        ("num_classes", "n_classes", "nb_classes", "classes", "nc"), "The classes are those of the dataset"
    ),
    **dict.fromkeys(("eval", "evaluate", "test_only", "val_only"), "Each run evaluates its model"),
    **dict.fromkeys(
        ("local_rank", "rank", "world_size", "dist_url", "dist_backend"), "The launcher sets up the processes"
    ),
}
"""Names of other programs -> why there is no such option."""
RENAMED = {
    "regularise": "regularization",
    "source": "pretrain",
    "scratch": "baseline",
    "data.workers": "data.num_workers",
    "optim.clip_norm": "optim.max_grad_norm",
    "optim.decay_norms": "optim.decay_norm_and_bias",
    "optim.lr_scales": "optim.lr_mult",
    "train.accumulation": "train.grad_accum_steps",
    "train.points_per_epoch": "train.logs_per_epoch",
    "transfer.train": "transfer.trainable",
    "data.augment recipe": "data.augment basic",
    "transfer.strategy note": "transfer.strategy d2l",
    "transfer.strategy gradual": "transfer.strategy gradual-unfreezing",
    "transfer.strategy strong-regularisation": "transfer.strategy strong-regularization",
}
"""Old name -> new name of a section, an option, or an option's value."""


def keys(config_class: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield the name of every option: `run.dir`, ..., `debug`."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _list_options() -> Iterator[str]:
    """Yield the name of every option whose value is a list."""
    for section, config_class in get_type_hints(Config).items():
        if dataclasses.is_dataclass(config_class):
            for name, hint in get_type_hints(config_class).items():
                if tuple in (get_origin(hint), *map(get_origin, get_args(hint))):
                    yield f"{section}.{name}"


OPTIONS = frozenset(keys())
_LIST_OPTIONS = frozenset(_list_options())
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in keys() if "." in key))


def add_brackets(option: str, text: str) -> str:
    """Return the value of an option as typed; that of a list may be typed as `a` or `a,b`, and becomes `[a,b]`."""
    is_bare = option in _LIST_OPTIONS and text.strip() not in ("", "null") and not text.lstrip().startswith("[")
    return f"[{text}]" if is_bare else text


def check_option(key: str, value: object, where: str) -> None:
    """Raise a UserError, which starts with `where`, if there is no such option, or if it was renamed."""
    section, dot, name = key.partition(".")
    renamed_section = {key: f"{RENAMED[section]}{dot}{name}"} if section in RENAMED else {}
    for old, new in (RENAMED | renamed_section).items():
        if old == key or (old.startswith(f"{key} ") and old == f"{key} {value}"):
            raise UserError(f"{where}: {old} was renamed to {new}")
    if key not in OPTIONS:
        raise UserError(f"{where}: there is no option {key[:80]!r}. {_suggestion(key[:80], value, where)}")


def _suggestion(key: str, value: object, where: str) -> str:
    name = key.strip("-").replace("-", "_").lower()
    if where == COMMAND_LINE and name in _GENERAL:
        return f"Did you mean {_GENERAL[name]} {value}".rstrip() + "?"
    if name in _NO_OPTIONS:
        return f"{_NO_OPTIONS[name]}; `regraft train --help` lists the options"
    if name in _LAUNCHER_OPTIONS:
        return "The number of processes and of restarts are options of `regraft train`: --nproc and --max-restarts"
    near = suggest(key, tuple(keys()))
    section = (near[0] if near else key).partition(".")[0]
    topic = section if section in SECTIONS else "SECTION"
    listed = f"`regraft train --help {topic}` lists the options of " + (f"section {topic}" if near else "a section")
    if not near:
        return f"The sections are {', '.join(SECTIONS)}; {listed}"
    first = f"--{near[0]} {value}".rstrip() if where == COMMAND_LINE else near[0]
    others = f" Near: {', '.join(near[1:])}." if near[1:] else ""
    return f"Did you mean {first}?{others} {listed}"

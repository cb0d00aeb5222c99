"""Names of the options, `section.key` for every field of the config, and the config files that set them."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from trainer.config.schema import Config
from trainer.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the configs that come with the program."""
Content = dict[str, Any]
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


OPTIONS = frozenset(keys())


def check_option(key: str, value: object, where: str) -> None:
    """Raise a UserError, which starts with `where`, if there is no such option, or if it was renamed."""
    section, dot, name = key.partition(".")
    renamed_section = {key: f"{RENAMED[section]}{dot}{name}"} if section in RENAMED else {}
    for old, new in (RENAMED | renamed_section).items():
        if old in (key, f"{key} {value}"):
            raise UserError(f"{where}: {old} was renamed to {new}")
    if key not in OPTIONS:
        raise UserError(f"{where}: there is no option {key!r}.{_suggest(key)}")


def _suggest(key: str) -> str:
    section, _, name = key.rpartition(".")
    close = difflib.get_close_matches(key, OPTIONS, n=1)
    related = [option for option in keys() if option.startswith(f"{section}.")] or [
        option for option in keys() if option.endswith(f".{name}")
    ]
    question = f" Did you mean {close[0]}?" if close else ""
    return f"{question} Valid: {', '.join(related or keys())}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, of which PyYAML silently takes the last."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [loader.construct_object(key) for key, _ in node.value]
    duplicates = sorted({str(name) for name in names if names.count(name) > 1})
    if duplicates:
        line = node.start_mark.line + 1
        raise UserError(f"{loader.name}, line {line}: duplicate keys: {', '.join(duplicates)}")
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_config_file(path: Path, where: str) -> Content:
    """Return the content of a config file, which may contain some of the options.

    Args:
        path: the file.
        where: its name in error messages.

    Raises:
        UserError: no such file, no YAML, or an unknown or renamed option.

    """
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        content = loader.get_single_data()
    except FileNotFoundError:
        recipes = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise UserError(f"{where}: there is no such file. The recipes in {CONFIGS}: {recipes}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # PyYAML raises all of them
        raise UserError(f"{where}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected sections with options, such as 'optim:' and below it '  lr: 0.001'")
    sections = {key.partition(".")[0] for key in OPTIONS if "." in key}
    for section in sections & content.keys():
        if not isinstance(content[section], dict):
            raise UserError(f"{where}: section {section!r} is {content[section]!r}: expected options below it")
    for key, value in options_of(content):
        check_option(key, value, where)
    return content


def options_of(content: Content) -> Iterator[tuple[str, object]]:
    """Yield each option that a config file sets, with its value."""
    for section, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{key}", item) for key, item in value.items())
        else:
            yield str(section), value

"""Text of `--help`: the options by section, with their type, description and default."""

import ast
import dataclasses
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from regraft.contract import COMMAND
from trainer.config.options import SECTIONS
from trainer.config.schema import Config

_INDENT = 6
_DESCRIPTION = (
    "Fine-tune a pretrained image classifier. FOLDER is short for --data.root FOLDER. Without --config and data, it "
    "runs {quickstart} offline."
)
_GENERAL = [
    ("--help [SECTION]", f"Show this help, or that of one section: {', '.join(SECTIONS)}."),
    ("--config FILE", "Config file with options in YAML; may be given several times, and later options win."),
    ("--print_config", "Print all options of the run as YAML."),
    ("--version", "Print the version of regraft."),
]
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", NoneType: "null"}


class OptionHelp(NamedTuple):
    """What `--help` and the documentation site say about an option."""

    name: str
    """Name, such as `optim.lr`."""
    type: str
    """Type, such as `FLOAT` or `auto|off`."""
    default: str
    description: str


class SectionHelp(NamedTuple):
    """A section of the config, or the options that belong to no section."""

    name: str
    """Name, such as `optim`; empty for the options that belong to no section."""
    description: str
    options: list[OptionHelp]


def help_topic(argv: Sequence[str]) -> str | None:
    """Return the section that follows `--help` on the command line, or that of the option that does, or None."""
    following = [after for word, after in pairwise(argv) if word in ("--help", "-h")]
    sections = (topic.removeprefix("--").partition(".")[0] for topic in following)
    return next((section for section in sections if section in SECTIONS), None)


def help_text(quickstart: str, topic: str | None = None) -> str:
    """Return the text of `--help`.

    Args:
        quickstart: the config that runs without options.
        topic: the only section to show; None: all.

    """
    width = min(100, shutil.get_terminal_size().columns)
    command = os.environ.get(COMMAND) or f"python {sys.argv[0]}"
    lines = [f"usage: {command} [FOLDER] [--config FILE] [--SECTION.KEY VALUE ...]"]
    if topic is None:
        lines += ["", *textwrap.wrap(_DESCRIPTION.format(quickstart=quickstart), width), "", "General"]
        for title, text in _GENERAL:
            lines += _entry(title, text, width)
    for section in describe_sections():
        if topic in (None, section.name):
            lines += ["", f"{section.name}: {section.description}"] if section.name else []
            for option in section.options:
                lines += _entry(f"--{option.name} {option.type} [default: {option.default}]", option.description, width)
    return "\n".join(lines)


def _entry(title: str, text: str, width: int) -> list[str]:
    indent = " " * _INDENT
    return [
        f"  {title}",
        *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False),
    ]


def describe_sections() -> Iterator[SectionHelp]:
    """Yield the options that belong to no section, and then each section, in the order of the config."""
    yield SectionHelp("", "General options.", _describe_options(Config, ""))
    for name, config_class in get_type_hints(Config).items():
        if dataclasses.is_dataclass(config_class):
            options = _describe_options(config_class, f"{name}.")
            yield SectionHelp(name, str(inspect.getdoc(config_class)), options)


def _describe_options(config_class: Any, prefix: str) -> list[OptionHelp]:
    """Return the fields that are not sections."""
    hints, descriptions = get_type_hints(config_class), field_docstrings(config_class)
    options = []
    for field in dataclasses.fields(config_class):
        if field.name in descriptions:
            factory = field.default_factory
            value = field.default if factory is dataclasses.MISSING else factory()
            default = value if isinstance(value, str) else json.dumps(value)
            hint = _format_type(hints[field.name])
            options.append(OptionHelp(f"{prefix}{field.name}", hint, default, descriptions[field.name]))
    return options


def field_docstrings(config_class: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(definition, ast.ClassDef)  # for mypy
    docstrings = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            docstrings[ast.unparse(field.target)] = str(ast.literal_eval(after.value))
    return docstrings


def completions() -> Iterator[str]:
    """Yield a line per option for the shell's completion: its name and, if it has few, its values."""
    for section, config_class in get_type_hints(Config).items():
        if not dataclasses.is_dataclass(config_class):
            yield section
            continue
        for name, hint in get_type_hints(config_class).items():
            option, values = f"{section}.{name}", _format_type(hint)
            if any(kind in values for kind in ("INT", "FLOAT", "TEXT")):
                yield option
            else:
                yield " ".join([option, *values.split("|")])


def describe_type(option: str) -> str:
    """Return the type of an option, such as `INT|null`."""
    hint: Any = Config
    for name in option.split("."):
        hint = get_type_hints(hint)[name]
    return _format_type(hint)


def _format_type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(arguments)
    if origin in (Union, UnionType):
        return "|".join(map(_format_type, arguments))
    if origin is dict:
        return "{{{}: {}}}".format(*map(_format_type, arguments))
    if origin is tuple:
        return f"[{', '.join('...' if argument is ... else _format_type(argument) for argument in arguments)}]"
    return _TYPES[hint]

"""Text of `--help`: the options by section, with their type, description and default."""

import ast
import dataclasses
import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.config.schema import Config

_INDENT = 6
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", NoneType: "null"}


def help_text(quickstart: str) -> str:
    """Return the text of `--help`; `quickstart` is the config that runs without options."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = ["usage: regraft train [--config FILE] [--SECTION.KEY VALUE ...]", ""]
    lines += textwrap.wrap(
        f"Fine-tune a pretrained image classifier. Without --config and --data.root, it runs {quickstart} offline.",
        width,
    )
    lines += ["", "General"]
    general = [
        ("--help", "Show this help."),
        ("--config FILE", "Config file with options in YAML; may be given several times, and later options win."),
        ("--print_config", "Print all options of the run as YAML."),
    ]
    sections = get_type_hints(Config)
    for title, text in [*general, *_options(Config, "")]:
        lines += _entry(title, text, width)
    for section, config_class in sections.items():
        if dataclasses.is_dataclass(config_class):
            lines += ["", f"{section}: {inspect.getdoc(config_class)}"]
            for title, text in _options(config_class, f"{section}."):
                lines += _entry(title, text, width)
    return "\n".join(lines)


def _entry(title: str, text: str, width: int) -> list[str]:
    indent = " " * _INDENT
    return [
        f"  {title}",
        *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False),
    ]


def _options(config_class: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield option and description of each field that is not a section."""
    hints, descriptions = get_type_hints(config_class), field_docstrings(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in descriptions:
            factory = field.default_factory
            value = field.default if factory is dataclasses.MISSING else factory()
            default = value if isinstance(value, str) else json.dumps(value)
            title = f"--{prefix}{field.name} {_format_type(hints[field.name])} [default: {default}]"
            yield title, descriptions[field.name]


def field_docstrings(config_class: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(definition, ast.ClassDef)  # for mypy
    docstrings = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            docstrings[ast.unparse(field.target)] = str(ast.literal_eval(after.value))
    return docstrings


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

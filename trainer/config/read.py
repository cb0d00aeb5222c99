"""Read a config file, and check the names of its options."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from regraft import yaml_file
from regraft.files import CONFIGS
from trainer.config.options import SECTIONS, add_brackets, check_option
from trainer.errors import UserError

Content = dict[str, Any]
ANCHORS = "x-"
"""Start of the top-level keys that only hold anchors, as in Docker Compose."""


def read_config_file(path: Path, where: str) -> Content:
    """Return the content of a config file, which may contain some of the options.

    Args:
        path: the file.
        where: its name in error messages.

    Raises:
        UserError: no such file, no YAML, or an unknown or renamed option.

    """
    try:
        content = yaml_file.load(path)
    except FileNotFoundError:
        recipes = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise UserError(f"{where}: there is no such file. The recipes in {CONFIGS}: {recipes}") from None
    except yaml_file.ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{where}: not a readable YAML file: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected sections with options, such as 'optim:' and below it '  lr: 0.001'")
    content = {key: value for key, value in content.items() if not str(key).startswith(ANCHORS)}
    for section in SECTIONS:
        if section in content and not isinstance(content[section], dict):
            given = "empty" if content[section] is None else repr(str(content[section])[:80])
            raise UserError(f"{where}: section {section!r} is {given}: expected options below it, indented by spaces")
    for key, value in options_of(content):
        check_option(key, value, where)
    return {section: _with_lists(section, values) for section, values in content.items()}


def _with_lists(section: str, values: Any) -> Any:
    """Return the options of a section, with a list for a value without brackets: `trackers: tensorboard, mlflow`."""
    if not isinstance(values, dict):
        return values
    return {key: _as_list(f"{section}.{key}", value) for key, value in values.items()}


def _as_list(option: str, value: Any) -> Any:
    if not isinstance(value, str | int | float):
        return value
    text = str(value)
    bracketed = add_brackets(option, text)
    if bracketed == text:
        return value
    try:
        return yaml.safe_load(bracketed)
    except yaml.YAMLError:  # the check of the type names it
        return value


def options_of(content: Content) -> Iterator[tuple[str, object]]:
    """Yield each option that a config file sets, with its value."""
    for section, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{key}", item) for key, item in value.items())
        else:
            yield str(section), value

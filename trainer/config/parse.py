"""Parse the command line and its config files into a `Config`, and write a `Config` as YAML.

jsonargparse converts and checks the types. Options are checked before, to suggest the right name for a wrong one.
"""

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from trainer.config.help import help_text
from trainer.config.options import CONFIGS, check_option, keys
from trainer.config.schema import Config
from trainer.config.strategies import insert_strategies
from trainer.errors import UserError

__all__ = ["QUICKSTART", "dump", "keys", "parse"]

QUICKSTART = CONFIGS / "quickstart.yaml"


def parse(argv: Sequence[str]) -> Config:
    """Return the config of a command line.

    Later options win: of two config files the second, and an option after a config file. `--help` and
    `--print_config` print and raise SystemExit(0).

    Raises:
        UserError: an unknown option, a wrong type, or an invalid value; the message names the option.

    """
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text(f"configs/{QUICKSTART.name}"))
    words = [word for word in _join_values(argv) if word != "--print_config"]
    _check_options(words)
    if not any(word.startswith(("--config=", "--data.root=")) for word in words):
        words.insert(0, f"--config={QUICKSTART}")
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    try:
        values = parser.instantiate(parser.parse_args(insert_strategies(words)))
    except ArgumentError as error:
        raise UserError(_rephrase(str(error))) from None
    config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
    if "--print_config" in argv:
        _print_and_exit(dump(config).rstrip())
    return config


def _print_and_exit(text: str) -> NoReturn:
    with suppress(BrokenPipeError):  # of `| head`
        print(text, flush=True)
    raise SystemExit(0)


def dump(config: Config) -> str:
    """Return a config as YAML; parsed as a config file, it gives the same config."""
    return yaml.safe_dump(_to_yaml(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _join_values(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--option value` as one word, `--option=value`."""
    words: list[str] = []
    for word in argv:
        previous = words[-1] if words else ""
        takes_value = previous.startswith("--") and "=" not in previous and previous != "--print_config"
        if previous == "--debug":
            takes_value = word in ("true", "false")
        if takes_value and not word.startswith("--"):
            words[-1] = f"{previous}={word}"
        else:
            words.append(word)
    return ["--debug=true" if word == "--debug" else word for word in words]


def _check_options(words: Sequence[str]) -> None:
    for word in words:
        option, _, value = word.partition("=")
        if option.startswith("--") and option != "--config":
            check_option(option.removeprefix("--"), value, "command line")


def _rephrase(message: str) -> str:
    """Return a message of jsonargparse in plain English."""
    message = message.replace('Parser key "', 'option "')
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)


def _to_yaml(value: Any) -> Any:
    """Return a value with lists for tuples, for which YAML has no type."""
    if isinstance(value, dict):
        return {key: _to_yaml(item) for key, item in value.items()}
    return [_to_yaml(item) for item in value] if isinstance(value, list | tuple) else value

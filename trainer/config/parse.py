"""Parse the command line and its config files into a `Config`, and write a `Config` as YAML.

jsonargparse converts and checks the types. Options are checked before, to suggest the right name for a wrong one.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser

from regraft.command_line import is_dataset, join_values
from regraft.contract import own_version
from regraft.files import CONFIGS
from trainer.config.config_files import insert_configs
from trainer.config.dump import dump
from trainer.config.help import describe_type, help_text, help_topic
from trainer.config.options import COMMAND_LINE, OPTIONS, add_brackets, check_option, keys
from trainer.config.schema import Config
from trainer.errors import UserError

__all__ = ["QUICKSTART", "dump", "keys", "parse"]

_OTHER_DASHES = re.compile("-?[\u2010-\u2015\u2212\uff0d][-\u2010-\u2015\u2212\uff0d]*")
"""Dashes that a text program or a web page has put in the place of hyphens."""
QUICKSTART = CONFIGS / "quickstart.yaml"


def parse(argv: Sequence[str]) -> Config:
    """Return the config of a command line.

    Later options win: of two config files the second, and an option after a config file. `--help` and
    `--print_config` print and raise SystemExit(0).

    Raises:
        UserError: an unknown option, a wrong type, or an invalid value; the message names the option.

    """
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text(f"configs/{QUICKSTART.name}", help_topic(argv)))
    if "--version" in argv:
        _print_and_exit(f"regraft {own_version()}")
    words = normalize(argv)
    if not any(word.startswith(("--config=", "--data.root=")) for word in words):
        words.insert(0, f"--config={QUICKSTART}")
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config)
    try:
        values = parser.instantiate(parser.parse_args(insert_configs(words)))
    except ArgumentError as error:
        raise UserError(_rephrase(str(error))) from None
    config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
    if "--print_config" in argv:
        _print_and_exit(dump(config).rstrip())
    return config


def normalize(argv: Sequence[str]) -> list[str]:
    """Return the trainer's options as words `--option=value`, without `--print_config`.

    Raises:
        UserError: an unknown option, or several datasets.

    """
    words = [word for word in join_values(argv) if word != "--print_config"]
    words = ["--debug=true" if word == "--debug" else word for word in words]
    _check_options(words)
    return _name_dataset([_add_brackets(word) for word in words])


def split_command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line of a command into its own options and the trainer's, and print the help of a section."""
    if help_topic(argv):
        parse(argv)
    return parser.parse_known_args(argv)


def _print_and_exit(text: str) -> NoReturn:
    with suppress(BrokenPipeError):  # of `| head`
        print(text, flush=True)
    raise SystemExit(0)


def _check_options(words: Sequence[str]) -> None:
    for word in words:
        option, _, value = word.partition("=")
        if not word or (option == "--config" and "=" in word and not value):
            raise UserError(f"command line: {'an argument' if not word else '--config'} is empty; is a variable unset?")
        if dashes := _OTHER_DASHES.match(word):
            raise UserError(
                f"command line: {word} starts with another character than the hyphen of the keyboard; did you mean "
                f"--{word[dashes.end() :]}?"
            )
        if option in OPTIONS and is_dataset(word) and not Path(word).exists():
            raise UserError(f"command line: {word} is not a dataset: did you mean --{word}?")
        if option.startswith("-") and option != "--config":
            check_option(option.removeprefix("--"), value, COMMAND_LINE)


def _add_brackets(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option}{equals}{add_brackets(option.removeprefix('--'), value)}"


def _name_dataset(words: Sequence[str]) -> list[str]:
    """Return the command line with `--data.root=FOLDER` for `FOLDER`.

    Raises:
        UserError: there are several datasets, or the word is a config file.

    """
    datasets = [word for word in words if is_dataset(word)]
    named = [word.partition("=")[2] for word in words if word.startswith("--data.root=")]
    if datasets and len({*datasets, *named}) > 1:
        raise UserError(
            f"command line: {datasets[-1]!r} is not an option, and the dataset is {[*named, *datasets][0]!r}"
        )
    if datasets and datasets[0].endswith((".yaml", ".yml", ".json", ".toml")):
        raise UserError(f"command line: {datasets[0]} is not a dataset: did you mean --config {datasets[0]}?")
    return [f"--data.root={word}" if is_dataset(word) else word for word in words]


def _rephrase(message: str) -> str:
    """Return a message of jsonargparse in plain English."""
    option = re.match(r'Parser key "(.*?)"', message)
    value = re.search(r"Given value: (.*)\Z", message, re.DOTALL) or re.search(r"Got value: (.*)", message, re.DOTALL)
    if option is None or value is None or option[1] not in OPTIONS:
        return message
    text = value[1].strip()
    expected = describe_type(option[1])
    if expected.startswith("TEXT"):
        expected += "; a config file needs quotes around numbers and words such as yes and no"
    return f"option {option[1]} is {text[:200] or 'empty'}: expected {expected}"

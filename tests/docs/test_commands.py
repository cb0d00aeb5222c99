"""Every command that the documents show is read by the parser of the real command line, in this process.

tests/test_documents.py runs those that take seconds. Here no command does its work: its parser is the last thing that
runs. A verb or an option that does not exist, and a value of the wrong type, fail.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

import launch.cli
from regraft.contract import COMMAND
from tests.docs.pages import (
    CONFIGS,
    DEVELOPER_TOOLS,
    DOCUMENTS,
    LANGUAGES,
    REPOSITORY,
    blocks,
    commands,
    inline_code,
    name,
)
from trainer.config.options import OPTIONS
from trainer.config.parse import parse
from trainer.errors import UserError

TRAINER_FLAGS = {"--config", "--debug", "--print_config", "--help", "--version"}


class Parsed(Exception):
    """Raised when the parser of a command has read the command line."""

    def __init__(self, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
        super().__init__(words)
        self.parser = parser
        self.words = list(words)
        """Words that the parser has taken."""


class Executed(Exception):
    """Raised in place of the start of a program of the trainer."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(words)
        self.words = list(words[1:])


@contextmanager
def stopped_parsers(*, read: bool = True) -> Iterator[None]:
    """Make argparse raise `Parsed` in place of returning what it has read, or, without `read`, before it reads."""
    read_words = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, args: Sequence[str] | None, *, rest_allowed: bool) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        rest = read_words(parser, words)[1] if read else words
        if rest and read and not rest_allowed:
            parser.error(f"unrecognized arguments: {shlex.join(rest)}")
        raise Parsed(parser, without(words, rest))

    def execute(_: str, words: Sequence[str]) -> NoReturn:
        raise Executed(words)

    def known_args(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, _: object = None) -> NoReturn:
        stop(parser, args, rest_allowed=True)

    def all_args(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, _: object = None) -> NoReturn:
        stop(parser, args, rest_allowed=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", known_args)
        patch.setattr(argparse.ArgumentParser, "parse_args", all_args)
        patch.setattr(os, "execv", execute)
        patch.setenv(COMMAND, "regraft")
        yield


def without(words: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return words without the taken ones, each of which is taken once."""
    rest = list(words)
    for word in taken:
        rest.remove(word)
    return rest


def check_regraft(words: Sequence[str]) -> None:
    """Parse `regraft VERB ...`: the verb's own options, and the trainer's."""
    rest = list(words[1:])
    with stopped_parsers():
        try:
            code = launch.cli.main(words)
        except Parsed as parsed:
            rest = without(rest, parsed.words)
        except Executed as executed:
            check_program(executed.words[0], executed.words[1:])
            return
        else:
            pytest.fail(f"regraft {shlex.join(words)} ended with exit code {code}")
    parse_trainer_options(rest)


def check_program(program: str, words: Sequence[str]) -> None:
    """Parse the command line of a program of the trainer, given by its path."""
    path = (REPOSITORY / program).relative_to(REPOSITORY)
    assert (REPOSITORY / path).is_file(), program
    if path == Path("trainer/main.py"):
        parse_trainer_options(words)
        return
    module = import_module(".".join(path.with_suffix("").parts))
    with stopped_parsers():
        try:
            code = module.main(list(words))
        except Parsed as parsed:
            rest = without(words, parsed.words)
        else:
            pytest.fail(f"{program} {shlex.join(words)} ended with exit code {code}")
    parse_trainer_options(rest)


def parse_trainer_options(words: Sequence[str]) -> None:
    parse([word for word in words if word != "--print_config"])


def check_benchmark(words: Sequence[str]) -> None:
    module = import_module("benchmarks.__main__")
    with pytest.MonkeyPatch.context() as patch, stopped_parsers():
        patch.setattr(sys, "argv", ["benchmarks", *words])
        with pytest.raises(Parsed) as parsed:
            module.main()
    # The names of the benchmark and of its action come before what the last parser reads.
    assert not [word for word in without(words, parsed.value.words) if word.startswith("-")]


def check(words: Sequence[str]) -> None:
    """Parse a command of a document."""
    program, *arguments = [str(REPOSITORY / word) if word.startswith("configs/") else word for word in words]
    if program == "regraft":
        check_regraft(arguments)
    elif program == "salloc":
        check_regraft(arguments[arguments.index("regraft") + 1 :])
    elif program == "sbatch":
        (script,) = (word for word in arguments if word.startswith("slurm/"))
        assert (REPOSITORY / script).is_file(), script
        check_regraft(["submit", *without(arguments, [script])])
    elif [program, *arguments[:1]] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(arguments[1:])
        check_program(launched.training_script, launched.training_script_args)
    elif program == "torchrun":
        launched = torchrun_parser().parse_args(arguments)
        check_program(launched.training_script, launched.training_script_args)
    elif [program, *arguments[:2]] == ["python", "-m", "benchmarks"]:
        check_benchmark(arguments[2:])
    elif program == "python" and arguments[0] == "-m":
        check_program(arguments[1].replace(".", "/") + ".py", arguments[2:])
    elif program == "python":
        check_program(arguments[0], arguments[1:])
    else:
        assert program in DEVELOPER_TOOLS, f"unknown program: {shlex.join(words)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the config files and lists that the documents name."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "runs/NAME").mkdir(parents=True)
    for file in ("FILE", "F", "runs/NAME/config.yaml"):
        (folder / file).write_text("train: {batch_size: 8}\n", encoding="utf-8")
    (folder / "rates.txt").write_text("--optim.lr 1e-3\n--optim.lr 1e-4\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name)
def test_every_command_is_accepted_by_its_parser(
    document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for words in commands(document):
        try:
            check(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command",
    [
        "regraft tran FOLDER",
        "regraft train FOLDER --optim.rate 1",
        "regraft train FOLDER --nproc many",
        "regraft predict runs/NAME FOLDER --top 2",
        "regraft predict runs/NAME FOLDER --topk few",
        "regraft evaluate runs/NAME --data.cache_image off",
        "regraft compare FOLDER --strategies d2l --seed 3",
        "torchrun --nproc-per-node 2 trainer/other.py",
        "python -m benchmarks bars --pear 3",
    ],
)
def test_wrong_commands_are_found(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((AssertionError, SystemExit, UserError, pytest.fail.Exception)):
        check(shlex.split(command))


@cache
def own_parser(verb: str) -> argparse.ArgumentParser | None:
    """Return the parser of a verb's own options, if it has some."""
    with stopped_parsers(read=False):
        try:
            launch.cli.main([verb])
        except Parsed as parsed:
            return parsed.parser
        except Executed as executed:
            path = Path(executed.words[0]).relative_to(REPOSITORY)
        if path == Path("trainer/main.py"):
            return None
        with pytest.raises(Parsed) as raised:
            import_module(".".join(path.with_suffix("").parts)).main([])
    return raised.value.parser


def option_names(verb: str) -> frozenset[str]:
    parser = own_parser(verb)
    return frozenset(parser._option_string_actions if parser else ())


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert launch.cli.main(["--help"]) == 0
    assert launch.cli.main(["completion", "--help"]) == 0
    texts = [capsys.readouterr().out]
    parsers = [own_parser(verb) for verb in launch.cli.VERBS if verb not in ("completion", "debug")]
    texts += [parser.format_help() for parser in parsers if parser is not None]
    assert len(texts) == len(parsers) + 1
    assert [line for text in texts for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name)
def test_options_of_commands_within_sentences_exist(document: Path) -> None:
    for command in inline_code(document):
        words = command.split()
        if words[:1] != ["regraft"] or len(words) < 2 or not re.fullmatch(r"[a-z-]+", words[1]):
            continue
        for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            known = option in option_names(words[1]) | TRAINER_FLAGS or option.removeprefix("--") in OPTIONS
            assert known, command


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_blocks_have_a_known_language(document: Path) -> None:
    assert {language for language, _ in blocks(document)} <= LANGUAGES, "commands are in blocks of the language sh"

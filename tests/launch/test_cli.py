import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.errors import LaunchError
from tests.launching import REPOSITORY

HEAVY = {"torch", "torchvision", "accelerate", "trainer", "rich", "numpy", "jsonargparse"}


def test_starting_imports_nothing_that_is_slow() -> None:
    program = "import sys, launch.cli, launch.local; print(*{name.split('.')[0] for name in sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "launch" in found
    assert not HEAVY & set(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fly"], "there is no verb 'fly'"),
        (["status", "/nowhere/at all"], "/nowhere/at all: there is no such folder"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {expected}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["train", "--nproc", "0"], ["train", "--nproc=x"], ["train", "--max-restarts", "-1"]]
)
def test_wrong_numbers_are_refused_before_anything_is_started(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    assert leaving.value.code == 2
    assert "expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "status", "debug"])
def test_every_verb_has_help(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", verb, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: " in done.stdout


@pytest.mark.parametrize(
    ("verb", "program", "words"),
    [
        ("debug", "main.py", ["--a", "b", "--debug"]),
        ("preview", "commands/preview.py", ["--a", "b"]),
        ("lr-find", "commands/lr_find.py", ["--a", "b"]),
        ("compare", "commands/compare.py", ["--a", "b"]),
    ],
)
def test_a_verb_of_the_trainers_becomes_its_program(
    verb: str, program: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[list[str]] = []

    def execv(_: str, command: list[str]) -> None:
        became.append(command)
        raise LaunchError("the end of this process")

    monkeypatch.setattr(os, "execv", execv)
    assert cli.main([verb, "--a", "b"]) == 2
    assert became == [[sys.executable, str(REPOSITORY / "trainer" / program), *words]]
    assert Path(became[0][1]).is_file()

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch import cli, completion
from launch.errors import LaunchError
from launch.interrupts import Interrupted, interruptible
from launch.slurm.settings import OPTION_NAMES
from regraft import startup_signals
from regraft.startup_signals import STOP_SIGNALS
from tests.launch.helpers import restored_handlers
from tests.launching import REPOSITORY, attempt

SLOW_IMPORTS = {"torch", "torchvision", "accelerate", "trainer", "rich", "numpy", "jsonargparse"}


def test_launcher_starts_without_slow_imports() -> None:
    program = "import sys, launch.cli, launch.local.run; print(*{name.split('.')[0] for name in sys.modules})"
    imported = subprocess.check_output([sys.executable, "-c", program], cwd=REPOSITORY, text=True).split()
    assert "launch" in imported
    assert not SLOW_IMPORTS & set(imported)


def test_wrong_arguments_are_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        (["fly"], "there is no command 'fly'; expected train, debug, "),
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["status", "/nowhere/at all"], "/nowhere/at all: there is no such folder"),
        (["completion", "fish"], "completion for 'fish': expected bash or zsh"),
    ):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {expected}")
        assert error.count("\n") == 1


@pytest.mark.parametrize("argv", ["train --nproc 0", "train --max-restarts -1", "doctor --nodes x", "doctor --nproc"])
def test_wrong_numbers_are_refused_before_anything_is_started(
    argv: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv.split())
    assert exit_.value.code == 2
    assert "expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_signal_ends_a_command_with_one_sentence_and_a_second_one_does_not_interrupt_its_clean_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned_up: list[str] = []

    def wait(argv: list[str]) -> int:
        try:
            signal.raise_signal(signal.Signals[argv[0]])
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned_up.append(argv[0])
        return 0

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for verb, name, after_stop in (
        ("train", "SIGTERM", "training had not started, and there was nothing to save. Run the same command again"),
        ("submit", "SIGINT", "nothing was submitted. Run the same command again"),
        ("doctor", "SIGUSR1", "all its processes and files are removed. Run the same command again"),
        ("render", "SIGHUP", "run the same command again"),
    ):
        monkeypatch.setitem(cli.VERBS, verb, wait)
        assert cli.main([verb, name]) == 75
        assert capsys.readouterr().err == f"stopped by {name}: {after_stop}\n"
    assert cleaned_up == ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers, "restored"


def test_later_signal_raises_again_and_one_at_the_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping:
        def __del__(self) -> None:
            with suppress(KeyboardInterrupt):  # as Python does in a destructor
                signal.raise_signal(signal.SIGTERM)

    now = 5.0

    def stop_twice() -> None:
        nonlocal now
        Dropping()
        signal.raise_signal(signal.SIGINT)  # may be the same key press
        now += 1.0
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(Interrupted, match="SIGINT"), interruptible():
        stop_twice()
    assert now == 6.0

    def restore(previous: object) -> object:
        signal.raise_signal(signal.SIGTERM)  # its handler is still that of the block at the first call
        return previous

    with restored_handlers(*STOP_SIGNALS):
        signal.signal(signal.SIGTERM, lambda *_: None)
        monkeypatch.setattr(startup_signals, "handler_after_command", restore)
        monkeypatch.setitem(cli.VERBS, "render", lambda _: 3)
        assert cli.main(["render"]) == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"regraft \S+\n", capsys.readouterr().out)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    listed = re.findall(r"^  (\S+)  +\S", capsys.readouterr().out, flags=re.M)
    assert sorted(listed) == sorted([*cli.VERBS, *cli.VERBS])


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", ["--nproc", "--max-restarts", "--optim.lr"]),
        ("doctor", ["--nodes", "--nproc", "--json"]),
        ("submit", [*OPTION_NAMES, "--gpus-per-node", "--site", "--array", "--no-fetch"]),
        ("render", [*OPTION_NAMES, "--gpus-per-node", "--site", "--array"]),
    ],
)
def test_help_of_a_verb_lists_its_options(verb: str, options: list[str]) -> None:
    command = [sys.executable, "-m", "launch.cli", verb, "--help"]
    help_ = subprocess.check_output(command, cwd=REPOSITORY, text=True)
    assert "usage: " in help_
    assert all(option in help_ for option in options)


def test_verbs_of_the_trainer_replace_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def execv(_: str, command: list[str]) -> None:
        commands.append(command)
        raise LaunchError("the end of this process")

    monkeypatch.setattr(os, "execv", execv)
    for verb, program, options in (
        ("debug", "main.py", ["--debug"]),
        ("check", "commands/check.py", []),
        ("preview", "commands/preview.py", []),
        ("lr-find", "commands/lr_find.py", []),
        ("compare", "commands/compare.py", []),
        ("evaluate", "commands/evaluate.py", []),
        ("export", "commands/export.py", []),
        ("report", "commands/report.py", []),
    ):
        assert cli.main([verb, "--a", "b"]) == 2
        assert commands[-1] == [sys.executable, str(REPOSITORY / "trainer" / program), "--a", "b", *options]
        assert Path(commands[-1][1]).is_file()


def complete(argv: list[str], folder: Path) -> list[str]:
    """Return the completions that bash offers for the last argument."""
    options = {"train": ["--nproc", "--optim.lr", "--optim.name"], "status": ["--watch"]}
    program = completion.render_script("bash", options, {"--optim.name": ["sgd", "adamw"]})
    program += "_REGRAFT_MODELS='resnet18 resnet50 alexnet'"  # otherwise asked for once
    program += """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_regraft regraft "${@: -1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    command = ["bash", "-c", program, "bash", "regraft", *argv]
    output = subprocess.check_output(command, cwd=folder, stderr=subprocess.STDOUT, text=True)
    return sorted(output.split("\n")[:-1])


def test_bash_completes_verbs_options_and_files(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    for argv, expected in (
        (["t"], ["train"]),
        ([""], ["status", "train"]),
        (["train", "--optim"], ["--optim.lr", "--optim.name"]),
        (["train", "--nproc", "2", "--n"], ["--nproc"]),
        (["status", "--"], ["--watch"]),
        (["train", "--optim.name", "a"], ["adamw"]),
        (["train", "--optim.name", "=", "s"], ["sgd"]),
        (["train", "--optim.name", "="], ["adamw", "sgd"]),
        (["train", "--model.name", "resnet"], ["resnet18", "resnet50"]),
        (["train", "--config", "a"], ["a file"]),
        (["status", "a f"], ["a file"]),
        (["fly", "--"], [""]),
    ):
        assert complete(argv, tmp_path) == expected


def test_completion_script_has_every_verb_and_the_trainers_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    for verb in cli.VERBS:
        assert f"    {verb}) options=" in script
    for option in ("--max-restarts", "--gpus-per-node", "--json", "--watch", "--transfer.batch_norm"):
        assert option in script
    assert "    --optim.schedule) values='constant cosine one-cycle' ;;" in script
    assert "    --transfer.strategy) values='d2l from-scratch" in script
    assert "resnet18" in completion.models()
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == f"autoload -U +X bashcompinit && bashcompinit\n{script}"


STATUS = f"{sys.executable} -m launch.cli status RUN"


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        (f"{STATUS} >&-", 0, ""),
        (f"{STATUS} >&- <&-", 0, ""),
        (f"{STATUS} | true", 0, ""),
        (f"{STATUS} > /dev/full", 1, "error: standard output cannot be written (No space left on device)\n"),
        (f"PYTHONIOENCODING=ascii {STATUS} > /dev/null", 0, ""),
    ],
)
def test_standard_output_may_be_closed_or_broken(command: str, code: int, error: str, tmp_path: Path) -> None:
    run = tmp_path / "café 图"
    (run / "attempts").mkdir(parents=True)
    (run / "attempts" / "0001.json").write_text(attempt(1, "done").to_json())
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = ["bash", "-c", command.replace("RUN", f"'{run}'")]
    done = subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, error)

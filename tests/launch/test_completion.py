import subprocess
from pathlib import Path

import pytest

from launch import cli, completion
from launch.completion import script
from launch.errors import LaunchError

VERBS = {"train": ["--nproc", "--optim.lr", "--optim.name"], "status": ["--watch"]}


def completed(words: list[str], folder: Path) -> list[str]:
    """Return what bash offers for the last of these words."""
    program = (
        script("bash", VERBS)
        + """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_regraft regraft "${@: -1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", "regraft", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return sorted(done.stdout.split("\n")[:-1])


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["t"], ["train"]),
        ([""], ["status", "train"]),
        (["train", "--optim"], ["--optim.lr", "--optim.name"]),
        (["train", "--nproc", "2", "--n"], ["--nproc"]),
        (["status", "--"], ["--watch"]),
        (["status", "a f"], ["a file"]),
        (["fly", "--"], [""]),
    ],
)
def test_bash_offers_verbs_options_and_files(words: list[str], offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert completed(words, tmp_path) == offered


def test_the_real_script_knows_every_verb_and_the_trainers_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for verb in cli._VERBS:
        assert f"    {verb}) options=" in text
    for option in ("--max-restarts", "--gpus-per-node", "--json", "--watch", "--transfer.batch_norm"):
        assert option in text
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out == f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def test_another_shell_is_refused() -> None:
    with pytest.raises(LaunchError, match="expected bash or zsh"):
        script("fish", VERBS)
    assert completion.SHELLS == ("bash", "zsh")

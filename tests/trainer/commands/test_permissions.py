"""Files and folders without permission: predict, evaluate and export end with one sentence, and lose nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.contract import CONFIG, CONFIG_HEADER
from tests.folders import noise_image
from tests.permissions import file_permissions_apply
from tests.trainer.inference.models import CLASSES, write_images, write_model_file
from trainer.commands import evaluate, export, predict
from trainer.config.parse import dump, parse

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "predict": predict.main,
    "evaluate": evaluate.main,
    "export": export.main,
}
NOTHING, READ = 0o000, 0o555
DENIED = "Permission denied"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, a dataset, a CSV of images, and folders to write to."""
    root = tmp_path_factory.mktemp("permissions")
    for name in CLASSES:
        write_images(root / "data" / name, 2)
    (root / "list.csv").write_text("path\ndata/ant/000.png\n", encoding="utf-8")
    for folder in ("run", "out", "sorted"):
        (root / folder).mkdir(parents=True)
    (root / "out" / "begun.csv.partial").touch()
    write_model_file(root / "run" / "model.safetensors")
    config = parse(["--model.name=shufflenet_v2_x0_5", "--data.root=data"])
    (root / "run" / CONFIG).write_text(CONFIG_HEADER + dump(config), encoding="utf-8")
    return root


@pytest.fixture
def workplace(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder, which is the working folder."""
    shutil.copytree(original, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


EXPORT = "export run --to torch-export --verify-data data"
CASES = (
    # command, path without permission, its mode, message
    ("predict run data/ant/000.png", "data/ant/000.png", NOTHING, "none of the 1 images can be read"),
    ("predict run data/ant/000.png", "data/ant", NOTHING, f"data/ant/000.png: {DENIED}"),
    ("predict run data", "data", NOTHING, f"data: the folder cannot be read ({DENIED})"),
    ("predict run data", "data/ant", NOTHING, f"data/ant: the folder cannot be read ({DENIED})"),
    ("predict run list.csv", "list.csv", NOTHING, f"list.csv: the file cannot be read ({DENIED})"),
    ("predict run out/list.csv", "out", NOTHING, f"out/list.csv: {DENIED}"),
    ("predict run data", "run", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    ("predict run/model.safetensors data", "run", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    ("predict run data", "run/model.safetensors", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    ("predict run data --output out/x.csv", "out", READ, f"--output out/x.csv: cannot be written ({DENIED})"),
    ("predict run data --output out/x.csv", "out", NOTHING, f"--output out/x.csv: cannot be written ({DENIED})"),
    ("predict run data --output out/begun.csv", "out/begun.csv.partial", NOTHING, f"cannot be written ({DENIED})"),
    ("predict run data --sort-into out/x", "out", READ, f"out/x: the folder cannot be created ({DENIED})"),
    ("predict run data --sort-into sorted", "sorted", READ, "cannot be written to sorted/"),
    ("evaluate run", "run", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    ("evaluate run", "run/config.yaml", NOTHING, f"run/config.yaml: cannot be read ({DENIED})"),
    ("evaluate run data", "run/model.safetensors", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    ("evaluate run data", "data", NOTHING, f"data: the folder cannot be read ({DENIED})"),
    ("evaluate run data", "data/ant", NOTHING, f"data/ant: the folder cannot be read ({DENIED})"),
    ("evaluate run list.csv", "list.csv", NOTHING, f"list.csv: the file cannot be read ({DENIED})"),
    ("evaluate run data", "run", READ, f"--output run/evaluation: cannot be written to ({DENIED})"),
    ("evaluate run data --output out", "out", READ, f"--output out: cannot be written to ({DENIED})"),
    ("evaluate run data --output out/x", "out", NOTHING, f"--output out/x: cannot be written to ({DENIED})"),
    ("evaluate run data --output out --calibrate --store", "run", READ, "--store: run cannot be written to"),
    ("evaluate run data --unknown out/x", "out", NOTHING, f"out/x: cannot be read ({DENIED})"),
    ("evaluate run data --unknown out", "out", NOTHING, f"out: the folder cannot be read ({DENIED})"),
    (EXPORT, "run/model.safetensors", NOTHING, f"run/model.safetensors: cannot be read ({DENIED})"),
    (EXPORT, "data", NOTHING, "data"),
    (EXPORT, "data/ant", NOTHING, f"data/ant: the folder cannot be read ({DENIED})"),
    (EXPORT, "run", READ, f"--output run/model.pt2: cannot be written ({DENIED}). Nothing was written"),
    (f"{EXPORT} --output out/x.pt2", "out", NOTHING, f"--output out/x.pt2: cannot be written ({DENIED})"),
    (f"{EXPORT} --output out/x/x.pt2", "out", READ, f"--output out/x/x.pt2: its folder cannot be created ({DENIED})"),
    ("export run --to torch-export", "run/config.yaml", NOTHING, "config.yaml"),
)  # fmt: skip


@pytest.mark.parametrize(("command", "locked", "mode", "message"), CASES)
def test_a_missing_permission_is_one_sentence_and_loses_nothing(
    command: str, locked: str, mode: int, message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = command.split()
    before, path = content(workplace), workplace / locked
    previous = path.stat().st_mode
    path.chmod(mode)
    try:
        with file_permissions_apply():
            code = COMMANDS[name](words)
    finally:
        path.chmod(previous)
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), printed
    assert message in errors[0]
    assert DENIED in printed
    assert "Traceback" not in printed
    assert content(workplace) == before


def test_an_image_without_permission_is_named_and_the_others_are_predicted_and_evaluated(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(9).save(workplace / "data" / "ant" / "locked.png")
    (workplace / "data" / "ant" / "locked.png").chmod(NOTHING)
    with file_permissions_apply():
        assert predict.main(["run", "data/ant"]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert evaluate.main(["run", "data", "--output", "out"]) == 0
    assert rows[1].startswith("data/ant/000.png,")
    assert rows[3] == f"data/ant/locked.png,,,cannot be opened ({DENIED})"
    printed = capsys.readouterr().out
    assert f"images cannot be read and are left out:\n  data/ant/locked.png: cannot be opened ({DENIED})" in printed

"""What is imported before the first step: PyTorch's packages take 3 seconds, and little may be added to them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folders import image_folder
from trainer.commands import run_folder
from trainer.config import resolve

PACKAGES = frozenset(
    {"PIL", "_pillow_heif", "docstring_parser", "jsonargparse", "pillow_heif", "platformdirs", "pooch", "rich"}
    | {"safetensors", "simplejpeg", "typeshed_client", "torch", "torchvision", "numpy", "trainer", "regraft"}
    | {"attr", "attrs", "xxhash"}  # which rich and pooch import if they are installed
)
"""Packages of which start-up imports modules that torch, torchvision and accelerate do not import by themselves."""
TO_THE_FIRST_STEP = """
import sys
import torch, torchvision, accelerate
before = set(sys.modules)
import json
from trainer import train_run
from trainer.main import main

def fit(state, batches, *args, **named):
    next(batches)
    added = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
    print(json.dumps(sorted(added)), file=open("modules.json", "w"))
    raise KeyboardInterrupt

train_run.fit = fit
sys.exit(main(sys.argv[1:]))
"""
ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("data", "--model.name=squeezenet1_1", "--model.weights=null", "--data.image_size=64", "--run.threads=1")


def test_start_up_imports_little_besides_pytorch_and_the_default_folder_is_known_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "data", {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})
    done = subprocess.run(
        [sys.executable, "-c", TO_THE_FIRST_STEP, *OPTIONS, f"--data.cache={tmp_path / 'cache'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    added = json.loads((tmp_path / "modules.json").read_text())
    packages = {name.split(".")[0] for name in added}
    assert {name for name in packages if not name.startswith("_cython_")} <= PACKAGES
    assert [name for name in added if name.startswith("torch.")] == []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "resolve", lambda config: pytest.fail("needs torch"))
    assert run_folder.main([*OPTIONS, f"--data.cache={tmp_path / 'cache'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/default\n"


def test_the_launcher_imports_no_torch() -> None:
    modules = "launch.cli, launch.local.run, launch.trainer_options, trainer.commands.run_folder"
    code = f"import sys, {modules}; print([name for name in ('torch', 'accelerate', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_working_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    script = f'cd "$1" && rmdir "$1" && PYTHONPATH={ROOT} exec {sys.executable} -m regraft status'
    done = subprocess.run(["sh", "-c", script, "sh", tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: the working folder was deleted or moved: change to another one (cd)\n",
    )

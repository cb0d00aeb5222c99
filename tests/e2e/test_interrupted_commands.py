"""Every command is interrupted at random moments: it ends soon, with one sentence, and leaves nothing behind.

`pytest -m soak -s tests/e2e/test_interrupted_commands.py` prints each try.
"""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import runs
from tests.folders import image_folder
from tests.launch.helpers import executable
from tests.launching import MAIN, REPOSITORY, once

TRIES = 4
SECONDS_TO_STOP = 25.0
"""Of a loaded machine: the import of torch, which is not interrupted, takes most of it."""
REGRAFT = [sys.executable, "-m", "regraft"]
SMALL = [
    *("--model.name=resnet18", "--model.weights=null", "--data.image_size=32", "--run.threads=1"),
    *("--train.batch_size=4", "--data.num_workers=1", "--train.precision=fp32", "--train.channels_last=true"),
]
COMMANDS = {
    "train": ["train", "data", "--run.dir=out", "--train.epochs=4", *SMALL],
    "train on two processes": ["train", "data", "--nproc=2", "--run.dir=out", "--train.epochs=3", *SMALL],
    "debug": ["debug", "data", "--run.dir=out", "--train.epochs=2", *SMALL],
    "doctor": ["doctor", "data", "--run.dir=out/run", *SMALL],
    "check": ["check", "data", "--json=out/check.json", "--html=out/check.html"],
    "check --model": ["check", "data", "--model=run", "--html=out/check.html", "--exclude-csv=out/exclude.csv"],
    "preview": ["preview", "data", "--output=out/preview.png", *SMALL],
    "submit": ["submit", "data", "--run.dir=out/run", *SMALL],
    "render": ["render", "data", *SMALL],
    "status": ["status", "run"],
    "report": ["report", "run", "--output=out/report.html"],
    "predict": ["predict", "run", "data", "--output=out/predictions.csv", "--batch-size=4"],
    "predict in two processes": ["predict", "run", "data", "--output=out/predictions.csv", "--nproc=2"],
    "evaluate": ["evaluate", "run", "data", "--output=out/evaluation", "--calibrate", "--store"],
    "export to onnx": ["export", "run", "--to=onnx", "--output=out/model.onnx"],
    "export to torch": ["export", "run", "--to=torch-export", "--output=out/model.pt2"],
    "export to hf": ["export", "run", "--to=hf", "--output=out/hf"],
    "lr-find": ["lr-find", "data", "--run.dir=out", "--steps=20", *SMALL],
    "compare": ["compare", "data", "--strategies=d2l,head-only", "--seeds=1", "--run.dir=out", *SMALL],
    "completion": ["completion", "bash"],
}
WITHOUT_REGRAFT = "python trainer/main.py"
LEFTOVER = re.compile(r"\.tmp$|^\.writing|^\.regraft-doctor|\.[0-9a-f]{8}$")
FROM_LIBRARIES = {"torchinductor_root", ".ses"}
"""Files of torch and onnxruntime in TMPDIR."""


def trained(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset, the run of a model, and an sbatch."""

    def make(folder: Path) -> None:
        splits = {name: {"a": 9, "b": 7, "c": 6} for name in ("train", "val", "test")}
        image_folder(folder / "data", splits, seed=7)
        command = [*REGRAFT, "train", str(folder / "data"), f"--run.dir={folder / 'run'}", "--train.epochs=1", *SMALL]
        runs.finish(command, folder / "run")
        executable(folder / "bin" / "sbatch", "echo 42")

    return once(factory, "trained", make)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    return runs.ON_CPU | path | {"TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1"}


def leftovers(folder: Path) -> Iterator[Path]:
    yield from (path for path in (folder / "tmp").iterdir() if path.name not in FROM_LIBRARIES)
    yield from (path for path in (folder / "out").rglob("*") if LEFTOVER.search(path.name))
    for path in Path("/dev/shm").glob("torch_*"):
        if not Path(f"/proc/{path.name.split('_')[1]}").exists():
            yield path


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*COMMANDS, WITHOUT_REGRAFT])
def test_command_that_is_interrupted_at_any_moment_says_so_and_leaves_nothing(
    name: str, tmp_path: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [*REGRAFT, *COMMANDS[name]] if name in COMMANDS else [sys.executable, str(MAIN), *COMMANDS["train"][1:]]
    shutil.copytree(trained(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    folder, random_, seconds = tmp_path / "out" / "run", random.Random(name), 0.0
    for number in range(-1, TRIES):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if not any(word == "--run.dir=out" for word in words):
            (tmp_path / "out").mkdir()
        began = time.monotonic()
        with runs.start(words, folder, environment=environment, logs=tmp_path) as run:
            if number == -1:  # not interrupted, for its duration
                run.end(code=0, seconds=300)
                seconds = time.monotonic() - began
                continue
            while run.process.poll() is None and not runs.handles_signal(run.process.pid, signal.SIGTERM):
                time.sleep(0.001)  # Python's own start
            sent_signal = random_.choice(["SIGINT", "SIGINT", "SIGTERM", "SIGHUP"])
            delay = random_.random() * seconds
            send, pause = random_.choice([os.kill, os.killpg]), random_.choice([None, None, 0.05, 1.5])
            time.sleep(delay)
            sent = time.monotonic()
            for wait in (0.0, pause):
                if wait is not None:
                    time.sleep(wait)
                    with suppress(ProcessLookupError):
                        send(run.process.pid, signal.Signals[sent_signal])
            code = run.process.wait(SECONDS_TO_STOP)
            took = time.monotonic() - sent
            run.assert_gone(5)
            last = (run.output.strip().splitlines() or [""])[-1]
            moment = f"{sent_signal} {pause or ''} after {delay:.1f} of {seconds:.1f} s"
            print(f"{name}: {moment}: exit code {code} after {took:.1f} s: {last}")
        for word in ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error"):
            assert word not in run.output, run.output
        if code != 0:
            assert code in {75, 130}
            assert re.match(r"(stopped by|stopped before|interrupted|killed by)\b.*[a-z)]$", last), run.output
        if code != 130:  # a second Ctrl-C kills the processes; the next start removes what they were writing
            assert list(leftovers(tmp_path)) == []
        if number == TRIES - 1 and code != 0:
            with runs.start(words, folder, environment=environment, logs=tmp_path) as run:
                run.end(code=0, seconds=300)  # it goes on, or starts over

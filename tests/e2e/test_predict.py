"""`regraft predict` that is stopped or killed: what it leaves is valid, and the same command goes on."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs
from tests.launching import REPOSITORY, once, run
from tests.trainer.inference.models import write_images, write_model_file

IMAGES = 400


@pytest.fixture
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model file and images, which no test writes into."""

    def make(folder: Path) -> None:
        write_model_file(folder / "model.safetensors")
        originals = write_images(folder / "originals", 12)
        (folder / "photos").mkdir()
        for number in range(IMAGES):
            original = originals[number % 12]
            (folder / "photos" / f"{number:04}{original.suffix}").symlink_to(original)

    return once(tmp_path_factory, "predict", make)


def command(workplace: Path, *words: object) -> list[str]:
    program = [sys.executable, REPOSITORY / "trainer/commands/predict.py", workplace / "model.safetensors"]
    return [str(word) for word in (*program, workplace / "photos", "--batch-size=2", *words)]


def saved_rows(output: Path) -> int:
    try:
        return output.with_name(f"{output.name}.partial").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


def read(output: Path) -> list[dict[str, str]]:
    with output.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_processes"),
    [
        ("SIGINT", 1),
        ("SIGKILL", 2),
        pytest.param("SIGTERM", 2, marks=pytest.mark.soak),
        pytest.param("SIGKILL", 1, marks=pytest.mark.soak),
    ],
)
def test_the_same_command_goes_on_after_a_stop_or_a_kill(
    name: str, num_processes: int, workplace: Path, tmp_path: Path
) -> None:
    output, folder = tmp_path / "x.csv", tmp_path / "sorted"
    words = command(workplace, "--output", output, "--sort-into", folder, "--nproc", num_processes)
    with runs.start(words, tmp_path / "none") as started:
        started.wait(lambda: saved_rows(output) >= 40, "the first rows")
        os.kill(started.process.pid, signal.Signals[name])
        text = started.end(code=-signal.SIGKILL if name == "SIGKILL" else 75)
    assert "Traceback" not in text
    saved = saved_rows(output)
    assert 40 <= saved < IMAGES
    if name == "SIGKILL":
        assert not output.exists()
    else:
        assert f"stopped by {name}: saved at image {saved} of {IMAGES}. With --output, the same command goes" in text
        assert len(read(output)) == saved
    text = run(words, cwd=tmp_path)
    assert f"going on after {saved} images" in text
    assert f"{IMAGES - saved} images in " in text
    rows = read(output)
    assert [Path(row["path"]).name for row in rows] == sorted(path.name for path in (workplace / "photos").iterdir())
    assert not output.with_name("x.csv.partial").exists()
    assert sum(path.is_file() for path in folder.rglob("*")) == IMAGES
    assert not list(folder.rglob("*.tmp"))
    if num_processes == 1:
        run(command(workplace, "--output", tmp_path / "y.csv"), cwd=tmp_path)
        assert (tmp_path / "y.csv").read_bytes() == output.read_bytes(), "an interruption changes a bit"


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_the_same_command_goes_on(workplace: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.csv"
    words = command(workplace, "--output", output, "--nproc", 2)
    with runs.start(words, tmp_path / "none") as started:
        started.wait(lambda: saved_rows(output) >= 40, "the first rows")
        worker = next(pid for pid in runs.children(started.process.pid) if "spawn_main" in cmdline(pid))
        os.kill(worker, signal.SIGKILL)
        text = started.end(code=2)
    assert "one of the processes has ended (signal 9)" in text
    assert "Traceback" not in text
    run(words, cwd=tmp_path)
    assert len(read(output)) == IMAGES


def cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")


@pytest.mark.slow
def test_a_reader_that_leaves_early_and_a_list_on_standard_input(workplace: Path, tmp_path: Path) -> None:
    words = command(workplace)
    words[3:4] = ["-"]
    names = sorted(map(str, (workplace / "photos").iterdir()))
    pipe = ["bash", "-c", '"$@" | head -n 4', "bash", *words]
    done = subprocess.run(pipe, input="\n".join(names), capture_output=True, text=True, check=True)
    assert [row["path"] for row in csv.DictReader(done.stdout.splitlines())] == names[:3]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import REPOSITORY
from trainer.run import atomic
from trainer.run.atomic import remove_leftovers, sync_folder, write_atomically, write_text_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "x", "one")
    write_text_atomically(tmp_path / "x", "zwei 图片\n")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "zwei 图片\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "x", "one")

    def fail(temporary: Path) -> None:
        temporary.write_text("tw")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", fail)
    assert (tmp_path / "x").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_and_its_name_are_on_the_disk_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def sync(handle: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")

    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        done.append(f"replace {path.name}")
        return replace(path, target)

    monkeypatch.setattr(atomic.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replaced)
    write_text_atomically(tmp_path / "x", "one")
    (temporary,) = {name.split()[1] for name in done if name.endswith(".tmp")}
    assert done == [f"sync {temporary}", f"replace {temporary}", f"sync {tmp_path.name}"]


def test_a_sync_leaves_no_handle_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        sync_folder(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from trainer.run.atomic import write_atomically\n"
        "def die(temporary):\n"
        "    temporary.write_text('tw')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), die)"
    )
    for _ in range(2):
        died = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "x.json"], cwd=REPOSITORY, check=False
        )
        assert died.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    kept = {"x.json", ".x.json", ".other.json.12ab.tmp", "x.json.12ab.tmp", ".x.json.12ab.text"}
    for name in kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "x.json")
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path, "*")
    assert {path.name for path in tmp_path.iterdir()} == kept - {".other.json.12ab.tmp"}
    remove_leftovers(tmp_path / "nowhere", "*")

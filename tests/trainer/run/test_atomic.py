import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import REPOSITORY
from trainer.run import atomic
from trainer.run.atomic import remove_leftovers, write_atomically, write_text_atomically


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError("disk full")

    write_text_atomically(tmp_path / "x", "one")
    handles = len(list(Path("/proc/self/fd").iterdir()))
    write_text_atomically(tmp_path / "x", "zwei 图片\n")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", fail)
    assert (tmp_path / "x").read_text(encoding="utf-8") == "zwei 图片\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert len(list(Path("/proc/self/fd").iterdir())) == handles, "the folder is closed again"


def test_file_and_folder_are_flushed_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def record_sync(handle: int) -> None:
        calls.append((Path(f"/proc/self/fd/{handle}").readlink().suffix, (tmp_path / "x").exists()))

    monkeypatch.setattr(atomic.os, "fsync", record_sync)
    write_text_atomically(tmp_path / "x", "one")
    assert calls == [(".tmp", False), ("", True)]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from trainer.run.atomic import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda temporary: (\n"
        "    temporary.write_text('ha'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "x.json"], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    kept = {"x.json", ".x.json", ".other.json.12ab.tmp", "x.json.12ab.tmp", ".x.json.12ab.text"}
    for name in kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "x.json")
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path, "*")
    assert {path.name for path in tmp_path.iterdir()} == kept - {".other.json.12ab.tmp"}
    remove_leftovers(tmp_path / "nowhere", "*")

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.checkpoint.checkpoints import (
    FILES,
    NEWER,
    OLDER,
    QUARANTINED,
    SCALER,
    check_equal,
    entry_names,
    load_latest,
    make_files,
    make_state,
    manifest_entries,
    tree,
    write,
)
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.checkpoint.store import LATEST, MANIFEST, METRICS, MODEL, STATE, STATISTICS
from trainer.errors import UserError


def test_checkpoint_round_trip(folder: Path) -> None:
    write(folder, OLDER)
    path, files = folder / OLDER.name, make_files(OLDER)
    assert json.loads((path / MANIFEST).read_bytes()) == {"format": 1, "files": manifest_entries(files)}
    assert (folder / LATEST).read_text() == f"{OLDER.name}\n"
    assert entry_names(folder) == {LATEST, OLDER.name}
    with pytest.raises(OSError, match="not empty"):  # a checkpoint is never replaced
        write(folder, OLDER, files=files | {METRICS: b"other"})
    loaded = store.read(path)
    check_equal(loaded, OLDER)
    saved = loaded.state_dict()
    assert int(saved["model"]["batches"]) == OLDER.step
    assert (saved["ema"], saved["step"], saved["epoch"], saved["scaler"]) == ({}, *OLDER, SCALER)
    assert set(loaded.batch_norm_statistics()) == {"0.running_mean"}
    del files[STATISTICS]
    write(folder, CheckpointId(5, 1), files=files | {STATE: make_state(5, 1).to_json(), METRICS: b""})
    loaded = store.read(folder / CheckpointId(5, 1).name)
    assert (loaded.metrics, loaded.batch_norm_statistics()) == ("", {})


def test_files_are_flushed_before_they_are_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was synchronized; of everything else, any part may be lost."""
    write(folder, OLDER)
    calls: list[str] = []

    def short(path: str | os.PathLike[str]) -> str:
        text = os.path.relpath(path, folder.parent)
        return re.sub(r"(?<=[-.])[0-9a-f]{8}(?=\.tmp|/|$)", "*", text)

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        size = f" of {os.fstat(handle).st_size}" if path.is_file() else ""
        calls.append(f"sync {short(path)}{size}")

    def recorded(call: str, original: Callable[..., None]) -> Callable[..., None]:
        def record(source: Path, target: Path, **options: Any) -> None:
            original(source, target, **options)
            calls.append(f"{call} {short(source)} {short(target)}")

        return record

    monkeypatch.setattr(os, "fsync", fsync)
    for call in ("rename", "replace"):
        monkeypatch.setattr(os, call, recorded(call, getattr(os, call)))
    monkeypatch.setattr(store.shutil, "rmtree", lambda path: calls.append(f"remove {short(path)}"))
    store.write(folder, NEWER, make_files(NEWER), check=lambda: calls.append("check"))
    store.prune(folder, [], check=lambda: calls.append("check"))
    temporary, latest = "checkpoints/.writing-step-00000004-epoch-0001-*", "checkpoints/.LATEST.*.tmp"
    manifest = len((folder / NEWER.name / MANIFEST).read_bytes())
    assert calls == [
        "sync .",
        *(f"sync {temporary}/{name} of {len(content)}" for name, content in make_files(NEWER).items()),
        f"sync {temporary}/{MANIFEST} of {manifest}",
        f"sync {temporary}",
        "check",
        f"rename {temporary} checkpoints/{NEWER.name}",
        "sync checkpoints",
        f"sync {latest} of {len(NEWER.name) + 1}",
        f"replace {latest} checkpoints/LATEST",
        "sync checkpoints",
        "check",
        f"rename checkpoints/{OLDER.name} checkpoints/.leaving-{OLDER.name}",
        f"remove checkpoints/.leaving-{OLDER.name}",
    ]


def test_an_attempt_without_the_lock_writes_and_removes_nothing(folder: Path) -> None:
    def refuse() -> None:
        if temporary := list(folder.glob(".writing-*")):
            assert entry_names(*temporary) == {*FILES, MANIFEST}, "the check comes last"
        raise UserError("another attempt has taken over this run")

    write(folder, CheckpointId(2, 0), OLDER)
    before = tree(folder)
    with pytest.raises(UserError, match="taken over"):
        store.write(folder, NEWER, make_files(NEWER), check=refuse)
    with pytest.raises(UserError, match="taken over"):
        store.prune(folder, [], check=refuse)
    assert tree(folder) == before


def test_prune_keeps_the_given_checkpoints_and_always_the_newest(folder: Path, tmp_path: Path) -> None:
    checkpoints = [CheckpointId(step, 1) for step in range(3, 7)]
    store.prune(folder, [], check=lambda: None)
    assert not folder.exists()
    write(folder, *checkpoints)
    write(tmp_path / "elsewhere", CheckpointId(2, 1))
    before = tree(tmp_path / "elsewhere")
    (folder / CheckpointId(2, 1).name).symlink_to(tmp_path / "elsewhere" / CheckpointId(2, 1).name)
    (folder / CheckpointId(1, 0).name).write_text("a file")
    (folder / QUARANTINED).mkdir()
    (folder / "notes").touch()
    checks: list[set[str]] = []
    store.prune(folder, [checkpoints[1], CheckpointId(99, 9)], check=lambda: checks.append(entry_names(folder)))
    kept = {checkpoints[1].name, checkpoints[3].name, LATEST, QUARANTINED, "notes"}
    assert entry_names(folder) == kept
    assert tree(tmp_path / "elsewhere") == before, "the link is removed, not its target"
    assert len(checks) == 4, "before each removal"


def test_a_folder_in_use_is_left_for_the_next_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    write(folder, OLDER, NEWER)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_remove", busy)
        store.prune(folder, [], check=lambda: None)
    assert store.list_checkpoints(folder) == [NEWER]
    store.clean_up(folder)
    assert entry_names(folder) == {NEWER.name, LATEST}


def test_clean_up_removes_leftovers_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    store.clean_up(folder)
    assert not folder.exists()
    write(folder, OLDER)
    (folder / QUARANTINED).mkdir()
    for name in ("notes", ".hidden", ".writing", ".leaving", ".LATEST", ".LATEST.tmp", "LATEST.1.tmp"):
        (folder / name).write_text(name)
    before, outside = tree(folder), tmp_path / "outside"
    write(outside, NEWER)
    for name in (".writing-step-00000004-epoch-0001-0badcafe", ".leaving-step-00000002-epoch-0000"):
        shutil.copytree(folder / OLDER.name, folder / name)
    (folder / ".LATEST.0badcafe.tmp").write_text("half")
    (folder / ".writing-link").symlink_to(outside)
    (folder / ".leaving-link").symlink_to(tmp_path / "nowhere")
    (folder / ".writing-file").touch()
    store.clean_up(folder)
    assert tree(folder) == before
    assert entry_names(outside) == {NEWER.name, LATEST}


# --- the newest valid checkpoint


def test_checkpoints_are_ordered_by_step_then_epoch(folder: Path) -> None:
    assert load_latest(folder) == (None, [])
    assert store.list_checkpoints(folder) == []
    write(folder, CheckpointId(5, 1), CheckpointId(6, 2), CheckpointId(6, 1), OLDER)
    (folder / "step-1").mkdir()
    assert store.list_checkpoints(folder) == [(6, 2), (6, 1), (5, 1), OLDER]
    check_equal(load_latest(folder)[0], CheckpointId(6, 2))


@pytest.mark.parametrize(
    "damage",
    [
        lambda latest, _: latest.unlink(),
        lambda latest, _: latest.write_text(f"{OLDER.name}\n"),
        lambda latest, _: latest.write_bytes(b"\xff\0" * 1000),
        lambda latest, _: os.truncate(latest, 1 << 40),
        lambda latest, elsewhere: (latest.unlink(), latest.symlink_to(elsewhere / "file")),
        lambda latest, elsewhere: (latest.unlink(), latest.symlink_to(elsewhere)),
        lambda latest, _: (latest.unlink(), os.mkfifo(latest)),
        lambda latest, _: (latest.unlink(), latest.mkdir()),
    ],
)
@pytest.mark.timeout(30)
def test_latest_is_repaired_and_never_followed(
    damage: Callable[[Path, Path], object], newer: Path, tmp_path: Path
) -> None:
    folder, elsewhere = newer.parent, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text(f"{NEWER.name}\n")
    before = tree(elsewhere)
    damage(folder / LATEST, elsewhere)
    was_folder = (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink()
    latest, lines = load_latest(folder)
    check_equal(latest, NEWER)
    assert not lines
    assert not (folder / LATEST).is_symlink()
    assert (folder / LATEST).read_text() == f"{NEWER.name}\n"
    assert entry_names(folder) - {"damaged-1-LATEST"} == {OLDER.name, NEWER.name, LATEST}
    assert (folder / "damaged-1-LATEST").is_dir() == was_folder
    assert tree(elsewhere) == before


def test_without_a_valid_checkpoint_the_damaged_ones_are_listed_and_one_can_be_repaired(newer: Path) -> None:
    folder = newer.parent
    valid = (newer / MANIFEST).read_bytes()
    for name in (NEWER.name, OLDER.name):
        (folder / name / MANIFEST).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="all checkpoints are damaged") as caught:
            load_latest(folder)
        assert f"damaged: damaged-1-{OLDER.name}, {QUARANTINED}. Repair one" in str(caught.value)
    write(folder, NEWER)
    (newer / MODEL).unlink()
    with pytest.raises(UserError, match=f"damaged-2-{NEWER.name}"):
        load_latest(folder)
    (folder / QUARANTINED / MANIFEST).write_bytes(valid)
    (folder / QUARANTINED).rename(newer)
    check_equal(load_latest(folder)[0], NEWER)


def test_a_checkpoint_that_cannot_be_read_now_is_not_quarantined(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    before = tree(newer.parent)
    monkeypatch.setattr(store, "_sha256", denied)
    with pytest.raises(PermissionError):
        load_latest(newer.parent)
    assert tree(newer.parent) == before

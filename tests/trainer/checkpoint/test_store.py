import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.checkpoint.checkpoints import INVALID, SCALER, edited, json_entries, make_files, make_state
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.checkpoint.store import LATEST, MANIFEST, METRICS, MODEL, OPTIMIZER, STATE, STATISTICS
from trainer.errors import UserError

FILES = (MODEL, OPTIMIZER, STATISTICS, STATE, METRICS)
OLDER, NEWER = CheckpointId(3, 1), CheckpointId(4, 1)
QUARANTINED = f"damaged-1-{NEWER.name}"


def write(folder: Path, *checkpoints: CheckpointId, files: Mapping[str, bytes] | None = None) -> None:
    for checkpoint in checkpoints:
        store.write(folder, checkpoint, files or make_files(checkpoint), check=lambda: None)


def load_latest(folder: Path) -> tuple[store.LoadedCheckpoint | None, list[str]]:
    """Return the newest valid checkpoint, and the lines that were logged."""
    lines: list[str] = []
    return store.load_latest(folder, log=lines.append), lines


def check_equal(loaded: store.LoadedCheckpoint | None, checkpoint: CheckpointId) -> None:
    assert loaded is not None
    assert (loaded.path.name, loaded.state) == (checkpoint.name, make_state(*checkpoint))
    files = make_files(checkpoint)
    assert {name: (loaded.path / name).read_bytes() for name in files} == files
    assert loaded.metrics.encode() == files[METRICS]


def tree(folder: Path) -> dict[str, object]:
    """Return everything below a folder: path -> content, target of a link, or kind."""
    entries: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            entries[name] = ("link", str(path.readlink()))
        else:
            entries[name] = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "special"
    return entries


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def manifest_entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the path of a run's checkpoints, which does not exist yet."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def newer(folder: Path) -> Path:
    """Return the newer of two checkpoints, to be damaged."""
    write(folder, OLDER, NEWER)
    return folder / NEWER.name


def test_checkpoint_round_trip(folder: Path) -> None:
    write(folder, OLDER)
    path, files = folder / OLDER.name, make_files(OLDER)
    assert json.loads((path / MANIFEST).read_bytes()) == {"format": 1, "files": manifest_entries(files)}
    assert (folder / LATEST).read_text() == f"{OLDER.name}\n"
    assert names(folder) == {LATEST, OLDER.name}
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
            assert names(*temporary) == {*FILES, MANIFEST}, "the check comes last"
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
    store.prune(folder, [checkpoints[1], CheckpointId(99, 9)], check=lambda: checks.append(names(folder)))
    kept = {checkpoints[1].name, checkpoints[3].name, LATEST, QUARANTINED, "notes"}
    assert names(folder) == kept
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
    assert names(folder) == {NEWER.name, LATEST}


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
    assert names(outside) == {NEWER.name, LATEST}


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
    assert names(folder) - {"damaged-1-LATEST"} == {OLDER.name, NEWER.name, LATEST}
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


# --- damage


def quarantine_reason(newer: Path) -> str:
    """Load the latest checkpoint, which must be the older one, and return why the newer one is quarantined."""
    folder, before = newer.parent, tree(newer)
    latest, (line,) = load_latest(folder)
    check_equal(latest, OLDER)
    assert (folder / LATEST).read_text() == f"{OLDER.name}\n"
    assert os.path.lexists(folder / QUARANTINED)
    assert not os.path.lexists(newer)
    assert tree(folder / QUARANTINED) == before
    match = re.fullmatch(rf"{re.escape(str(newer))} is damaged \((.*)\): quarantined as {QUARANTINED}", line)
    assert match, line
    assert match[1].isprintable()
    assert len(match[1]) < 1300, "200 characters, escaped"
    return match[1]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES: Mapping[str, Callable[[Path, random.Random], object]] = {
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "removed": lambda path, _: path.unlink(),
    "bit flipped": flip,
    "bytes appended": lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99))),
    "of the older checkpoint": lambda path, _: shutil.copy(path.parent.parent / OLDER.name / path.name, path),
    "another file": lambda path, rng: shutil.copy(
        path, path.with_name(rng.choice([f"{path.name}.1", f".{path.name}", "x", "\udcff", path.name.upper()]))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_loaded(damage: str, tmp_path: Path) -> None:
    rng = random.Random(damage)
    write(tmp_path / "valid", OLDER, NEWER)
    valid, newer = tree(tmp_path / "valid" / NEWER.name), tmp_path / "damaged" / NEWER.name
    for name in (*FILES, MANIFEST) * 3:
        shutil.rmtree(newer.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "valid", newer.parent)
        DAMAGES[damage](newer / name, rng)
        assert tree(newer) != valid, name
        reason = quarantine_reason(newer).lower()
        assert any(file.lower() in reason for file in (*FILES, MANIFEST, "'x'", r"\udcff")), name


def test_every_flipped_bit_of_a_manifest_and_another_name_are_detected(newer: Path) -> None:
    """The manifest covers the other files; nothing covers the manifest."""
    content = (newer / MANIFEST).read_bytes()
    with (newer / MANIFEST).open("r+b") as file:
        for position, value in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([value ^ 1 << bit]), position)
                with pytest.raises(store.CorruptCheckpoint):
                    store.read(newer)
            os.pwrite(file.fileno(), bytes([value]), position)
    store.read(newer)
    for checkpoint in (CheckpointId(4, 2), CheckpointId(5, 1), CheckpointId(10**8 + 3, 1)):
        newer = newer.rename(newer.with_name(checkpoint.name))
        with pytest.raises(store.CorruptCheckpoint, match="it holds the state after step 4 and 1 epochs"):
            store.read(newer)


# --- hostile files with a correct manifest


class TouchWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def replace_file(newer: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint; the manifest is correct for it, unless it is the manifest itself."""
    (newer / name).write_bytes(content)
    if name != MANIFEST:
        files = {file.name: file.read_bytes() for file in newer.iterdir() if file.name != MANIFEST}
        (newer / MANIFEST).write_bytes(manifest_of(manifest_entries(files)))


def manifest_of(files: object, **more: Any) -> bytes:
    return json.dumps({"format": 1, "files": files, **more}).encode()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["torch.save", "pickle 2", "pickle 5"])
def test_a_pickle_is_refused_and_not_executed(kind: str, name: str, newer: Path, tmp_path: Path) -> None:
    marker, file = tmp_path / "executed", io.BytesIO()
    content = {"weight": TouchWhenUnpickled(marker)}
    torch.save(content, file) if kind == "torch.save" else pickle.dump(content, file, int(kind[-1]))
    replace_file(newer, name, file.getvalue())
    assert name in quarantine_reason(newer)
    assert not marker.exists()
    file.seek(0)
    torch.load(file, weights_only=False) if kind == "torch.save" else pickle.load(file)
    assert marker.exists(), "unpickling executes it"


def tensor_file(header: object, length: int | None = None) -> bytes:
    """Return a safetensors file of 4 bytes of data, whose header may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(4)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = [
    *(tensor_file({"x": ENTRY}, length) for length in (2**63, 2**64 - 1, 100_000_001, 5, 1000)),
    *(tensor_file(text) for text in (b"[" * 100_000, b'{"x":' * 100_000, b'{"__metadata__":' + b"[" * 100_000)),
    *(tensor_file({"x": {**ENTRY, "shape": shape}}) for shape in ([2], [2**62, 4], [2**64], [-1], "1")),
    *(tensor_file({"x": {**ENTRY, "data_offsets": offsets}}) for offsets in ([0, 2**64 - 1], [4, 0], [0, 3])),
    *(tensor_file({"x": {**ENTRY, "dtype": "OBJECT"}}), tensor_file({"x": ENTRY, "y": ENTRY})),
]
VALID, VALID_STATE = manifest_entries(make_files(NEWER)), make_state(*NEWER).to_json()
NESTED, PASSWD = b"[" * 100_000, manifest_entries({"": Path("/etc/passwd").read_bytes()})[""]
NAMES = (
    *("../x", "../step-00000003-epoch-0001/model.safetensors", "/etc/passwd", "a/b", "./model.safetensors"),
    *("MODEL.safetensors", "model.safetensors\n", "two\nlines \x1b[2J", "\udcff"),
    *("", ".", "..", "nul\0", "x" * 100_000, MANIFEST),
)
HOSTILE: dict[str, tuple[str, str, list[bytes]]] = {
    "model": (MODEL, MODEL, [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 1000, *HEADERS]),
    "state": (STATE, STATE, [b"", NESTED, b'{"format": 2, "step": ' * 20_000, b"\xff\xfe", VALID_STATE[:-3]]),
    "metrics": (METRICS, METRICS, [b"\xff"]),
    "manifest": (MANIFEST, "", [b"", b"null", b"[]", b'"format"', NESTED, b'{"format": ' + b"9" * 100_000 + b"}"]),
    "later": (MANIFEST, f"{MANIFEST}: format 2, this version of regraft reads 1", [manifest_of(VALID, format=2)]),
    "names": (MANIFEST, "its manifest lists [", [manifest_of(VALID | {name: PASSWD}) for name in NAMES]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_contents_are_refused(case: str, tmp_path: Path) -> None:
    name, reason, contents = HOSTILE[case]
    for number, content in enumerate(contents):
        newer = tmp_path / str(number) / NEWER.name
        write(newer.parent, OLDER, NEWER)
        replace_file(newer, name, content)
        assert quarantine_reason(newer).startswith(reason), content[:100]


def test_a_manifest_with_a_missing_or_an_invalid_value_is_refused(newer: Path) -> None:
    valid = json.loads((newer / MANIFEST).read_bytes())
    for path, value in json_entries(valid):
        invalid = (*INVALID[type(value)], -1, math.nan, "0" * 64, "\ud800" * 64)
        contents = [edited(valid, path), *(edited(valid, path, other) for other in invalid)]
        for content in contents:
            if content != valid:  # True equals 1
                (newer / MANIFEST).write_text(json.dumps(content))
                with pytest.raises(store.CorruptCheckpoint):
                    store.read(newer)


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_a_manifest_or_state_of_70_megabytes_is_not_read(name: str, newer: Path) -> None:
    replace_file(newer, name, bytes(70 << 20))
    with pytest.raises(store.CorruptCheckpoint, match=f"^{name} has {70 << 20} bytes, expected at most {1 << 26}$"):
        store.read(newer)


@pytest.mark.parametrize("name", [MODEL, MANIFEST, ""])
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder"])
@pytest.mark.timeout(30)
def test_pipes_links_and_devices_are_not_opened(kind: str, name: str, newer: Path, tmp_path: Path) -> None:
    """In place of a file, or of the folder (`name` is empty)."""
    path, outside = newer / name if name else newer, tmp_path / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    before = tree(outside)
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(outside / path.name),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir if name else path.touch,
    }
    make[kind]()
    assert quarantine_reason(newer) == f"{path.name} is not a {'file' if name else 'folder'}"
    assert tree(outside) == before

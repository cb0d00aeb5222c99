"""Damaged and hostile checkpoints: they are quarantined, and the newest valid one is loaded."""

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

from tests.trainer.checkpoint.checkpoints import (
    FILES,
    INVALID,
    NEWER,
    OLDER,
    QUARANTINED,
    check_equal,
    edited,
    json_entries,
    load_latest,
    make_files,
    make_state,
    manifest_entries,
    tree,
    write,
)
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.checkpoint.store import LATEST, MANIFEST, METRICS, MODEL, STATE


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

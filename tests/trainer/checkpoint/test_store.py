import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tests.disks import disk
from tests.trainer.checkpoint.test_state import state
from trainer.checkpoint import store
from trainer.checkpoint.store import (
    LATEST,
    MANIFEST,
    METRICS,
    MODEL,
    OPTIMIZER,
    STATE,
    STATISTICS,
    CheckpointId,
    CorruptCheckpoint,
    LoadedCheckpoint,
)
from trainer.errors import UserError

FILES = (MODEL, OPTIMIZER, STATISTICS, STATE, METRICS)
OLDER, NEWER = CheckpointId(3, 1), CheckpointId(4, 1)


def files(place: CheckpointId) -> dict[str, bytes]:
    """Return a checkpoint's files, no two of which are alike, nor alike another place's."""
    generator = torch.Generator().manual_seed(place.step)
    model, moments, statistics = (torch.randn(size, generator=generator) for size in (300, 200, 100))
    return {
        MODEL: save({"weight": model, "batches": torch.tensor(place.step)}),
        OPTIMIZER: save({"momentum_buffer.weight": moments}),
        STATISTICS: save({"0.running_mean": statistics}),
        STATE: state(*place).to_json(),
        METRICS: "".join(f'{{"kind": "train", "epoch": {n}}}\n' for n in range(place.step)).encode(),
    }


def allowed() -> None:
    """Stand for an attempt that may write."""


def write(folder: Path, *places: CheckpointId, content: Mapping[str, bytes] | None = None) -> None:
    for place in places:
        store.write(folder, place, content or files(place), check=allowed)


def found(folder: Path) -> tuple[LoadedCheckpoint | None, list[str]]:
    """Return the newest checkpoint, and what was said."""
    said: list[str] = []
    return store.load_latest(folder, log=said.append), said


def require_whole(found: LoadedCheckpoint | None, place: CheckpointId) -> None:
    assert found is not None
    assert (found.path.name, found.state) == (place.name, state(*place))
    for name, content in files(place).items():
        assert (found.path / name).read_bytes() == content
    assert found.metrics.encode() == files(place)[METRICS]


def tree(folder: Path) -> dict[str, object]:
    """Return all that is under a folder: path -> content, or what it is."""
    seen: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            seen[name] = ("link", str(path.readlink()))
        else:
            seen[name] = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "special"
    return seen


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def entries(content: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return where a run's checkpoints come to stand; nothing is there yet."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


# Names


def test_the_name_of_a_checkpoint_says_where_it_stands() -> None:
    assert CheckpointId(120, 4).name == "step-00000120-epoch-0004"
    for place in (
        CheckpointId(0, 0),
        CheckpointId(120, 4),
        CheckpointId(10**8, 10**4),
        CheckpointId(10**15 - 1, 10**15 - 1),
    ):
        assert CheckpointId.of(place.name) == place


@pytest.mark.parametrize(
    "name",
    [
        "step-120-epoch-4",
        "step-000000120-epoch-0004",
        "step-00000120-epoch-00004",
        "step-00000120-epoch-0004\n",
        "step-00000120-epoch-0004.tmp",
        " step-00000120-epoch-0004",
        "step--0000120-epoch-0004",
        "step-+0000120-epoch-0004",
        "step-0000_120-epoch-0004",
        "step-٠٠٠٠٠١٢٠-epoch-0004",
        "damaged-1-step-00000120-epoch-0004",
        ".writing-step-00000120-epoch-0004-ab",
        f"step-{'9' * 5000}-epoch-0001",
        "LATEST",
        "",
    ],
)
def test_other_names_are_none_of_a_checkpoint(name: str) -> None:
    assert CheckpointId.of(name) is None


def test_places_are_in_the_order_of_steps_then_epochs(folder: Path) -> None:
    assert store.list_checkpoints(folder) == []
    folder.mkdir()
    some = [
        CheckpointId(100, 9),
        CheckpointId(9, 3),
        CheckpointId(10, 3),
        CheckpointId(9, 2),
        CheckpointId(10**8, 0),
        CheckpointId(10, 4),
    ]
    for place in some:
        (folder / place.name).mkdir()
    (folder / "step-1").mkdir()
    (folder / LATEST).touch()
    expected = [
        CheckpointId(10**8, 0),
        CheckpointId(100, 9),
        CheckpointId(10, 4),
        CheckpointId(10, 3),
        CheckpointId(9, 3),
        CheckpointId(9, 2),
    ]
    assert store.list_checkpoints(folder) == expected


# Writing and reading


def test_a_checkpoint_comes_back_as_it_was_written(folder: Path) -> None:
    write(folder, OLDER)
    path = folder / OLDER.name
    manifest = json.loads((path / MANIFEST).read_bytes())
    assert manifest == {"format": 1, "files": entries(files(OLDER))}
    assert names(path) == {*FILES, MANIFEST}
    assert (folder / LATEST).read_bytes() == b"step-00000003-epoch-0001\n"
    assert names(folder) == {LATEST, OLDER.name}
    assert names(folder.parent) == {"checkpoints"}
    require_whole(store.read(path), OLDER)
    require_whole(found(folder)[0], OLDER)


def test_statistics_of_each_process_may_be_absent_and_the_figures_empty(folder: Path) -> None:
    content = files(OLDER) | {METRICS: b""}
    del content[STATISTICS]
    write(folder, OLDER, content=content)
    read = store.read(folder / OLDER.name)
    assert (read.state, read.metrics) == (state(*OLDER), "")
    assert names(read.path) == {MODEL, OPTIMIZER, STATE, METRICS, MANIFEST}


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_files_of_any_size_are_written_whole(
    size: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_CHUNK", 64)
    content = files(OLDER) | {METRICS: bytes(n % 100 + 20 for n in range(size))}
    write(folder, OLDER, content=content)
    assert (folder / OLDER.name / METRICS).read_bytes() == content[METRICS]
    store.read(folder / OLDER.name)


def test_a_checkpoint_that_stands_is_never_replaced(folder: Path) -> None:
    write(folder, OLDER)
    before = tree(folder)
    with pytest.raises(OSError, match="not empty"):
        write(folder, OLDER, content=files(OLDER) | {METRICS: b"other"})
    assert tree(folder) == before


def test_everything_is_on_the_disk_before_it_is_put_in_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synchronised, and of the rest anything."""
    write(folder, OLDER)
    done: list[str] = []

    def short(path: str | os.PathLike[str]) -> str:
        text = os.path.relpath(path, folder.parent)
        return re.sub(r"(?<=[-.])[0-9a-f]{8}(?=\.tmp|/|$)", "*", text)

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        size = f" of {os.fstat(handle).st_size}" if path.is_file() else ""
        done.append(f"sync {short(path)}{size}")

    monkeypatch.setattr(os, "fsync", fsync)
    for call in ("rename", "replace", "unlink", "rmdir"):
        real = getattr(os, call)

        def noted(path: Any, *others: Any, real: Any = real, call: str = call, **settings: Any) -> None:
            real(path, *others, **settings)
            if settings.get("dir_fd") is None:
                done.append(" ".join([call, *map(short, (path, *others))]))

        monkeypatch.setattr(os, call, noted)

    monkeypatch.setattr(store.shutil, "rmtree", lambda path: done.append(f"remove {short(path)}"))
    store.write(folder, NEWER, files(NEWER), check=lambda: done.append("check"))
    store.prune(folder, [], check=lambda: done.append("check"))
    inside, latest = "checkpoints/.writing-step-00000004-epoch-0001-*", "checkpoints/.LATEST.*.tmp"
    manifest = len((folder / NEWER.name / MANIFEST).read_bytes())
    assert [line for line in done if not line.startswith("unlink")] == [
        "sync .",
        *(f"sync {inside}/{name} of {len(content)}" for name, content in files(NEWER).items()),
        f"sync {inside}/{MANIFEST} of {manifest}",
        f"sync {inside}",
        "check",
        f"rename {inside} checkpoints/{NEWER.name}",
        "sync checkpoints",
        f"sync {latest} of {len(NEWER.name) + 1}",
        f"replace {latest} checkpoints/LATEST",
        "sync checkpoints",
        "check",
        f"rename checkpoints/{OLDER.name} checkpoints/.leaving-{OLDER.name}",
        f"remove checkpoints/.leaving-{OLDER.name}",
    ]


def test_who_may_no_longer_write_puts_nothing_in_place(folder: Path) -> None:
    write(folder, OLDER)
    before = tree(folder)
    seen: list[set[str]] = []

    def taken_over() -> None:
        (temporary,) = folder.glob(".writing-*")
        seen.append(names(temporary))
        raise UserError("another attempt has taken this run over")

    with pytest.raises(UserError, match="taken this run over"):
        store.write(folder, NEWER, files(NEWER), check=taken_over)
    assert seen == [{*FILES, MANIFEST}], "asked last thing"
    assert tree(folder) == before


# A full disk


def is_full(folder: Path, content: Mapping[str, bytes]) -> bool:
    """Write the newer checkpoint, and return whether the disk was full."""
    try:
        write(folder, NEWER, content=content)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


def require_intact(folder: Path, before: dict[str, object]) -> None:
    """Require that the older checkpoint is as it was and nothing half written is left."""
    after = tree(folder)
    assert {name: after.get(name) for name in before if name != LATEST} == {
        name: content for name, content in before.items() if name != LATEST
    }
    assert names(folder) <= {LATEST, OLDER.name, NEWER.name}
    require_whole(found(folder)[0], NEWER if NEWER in store.list_checkpoints(folder) else OLDER)


@pytest.mark.parametrize("call", ["fsync", "mkdir", "open", "rename", "replace"])
def test_an_error_at_any_point_leaves_the_earlier_checkpoint(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Path if call == "open" else os
    real: Callable[..., Any] = getattr(holder, call)
    failing, failed = 0, True
    while failed:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, OLDER)
        before, left = tree(folder), failing

        def full(*args: Any, **settings: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(holder, call, full)
            failed = is_full(folder, files(NEWER))
        require_intact(folder, before)
        failing += 1
    assert NEWER in store.list_checkpoints(folder)
    assert failing - 1 == {"fsync": 11, "mkdir": 2, "open": 8, "rename": 1, "replace": 1}[call]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", "256k") as root:
        yield root


def test_a_disk_that_is_really_full_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    folder, ballast = small_disk / "checkpoints", small_disk / "ballast"
    page = os.statvfs(small_disk).f_bsize
    large = files(NEWER) | {MODEL: save({"weight": torch.zeros(6 * page // 4)})}  # seven pages, in one chunk
    outcomes = []
    for pages in range(40):
        write(folder, OLDER)
        before = tree(folder)
        free = os.statvfs(small_disk).f_bavail
        ballast.write_bytes(bytes((free - pages) * page))
        assert os.statvfs(small_disk).f_bavail == pages
        failed = is_full(folder, large)
        outcomes.append(
            "both" if failed and NEWER in store.list_checkpoints(folder) else "older" if failed else "written"
        )
        left = names(folder)
        ballast.unlink()
        assert left == {LATEST, OLDER.name, *([NEWER.name] if outcomes[-1] != "older" else [])}
        assert {name: tree(folder)[name] for name in before if name != LATEST} == {
            name: content for name, content in before.items() if name != LATEST
        }
        newest, said = found(folder)
        assert newest is not None
        assert newest.path.name == (OLDER.name if outcomes[-1] == "older" else NEWER.name)
        assert not said
        assert (folder / LATEST).read_text() == newest.path.name + "\n"
        shutil.rmtree(folder)
        if outcomes[-1] == "written":
            break
    expected_pages = sum(-(-len(content) // page) for content in large.values()) + 1  # and the manifest
    assert outcomes == ["older"] * expected_pages + ["both", "written"]


# What is kept


def test_pruning_keeps_what_was_asked_and_always_the_newest(folder: Path) -> None:
    some = [CheckpointId(step, 1) for step in range(3, 7)]
    write(folder, *some)
    (folder / "damaged-1-step-00000002-epoch-0000").mkdir()
    (folder / "notes").touch()
    asked: list[set[str]] = []
    store.prune(folder, [some[1], CheckpointId(99, 9)], check=lambda: asked.append(names(folder)))
    kept = {some[1].name, some[3].name, LATEST, "damaged-1-step-00000002-epoch-0000", "notes"}
    assert names(folder) == kept
    assert len(asked) == 2, "asked before each"
    store.prune(folder, [], check=allowed)
    assert names(folder) == kept - {some[1].name}
    store.prune(folder, [], check=allowed)
    require_whole(found(folder)[0], some[3])


def test_who_may_no_longer_write_removes_nothing(folder: Path) -> None:
    write(folder, OLDER, NEWER)
    before = tree(folder)

    def taken_over() -> None:
        raise UserError("another attempt has taken this run over")

    with pytest.raises(UserError, match="taken this run over"):
        store.prune(folder, [], check=taken_over)
    assert tree(folder) == before


def test_pruning_an_empty_or_missing_folder_does_nothing(folder: Path) -> None:
    store.prune(folder, [], check=allowed)
    assert not folder.exists()


def test_pruning_removes_a_link_and_not_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", OLDER)
    before = tree(tmp_path / "elsewhere")
    write(folder, NEWER)
    (folder / OLDER.name).symlink_to(tmp_path / "elsewhere" / OLDER.name)
    (folder / CheckpointId(2, 0).name).write_text("a file")
    store.prune(folder, [], check=allowed)
    assert names(folder) == {LATEST, NEWER.name}
    assert tree(tmp_path / "elsewhere") == before


# What a killed writer leaves


def test_tidying_removes_leftovers_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    store.clean_up(folder)
    assert not folder.exists(), "nothing is made"
    write(folder, OLDER)
    (folder / "damaged-1-step-00000001-epoch-0000").mkdir()
    for name in (
        "notes",
        ".hidden",
        ".writing",
        ".leaving",
        ".LATEST",
        ".LATEST.tmp",
        "LATEST.1.tmp",
        ".x.1.tmp",
    ):
        (folder / name).write_text(name)
    before = tree(folder)
    backbone_parameters = tmp_path / "outside"
    backbone_parameters.mkdir()
    (backbone_parameters / "precious").touch()
    for name in (".writing-step-00000004-epoch-0001-0badcafe", ".leaving-step-00000002-epoch-0000"):
        shutil.copytree(folder / OLDER.name, folder / name)
    (folder / ".LATEST.0badcafe.tmp").write_text("half")
    (folder / ".writing-link").symlink_to(backbone_parameters)
    (folder / ".leaving-link").symlink_to(tmp_path / "nowhere")
    (folder / ".writing-file").touch()
    store.clean_up(folder)
    assert tree(folder) == before
    assert names(backbone_parameters) == {"precious"}
    require_whole(found(folder)[0], OLDER)


# The newest that is whole


def test_where_there_is_nothing_there_is_no_newest(folder: Path) -> None:
    assert found(folder) == (None, [])
    assert not store.has_any(folder)
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes").touch()
    assert found(folder) == (None, [])
    assert not store.has_any(folder)
    assert names(folder) == {"notes"}


def test_the_newest_is_chosen_whatever_the_order_of_writing(folder: Path) -> None:
    last = CheckpointId(6, 2)
    write(folder, CheckpointId(5, 1), last, OLDER)
    assert store.has_any(folder)
    newest, said = found(folder)
    require_whole(newest, last)
    assert not said
    assert (folder / LATEST).read_text() == f"{last.name}\n"


def test_the_end_of_an_epoch_follows_its_last_step(folder: Path) -> None:
    write(folder, CheckpointId(6, 2), CheckpointId(6, 1))
    require_whole(found(folder)[0], CheckpointId(6, 2))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda latest, _: latest.unlink(),
        lambda latest, _: latest.write_text(f"{OLDER.name}\n"),
        lambda latest, _: latest.write_text(NEWER.name),
        lambda latest, _: latest.write_text(f"{NEWER.name}\n\n"),
        lambda latest, _: latest.write_text("../../elsewhere\n"),
        lambda latest, _: latest.write_bytes(b"\xff\0" * 1000),
        lambda latest, _: latest.write_bytes(b""),
        lambda latest, _: os.truncate(latest, 1 << 40),
        lambda latest, elsewhere: (latest.unlink(), latest.symlink_to(elsewhere / "file")),
        lambda latest, elsewhere: (latest.unlink(), latest.symlink_to(elsewhere)),
        lambda latest, elsewhere: (latest.unlink(), latest.symlink_to(elsewhere / "none")),
        lambda latest, _: (latest.unlink(), os.mkfifo(latest)),
    ],
)
@pytest.mark.timeout(30)
def test_the_pointer_is_repaired_and_never_followed(
    spoil: Callable[[Path, Path], object], folder: Path, tmp_path: Path
) -> None:
    write(folder, OLDER, NEWER)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text(f"{NEWER.name}\n")
    before = tree(elsewhere)
    spoil(folder / LATEST, elsewhere)
    newest, said = found(folder)
    require_whole(newest, NEWER)
    assert not said
    assert not (folder / LATEST).is_symlink()
    assert (folder / LATEST).read_text() == f"{NEWER.name}\n"
    assert names(folder) == {OLDER.name, NEWER.name, LATEST}
    assert tree(elsewhere) == before


def test_a_folder_in_the_pointers_place_is_set_aside(folder: Path) -> None:
    write(folder, OLDER)
    for number in (1, 2):
        (folder / LATEST).unlink()
        (folder / LATEST).mkdir()
        (folder / LATEST / "something").write_text(str(number))
        if number == 1:
            require_whole(found(folder)[0], OLDER)
        else:
            write(folder, NEWER)
        assert (folder / f"damaged-{number}-LATEST" / "something").read_text() == str(number)
    require_whole(found(folder)[0], NEWER)
    assert (folder / LATEST).read_text() == f"{NEWER.name}\n"


def test_a_pointer_that_is_right_is_left_alone(folder: Path) -> None:
    write(folder, OLDER)
    before = (folder / LATEST).stat()
    found(folder)
    after = (folder / LATEST).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_damaged_ones_are_set_aside_one_after_the_other(folder: Path) -> None:
    some = [CheckpointId(step, 1) for step in (3, 4, 5)]
    write(folder, *some)
    for place in some[1:]:
        (folder / place.name / MODEL).write_bytes(b"")
    newest, said = found(folder)
    require_whole(newest, some[0])
    size = len(files(some[1])[MODEL])
    assert said == [
        f"{folder / place.name} is damaged ({MODEL} has 0 bytes, its manifest says {size}): "
        f"set aside as damaged-1-{place.name}"
        for place in (some[2], some[1])
    ]
    assert (folder / LATEST).read_text() == f"{some[0].name}\n"
    assert found(folder)[1] == [], "said once"

    write(folder, some[1])
    (folder / some[1].name / STATE).unlink()
    said = found(folder)[1]
    assert said == [
        f"{folder / some[1].name} is damaged ('{STATE}' is missing): set aside as damaged-2-{some[1].name}"
    ]


def test_where_none_is_whole_the_run_is_not_begun_anew(folder: Path) -> None:
    write(folder, OLDER, NEWER)
    for place in (OLDER, NEWER):
        (folder / place.name / MANIFEST).unlink()
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            found(folder)
        assert str(caught.value) == (
            f"{folder}: no checkpoint is whole; set aside: damaged-1-{OLDER.name}, damaged-1-{NEWER.name}. Restore one "
            "under its name, or start anew with --run.resume never, which moves the run aside"
        )
    assert store.has_any(folder)


def test_one_that_was_set_aside_counts_again_under_its_name(folder: Path) -> None:
    write(folder, OLDER)
    content = (folder / OLDER.name / MODEL).read_bytes()
    (folder / OLDER.name / MODEL).write_bytes(b"")
    with pytest.raises(UserError):
        found(folder)
    aside = folder / f"damaged-1-{OLDER.name}"
    (aside / MODEL).write_bytes(content)
    aside.rename(folder / OLDER.name)
    require_whole(found(folder)[0], OLDER)


# Damage


def truncate(path: Path, drawn: random.Random) -> None:
    os.truncate(path, drawn.randrange(path.stat().st_size))


def flip(path: Path, drawn: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)


def append(path: Path, drawn: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b"\0" + drawn.randbytes(drawn.randrange(100)))


def become_a_folder(path: Path, drawn: random.Random) -> None:
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    (path / path.name).write_bytes(content)


def become_a_link(path: Path, drawn: random.Random) -> None:
    original = path.parent.parent / ".elsewhere" / path.name  # whole
    original.parent.mkdir(exist_ok=True)
    path.rename(original)
    path.symlink_to(original)


def swap(path: Path, drawn: random.Random) -> None:
    other = path.with_name(drawn.choice([name for name in (*FILES, MANIFEST) if name != path.name]))
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def of_the_older(path: Path, drawn: random.Random) -> None:
    path.write_bytes(
        files(OLDER).get(path.name) or json.dumps({"format": 1, "files": entries(files(OLDER))}).encode()
    )


def add_another(path: Path, drawn: random.Random) -> None:
    other = path.with_name(
        drawn.choice([f"{path.name}.1", f".{path.name}", "x", "\udcff", path.name.upper()])
    )
    shutil.copy(path, other)


DAMAGES: Sequence[Callable[[Path, random.Random], object]] = (
    truncate,
    flip,
    lambda path, _: path.write_bytes(b""),
    lambda path, _: path.unlink(),
    swap,
    of_the_older,
    become_a_folder,
    become_a_link,
    append,
    add_another,
)


def test_200_damages_are_never_loaded_and_always_recovered_from_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda handle: None
    )  # no power is cut here, and a busy disk takes its time
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    drawn = random.Random(seed)
    write(tmp_path / "whole", OLDER, NEWER)
    pairs = [(damage, name) for damage in DAMAGES for name in (*FILES, MANIFEST)]
    cases = [*pairs * 3, *drawn.sample(pairs, 20)]
    assert len(cases) == 200
    folder = tmp_path / "damaged"
    for number, (damage, name) in enumerate(cases):
        what = f"case {number}: {name}, {getattr(damage, '__name__', damage)}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / NEWER.name / name, drawn)
        damaged = tree(folder / NEWER.name)
        assert damaged != tree(tmp_path / "whole" / NEWER.name), what

        newest, said = found(folder)
        require_whole(newest, OLDER)
        (line,) = said
        aside = f"damaged-1-{NEWER.name}"
        assert line.startswith(f"{folder / NEWER.name} is damaged ("), what
        assert line.endswith(f"): set aside as {aside}"), what
        named = [file for file in (*FILES, MANIFEST, "'x'", r"\udcff") if file.lower() in line.lower()]
        assert named, f"{what}: {line}"
        assert line.isprintable(), what
        assert tree(folder / aside) == damaged, what
        assert (folder / LATEST).read_text() == f"{OLDER.name}\n", what

        # The same without another to go on from: it goes back under its name, and is refused again.
        shutil.rmtree(folder / OLDER.name)
        (folder / aside).rename(folder / NEWER.name)
        with pytest.raises(UserError, match=f"no checkpoint is whole; set aside: {aside}"):
            found(folder)
        assert tree(folder / aside) == damaged, what
        assert not (folder / NEWER.name).exists(), what


def test_what_cannot_be_read_here_and_now_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, CheckpointId(1, 1))
    before = tree(folder)

    def denied(*_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(store, "_sha256", denied)
    with pytest.raises(PermissionError):
        found(folder)
    assert tree(folder) == before


def test_a_folder_that_cannot_be_emptied_yet_is_left_for_the_next_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, CheckpointId(1, 1), CheckpointId(2, 2))

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_remove", busy)
        store.prune(folder, [], check=allowed)
    assert store.list_checkpoints(folder) == [CheckpointId(2, 2)]
    assert len(list(folder.glob(".leaving-*"))) == 1
    store.clean_up(folder)
    assert not list(folder.glob(".leaving-*"))


def test_files_swapped_between_two_checkpoints_spoil_both(folder: Path) -> None:
    for number, name in enumerate((*FILES, MANIFEST), start=1):
        write(folder, CheckpointId(2, 0), OLDER, NEWER)
        one, other = folder / OLDER.name / name, folder / NEWER.name / name
        mine, others = one.read_bytes(), other.read_bytes()
        one.write_bytes(others)
        other.write_bytes(mine)
        newest, said = found(folder)
        require_whole(newest, CheckpointId(2, 0))
        assert [line.rpartition(" as ")[2] for line in said] == [
            f"damaged-{number}-{NEWER.name}",
            f"damaged-{number}-{OLDER.name}",
        ]
        shutil.rmtree(folder / CheckpointId(2, 0).name)


def test_any_flipped_bit_of_a_manifest_is_seen(folder: Path) -> None:
    """Other files are covered by it; it is covered by nothing."""
    write(folder, OLDER)
    path = folder / OLDER.name
    whole = (path / MANIFEST).read_bytes()
    with (path / MANIFEST).open("r+b") as file:
        for place, value in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([value ^ 1 << bit]), place)
                with pytest.raises(CorruptCheckpoint):
                    store.read(path)
            os.pwrite(file.fileno(), bytes([value]), place)
    store.read(path)


def test_a_checkpoint_under_another_ones_name_is_damaged(folder: Path) -> None:
    write(folder, OLDER)
    for place in (CheckpointId(4, 1), CheckpointId(3, 2), CheckpointId(10**8 + 3, 1)):
        shutil.copytree(folder / OLDER.name, folder / place.name)
        newest, (line,) = found(folder)
        require_whole(newest, OLDER)
        assert "(it holds the state after step 3 and 1 epochs)" in line


# Malice: the manifest is right, the rest is not


class Touches:
    """Once pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def list_anew(path: Path, **more: Any) -> None:
    """Give a checkpoint a manifest that is right about what it holds."""
    content = {file.name: file.read_bytes() for file in path.iterdir() if file.name != MANIFEST}
    (path / MANIFEST).write_text(json.dumps({"format": 1, "files": entries(content) | more}))


def refused(folder: Path) -> str:
    """Return what is said of the newest checkpoint, which is set aside as it is."""
    forged = tree(folder / NEWER.name)
    newest, (line,) = found(folder)
    require_whole(newest, OLDER)
    assert (folder / LATEST).read_text() == f"{OLDER.name}\n"
    aside = f"damaged-1-{NEWER.name}"
    assert tree(folder / aside) == forged
    prefix, suffix = f"{folder / NEWER.name} is damaged (", f"): set aside as {aside}"
    assert line.startswith(prefix)
    assert line.endswith(suffix)
    reason = line[len(prefix) : -len(suffix)]
    assert reason.isprintable()
    assert len(reason) < 1300, "200 characters, escaped"
    return reason


@pytest.fixture
def forged(folder: Path) -> Path:
    """Return the newer of two checkpoints, to be changed."""
    write(folder, OLDER, NEWER)
    return folder / NEWER.name


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATISTICS, STATE, METRICS, MANIFEST])
@pytest.mark.parametrize("kind", ["torch.save", "pickle 2", "pickle 5"])
def test_a_pickle_is_refused_and_not_executed(kind: str, name: str, forged: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    if kind == "torch.save":
        torch.save({"weight": Touches(marker)}, forged / name)
    else:
        (forged / name).write_bytes(pickle.dumps({"weight": Touches(marker)}, int(kind[-1])))
    if name != MANIFEST:
        list_anew(forged)
    assert name in refused(forged.parent)
    assert not marker.exists()
    aside = forged.with_name(f"damaged-1-{forged.name}") / name
    with aside.open("rb") as file:
        torch.load(file, weights_only=False) if kind == "torch.save" else pickle.load(file)
    assert marker.exists(), "it would have been"


def tensor_file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file that may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 1000,
        tensor_file(entry(), bytes(4), length=2**63),
        tensor_file(entry(), bytes(4), length=2**64 - 1),
        tensor_file(entry(), bytes(4), length=100_000_001),
        tensor_file(entry(), bytes(4), length=5),
        tensor_file(entry(), bytes(4), length=1000),
        tensor_file(b"[" * 100_000),
        tensor_file(b'{"x":' * 100_000),
        tensor_file(b'{"__metadata__":' + b"[" * 100_000),
        tensor_file(b" " * 1_000_000),
        tensor_file(entry(dtype="F64"), bytes(4)),
        tensor_file(entry(dtype="OBJECT"), bytes(4)),
        tensor_file(entry(dtype="F32\0"), bytes(4)),
        tensor_file(entry(shape=(2,)), bytes(4)),
        tensor_file(entry(shape=(2**62, 4)), bytes(4)),
        tensor_file(entry(shape=(2**64,)), bytes(4)),
        tensor_file(entry(shape=(-1,)), bytes(4)),
        tensor_file(entry(shape=(1.5,)), bytes(4)),
        tensor_file(entry(shape="1"), bytes(4)),
        tensor_file(entry(offsets=(0, 2**64 - 1)), bytes(4)),
        tensor_file(entry(offsets=(4, 8)), bytes(8)),
        tensor_file(entry(offsets=(4, 0)), bytes(4)),
        tensor_file(entry(offsets=(-4, 0)), bytes(4)),
        tensor_file(entry(), bytes(3)),
        tensor_file(entry(), bytes(5)),
        tensor_file({**entry(), "y": entry()["x"]}, bytes(4)),
    ],
)
def test_tensor_files_that_lie_are_refused(content: bytes, forged: Path) -> None:
    (forged / MODEL).write_bytes(content)
    list_anew(forged)
    assert refused(forged.parent).startswith(f"{MODEL}: ")


def test_a_header_that_says_100_megabytes_in_a_file_of_that_size_is_refused(forged: Path) -> None:
    (forged / OPTIMIZER).write_bytes(tensor_file(b"{", length=100_000_001))
    os.truncate(forged / OPTIMIZER, 110_000_000)
    list_anew(forged)
    assert refused(forged.parent).startswith(f"{OPTIMIZER}: ")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "../step-00000003-epoch-0001/model.safetensors",
        "/etc/passwd",
        "a/b",
        "./model.safetensors",
        "model.safetensors/",
        "MODEL.safetensors",
        "model.safetensors\n",
        "two\nlines \x1b[2J",
        "\udcff",
        "",
        ".",
        "..",
        "nul\0",
        "x" * 100_000,
        MANIFEST,
    ],
)
def test_names_that_are_none_of_ours_are_not_looked_up(name: str, forged: Path) -> None:
    (forged.parent / "x").write_text("outside")
    before = tree(forged.parent / OLDER.name)
    passwords = Path("/etc/passwd").read_bytes()
    list_anew(forged, **{name: {"bytes": len(passwords), "sha256": hashlib.sha256(passwords).hexdigest()}})
    assert refused(forged.parent).startswith("its manifest lists [")
    assert tree(forged.parent / OLDER.name) == before


WHOLE = entries(files(NEWER))


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "null",
        "3",
        "[]",
        '"format"',
        "{}",
        "[" * 100_000,
        '{"format": ' + "[" * 100_000,
        '{"format": 1, "files": ' * 30_000,
        '{"format": ' + "9" * 100_000 + "}",
        json.dumps({"format": 2, "files": WHOLE}),
        json.dumps({"format": "1", "files": WHOLE}),
        json.dumps({"format": "\x1b[2J" * 10_000, "files": WHOLE}),
        json.dumps({"format": None, "files": WHOLE}),
        json.dumps({"format": 1}),
        json.dumps({"format": 1, "files": None}),
        json.dumps({"format": 1, "files": []}),
        json.dumps({"format": 1, "files": list(WHOLE)}),
        json.dumps({"format": 1, "files": dict.fromkeys(WHOLE, 0)}),
        json.dumps({"format": 1, "files": {name: [] for name in WHOLE}}),
        json.dumps({"format": 1, "files": dict.fromkeys(WHOLE, "bytes")}),
        json.dumps({"format": 1, "files": {}}),
        *(
            json.dumps({"format": 1, "files": WHOLE | {MODEL: {**WHOLE[MODEL], "bytes": size}}})
            for size in (None, True, -1, 1.0, "1", [], float("nan"), float("inf"), 10**400, 2**64)
        ),
        *(
            json.dumps({"format": 1, "files": WHOLE | {MODEL: {**WHOLE[MODEL], "sha256": digest}}})
            for digest in (None, 0, [], "", "0" * 64, WHOLE[MODEL]["sha256"].upper(), "\ud800" * 64)
        ),
        *(
            json.dumps({"format": 1, "files": {key: value for key, value in WHOLE.items() if key != name}})
            for name in WHOLE
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(manifest: str, forged: Path) -> None:
    (forged / MANIFEST).write_text(manifest)
    refused(forged.parent)


def test_a_manifest_of_a_later_format_is_refused_by_its_number(forged: Path) -> None:
    (forged / MANIFEST).write_text(json.dumps({"format": 2, "files": WHOLE}))
    assert refused(forged.parent) == "format 2, this version of regraft reads 1"


def test_a_manifest_or_state_of_70_megabytes_is_not_read(
    forged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 70 << 20
    sizes: list[int] = []
    real = Path.read_text

    def read_text(path: Path, *args: Any, **settings: Any) -> str:
        sizes.append(path.stat().st_size)
        return real(path, *args, **settings)

    monkeypatch.setattr(Path, "read_text", read_text)
    os.truncate(forged / MANIFEST, size)
    assert refused(forged.parent) == f"{MANIFEST} has {size} bytes, expected at most {1 << 26}"
    write(forged.parent, NEWER)
    os.truncate(forged / STATE, size)
    list_anew(forged)
    _, (line,) = found(forged.parent)
    assert f"({STATE} has {size} bytes, expected at most {1 << 26})" in line
    assert max(sizes) < 10_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"format": 1, "step": ' * 20_000,
        b'{"format": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe",
        state(*NEWER).to_json()[:-3],
        state(*NEWER).to_json().replace(b'"step": 4', b'"step": NaN'),
        state(*NEWER).to_json().replace(b'"step": 4', b'"step": 1' + b"0" * 400),
        state(*NEWER).to_json().replace(b'"step": 4', b'"step": 4.0'),
        state(*NEWER).to_json().replace(b'"loss": 0.3', b'"loss": -Infinity, "x": 0.3'),
        state(*NEWER).to_json().replace(b'"seconds": 1.5', b'"seconds": 1' + b"0" * 400),
        state(*NEWER).to_json().replace(b'"scaler": {', b'"best": 0, "sums": 0, "scaler": {'),
        dataclasses.replace(state(*NEWER), order=7).to_json(),
    ],
)
def test_a_state_that_is_none_is_refused(content: bytes, forged: Path) -> None:
    (forged / STATE).write_bytes(content)
    list_anew(forged)
    assert refused(forged.parent).startswith(f"{STATE}: ")


def test_figures_that_are_no_text_are_refused(forged: Path) -> None:
    (forged / METRICS).write_bytes(b"\xff")
    list_anew(forged)
    assert refused(forged.parent).startswith(f"{METRICS}: ")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder", "socket"])
@pytest.mark.timeout(30)
def test_what_is_no_file_is_not_opened(kind: str, name: str, forged: Path, tmp_path: Path) -> None:
    backbone_parameters = tmp_path / "outside"
    backbone_parameters.mkdir()
    (forged / name).rename(backbone_parameters / name)
    before = tree(backbone_parameters)
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(forged / name),
        "link": lambda: (forged / name).symlink_to(backbone_parameters / name),
        "device": lambda: (forged / name).symlink_to("/dev/zero"),
        "folder": (forged / name).mkdir,
        "socket": lambda: os.mknod(forged / name, 0o140644),
    }
    make[kind]()
    expected = f"{name} is not a file"
    assert refused(forged.parent) == expected
    assert tree(backbone_parameters) == before


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "file"])
@pytest.mark.timeout(30)
def test_what_is_no_folder_is_not_entered(kind: str, forged: Path, tmp_path: Path) -> None:
    backbone_parameters = tmp_path / "outside" / forged.name
    backbone_parameters.parent.mkdir()
    forged.rename(backbone_parameters)
    before = tree(backbone_parameters)
    make: dict[str, Callable[[], object]] = {
        "link": lambda: forged.symlink_to(backbone_parameters),
        "broken link": lambda: forged.symlink_to(tmp_path / "nowhere"),
        "pipe": lambda: os.mkfifo(forged),
        "file": forged.touch,
    }
    make[kind]()
    newest, (line,) = found(forged.parent)
    require_whole(newest, OLDER)
    assert f"({forged.name} is not a folder)" in line
    assert os.path.lexists(forged.with_name(f"damaged-1-{forged.name}"))
    assert not os.path.lexists(forged)
    assert tree(backbone_parameters) == before


def test_a_checkpoint_that_passes_its_check_is_read_from_its_files_alone(folder: Path) -> None:
    write(folder, OLDER)
    tensors = load_file(folder / OLDER.name / MODEL)
    assert int(tensors["batches"]) == OLDER.step

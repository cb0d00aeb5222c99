import errno
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.disks import disk
from tests.folders import noise_image
from trainer.data.decode import decode, hash_file
from trainer.data.image_cache import folder as folder_module
from trainer.data.image_cache.build import CacheBuilder, CacheForm
from trainer.data.image_cache.cached import CachedReader
from trainer.data.image_cache.folder import PackFolder
from trainer.data.image_cache.memory import PackMemory, open_packs
from trainer.data.image_cache.store import MISSING, ImageStore
from trainer.data.image_cache.writer import ImageWriter

COUNT = 40
ORIGINAL = CacheForm(1)
SMALL_PACKS = 18_000  # bytes: 5 images of 3,600, or 6 if two threads write at once
BUILDER = """
import os, signal, sys
from pathlib import Path
from trainer.data.image_cache import folder, pack
from tests.trainer.data.image_cache.test_packs import SMALL_PACKS, build

folder.PACK_BYTES = SMALL_PACKS
added, add = [], pack.PackWriter.add

def add_or_die(self, *arguments):
    added.append(0)
    if len(added) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *arguments)

pack.PackWriter.add = add_or_die
print("ready", flush=True)
input()
build(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "PACK_BYTES", SMALL_PACKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        noise_image(number).save(root / f"{number:03}.png")
    return root


def images_of(data: Path) -> list[tuple[str, str]]:
    """Return path and digest of each image."""
    images = []
    for path in sorted(data.iterdir()):
        with path.open("rb") as file:
            images.append((str(path), hash_file(file)))
    return images


def columns(images: list[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    """Return paths, and digests as numbers."""
    return [path for path, _ in images], parse([digest for _, digest in images])


def parse(digests: list[str]) -> np.ndarray:
    return np.array([int(digest, 16) for digest in digests], dtype=np.uint64)


def make_builder(files: PackFolder | PackMemory, store: ImageStore, limit: int = 2**40) -> CacheBuilder:
    return CacheBuilder(
        {ORIGINAL: []},
        original=ORIGINAL,
        store=store,
        writer=ImageWriter(files),
        limit=limit,
        open_pack=files.open_pack if isinstance(files, PackFolder) else lambda pack: None,
    )


def build(cache: Path, data: Path, *, max_bytes: int = 5_000_000) -> CacheBuilder:
    """Cache all images of a folder as one start of a run does; a pack has about 5 images."""
    files = PackFolder(cache, max_bytes=max_bytes)
    files.remove_leftovers()
    builder = make_builder(files, ImageStore(files.read_packs()[0]))
    builder.add_missing({ORIGINAL: columns(images_of(data))}, workers=2)
    builder._writer.close()
    return builder


def locate(cache: Path, data: Path) -> tuple[ImageStore, np.ndarray]:
    store = ImageStore(PackFolder(cache).read_packs()[0])
    return store, store.locate(columns(images_of(data))[1], ORIGINAL.variant)


def assert_pixels_are_those_of_the_files(store: ImageStore, entries: np.ndarray, data: Path) -> int:
    """Return the number of images that were decoded from their files."""
    decoded = []

    def fallback(example: int) -> np.ndarray:
        decoded.append(example)
        return np.asarray(decode(paths[example]))

    paths = sorted(data.iterdir())
    read = CachedReader(store, entries, fallback)
    for _ in range(2):
        for example, path in enumerate(paths):
            assert np.array_equal(read(example), decode(path)), path
    return len(decoded) // 2


def test_images_of_a_pack_are_read_only_views_in_any_process(tmp_path: Path, data: Path) -> None:
    build(tmp_path / "cache", data)
    store, entries = locate(tmp_path / "cache", data)
    assert COUNT // 6 <= len(store.packs) <= COUNT // 5 + 1
    copy = pickle.loads(pickle.dumps(store))
    for each in (store, copy):
        assert assert_pixels_are_those_of_the_files(each, entries, data) == 0
    image = store.read(int(entries[0]))
    assert image is not None
    assert not image.flags.writeable
    assert image.flags.c_contiguous
    assert (store.locate(parse(["0" * 16]), 1) == MISSING).all()
    assert (store.locate(parse([images_of(data)[0][1]]), 2) == MISSING).all(), "another variant"


def start(cache: Path, data: Path, *, kill_at: int = 0) -> subprocess.Popen[str]:
    """Start a process that builds when it gets a line; SIGKILL ends it when it adds an image for the n-th time."""
    command = [sys.executable, "-c", BUILDER, str(cache), str(data), str(kill_at)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_build_continues_after_sigkill(tmp_path: Path, data: Path) -> None:
    killed = start(tmp_path, data, kill_at=COUNT // 2)
    killed.communicate("\n")
    assert killed.returncode == -signal.SIGKILL
    _, entries = locate(tmp_path, data)
    cached = np.count_nonzero(entries != MISSING)
    assert 0 < cached < COUNT // 2, "the images of complete packs"
    assert [*tmp_path.glob(".*.tmp")]
    added = build(tmp_path, data)._writer.images
    assert added == COUNT - cached
    assert not [*tmp_path.glob(".*")]
    assert assert_pixels_are_those_of_the_files(*locate(tmp_path, data), data) == 0
    assert build(tmp_path, data)._writer.images == 0


def test_two_processes_may_build_at_once(tmp_path: Path, data: Path) -> None:
    builders = [start(tmp_path, data) for _ in range(2)]
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("\n")
        builder.stdin.flush()
    for builder in builders:
        builder.communicate(timeout=60)
    assert [builder.returncode for builder in builders] == [0, 0]
    assert assert_pixels_are_those_of_the_files(*locate(tmp_path, data), data) == 0
    assert not [*tmp_path.glob(".*")]


def flip(content: bytearray) -> bytearray:
    content[1000] ^= 1
    return content


DAMAGES: dict[str, Callable[[bytearray], bytearray]] = {
    "a flipped bit of an image": flip,
    "cut off": lambda content: content[:-1],
    "cut off at an image": lambda content: content[:3000],
    "empty": lambda content: bytearray(),
    "zeros": lambda content: bytearray(len(content)),
    "a flipped bit of the index": lambda content: content[:-80] + bytes([content[-80] ^ 1]) + content[-79:],
    "appended": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pack_is_removed_and_its_images_are_decoded(
    tmp_path: Path, data: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, data)
    pack = min(tmp_path.iterdir())
    (before, *_), _ = PackFolder(tmp_path).read_packs()
    pack.write_bytes(DAMAGES[damage](bytearray(pack.read_bytes())))
    packs, messages = PackFolder(tmp_path).read_packs()
    store = ImageStore(packs)
    entries = store.locate(columns(images_of(data))[1], ORIGINAL.variant)
    decoded = assert_pixels_are_those_of_the_files(store, entries, data)
    messages += capfd.readouterr().err.splitlines()
    assert len(messages) == 1
    assert messages[0].startswith(f"image cache: {pack} is damaged and was removed")
    assert not pack.exists()
    assert decoded == (1 if damage == "a flipped bit of an image" else len(before.records))
    build(tmp_path, data)
    assert assert_pixels_are_those_of_the_files(*locate(tmp_path, data), data) == 0


def test_a_removed_cache_changes_no_pixel(tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, data)
    store, entries = locate(tmp_path, data)
    opened = store.packs[0]
    assert PackFolder(tmp_path).open_pack(opened)
    for path in tmp_path.iterdir():
        path.unlink()
    assert assert_pixels_are_those_of_the_files(store, entries, data) == COUNT - len(opened.records)
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_the_packs_that_were_used_first_are_evicted_unless_a_process_maps_them(tmp_path: Path, data: Path) -> None:
    build(tmp_path, data)
    paths = sorted(tmp_path.iterdir())
    for age, path in enumerate(paths):
        os.utime(path, (1e9 + age, 1e9 + age))
    packs, _ = PackFolder(tmp_path).read_packs()
    # Packs differ in size and have random names: without the first one, there is room for a new one.
    folder = PackFolder(tmp_path, max_bytes=SMALL_PACKS + sum(path.stat().st_size for path in paths[1:]))
    assert folder.open_pack(packs[1])
    os.utime(paths[1], (1e9 + 1, 1e9 + 1))
    folder.create().discard()
    assert sorted(tmp_path.iterdir()) == paths[1:], "room for one pack"
    PackFolder(tmp_path, max_bytes=4 * SMALL_PACKS).create().discard()
    kept = sorted(tmp_path.iterdir())
    assert kept == [paths[1], *paths[-len(kept) + 1 :]]
    assert 2 <= len(kept) <= 4
    for path in paths[2:]:
        path.unlink(missing_ok=True)
    with pytest.raises(OSError, match="its limit of"):
        PackFolder(tmp_path, max_bytes=paths[1].stat().st_size).create()
    assert [*tmp_path.iterdir()] == [paths[1]], "in use"


def test_packs_of_the_run_are_not_evicted_to_add_its_other_images(tmp_path: Path, data: Path) -> None:
    build(tmp_path, data)
    for path in sorted(tmp_path.iterdir())[COUNT // 10 :]:
        path.unlink()
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    cached = np.count_nonzero(locate(tmp_path, data)[1] != MISSING)
    other = ImageWriter(PackFolder(tmp_path))
    for digest in range(5):
        other.add(digest, ORIGINAL.variant, np.zeros((30, 40, 3), np.uint8))
    other.close()
    builder = build(tmp_path, data, max_bytes=size + SMALL_PACKS)
    assert builder.error is not None
    after = np.count_nonzero(locate(tmp_path, data)[1] != MISSING)
    assert after == cached + builder._writer.images > cached, "the other pack made room"


def test_temporary_files_of_living_writers_are_kept(tmp_path: Path) -> None:
    new = PackFolder(tmp_path).create()
    dead = tmp_path / ".dead.tmp"
    dead.write_bytes(b"")
    PackFolder(tmp_path).remove_leftovers()
    assert not dead.exists()
    assert len([*tmp_path.glob(".*.tmp")]) == 1
    new.discard()
    assert not [*tmp_path.iterdir()]


def test_the_limit_counts_what_is_cached_already(tmp_path: Path, data: Path) -> None:
    size = noise_image(0).width * noise_image(0).height * 3
    for limit, total in ((10 * size, 10), (15 * size - 1, 14), (COUNT * size, COUNT)):
        files = PackFolder(tmp_path)
        builder = make_builder(files, ImageStore(files.read_packs()[0]), limit)
        builder.add_missing({ORIGINAL: columns(images_of(data))}, workers=2)
        builder._writer.close()
        assert np.count_nonzero(locate(tmp_path, data)[1] != MISSING) == total


def test_a_full_disk_ends_the_build_and_keeps_complete_packs(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.setattr(folder_module, "MAX_PACKS", 2**30)
    with disk(tmp_path / "disk", "64k") as cache:
        builder = make_builder(PackFolder(cache), ImageStore())
        builder.add_missing({ORIGINAL: columns(images_of(data))}, workers=1)
        assert builder.error is not None
        assert builder.error.errno == errno.ENOSPC
        with suppress(OSError):
            builder._writer.close()
        decoded = assert_pixels_are_those_of_the_files(*locate(cache, data), data)
        assert 0 < decoded < COUNT
        assert not [*cache.glob(".*")]


def test_packs_in_memory_are_shared_with_other_processes_and_freed(data: Path) -> None:
    memory = PackMemory()
    builder = make_builder(memory, ImageStore())
    builder.add_missing({ORIGINAL: columns(images_of(data))}, workers=2)
    builder._writer.close()
    assert memory.size > COUNT * 3600
    code = "import sys, trainer.data.image_cache.memory as m; print(len(m.open_packs(sys.argv[1:])[0].records))"
    other = subprocess.run([sys.executable, "-c", code, *memory.paths], capture_output=True, text=True, check=True)
    assert int(other.stdout) == COUNT
    (path,) = memory.paths
    store = ImageStore(open_packs(memory.paths))
    memory.keep_only(set())
    entries = store.locate(columns(images_of(data))[1], ORIGINAL.variant)
    assert assert_pixels_are_those_of_the_files(store, entries, data) == 0, "mapped by this process"
    with pytest.raises(OSError, match="No such file"):
        open_packs([path])


def test_a_file_that_changed_after_its_validation_is_not_cached(tmp_path: Path, data: Path) -> None:
    (path, _), (_, digest), *_ = images_of(data)
    builder = make_builder(PackFolder(tmp_path), ImageStore())
    builder.add_missing({ORIGINAL: ([path], parse([digest]))}, workers=1)
    assert builder._writer._pack is None

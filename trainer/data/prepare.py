"""From `data.root` to a checked list of examples, and what a reader should be told of it."""

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

from trainer.config import DataConfig
from trainer.data.index import ImageIndex, drop, read_index
from trainer.data.known import cache_folder, resolve_root
from trainer.data.names import printable
from trainer.data.verdicts import check_images, unreadable_error


@dataclass(frozen=True, kw_only=True)
class Displays:
    """What shows the long work; by default nothing does."""

    downloading: Callable[[str], AbstractContextManager[Callable[[int, int | None], None] | None]] = (
        lambda name: nullcontext()
    )
    """Opens a display of the data set `name`; what it yields is called with (bytes so far, bytes in all or None)."""
    checking: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext
    """Opens a display; what it yields is called with (images checked, images in all)."""


NOWHERE = Displays()


@dataclass(frozen=True)
class Prepared:
    """The examples of a run."""

    index: ImageIndex
    notes: tuple[str, ...]
    """What the index passed over, cut or dropped; one line each."""

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all examples in their order: with the same one, batches and evaluations are the same.

        Paths count as they lie below the data's folder, which may have moved.
        """
        root = os.path.join(self.index.root, "")  # noqa: PTH118 (with its slash)
        digest = hashlib.sha256()
        for part in (self.index.train, self.index.val, self.index.test):
            for path, label in part:
                digest.update(f"{path.removeprefix(root)}\0{label}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\0")
        return digest.hexdigest()[:32]


def prepare(data: DataConfig, *, workers: int, displays: Displays = NOWHERE, check: bool = True) -> Prepared:
    """Find, list and check the images of `data`; download or draw them first where they are known by name.

    Args:
        data: the section of the config; its `root` is set.
        workers: how many images are checked at once.
        displays: where progress is seen.
        check: decode every image once, unless an earlier start did.

    Raises:
        UserError: no such data, a layout that is not understood, or images that cannot be read.

    """
    assert data.root is not None  # for mypy: main has checked it
    cache = cache_folder(data.cache)
    with displays.downloading(data.root) as on_progress:
        folder = resolve_root(data.root, cache=cache, seed=data.seed, on_progress=on_progress)
    index = read_index(
        folder,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
        extensions=data.extensions,
    )
    if not check:
        return Prepared(index, index.notes)
    paths = [example.path for part in (index.train, index.val, index.test) for example in part]
    with displays.checking() as on_checked:
        unreadable = check_images(paths, cache=cache, workers=workers, on_progress=on_checked)
    if not unreadable:
        return Prepared(index, index.notes)
    if data.on_unreadable == "stop":
        raise unreadable_error(unreadable, len(paths))
    index = drop(index, unreadable)
    skipped = "".join(f"\n  {printable(path)}: {reason}" for path, reason in sorted(unreadable.items()))
    return Prepared(
        index,
        (*index.notes, f"{len(unreadable)} of {len(paths)} images cannot be read and are skipped:{skipped}"),
    )

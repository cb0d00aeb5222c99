"""From `data.root` to a checked list of examples, and what a reader should be told of it."""

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from trainer.config import DataConfig
from trainer.data.download import progress_bar
from trainer.data.index import ImageIndex, drop, read_index
from trainer.data.known import cache_folder, is_known, locate
from trainer.data.verdicts import check_images, unreadable_error

CheckProgress = Callable[[], AbstractContextManager[Callable[[int, int], None] | None]]
"""Opens a display; what it yields is called with (images checked, images in all)."""


@dataclass(frozen=True)
class Prepared:
    """The examples of a run."""

    index: ImageIndex
    notes: tuple[str, ...]
    """What the index passed over, cut or dropped; one line each."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of the training examples in their order: two runs with the same one draw the same batches."""
        digest = hashlib.sha256()
        for path, label in self.index.train:
            digest.update(f"{os.path.relpath(path, self.index.root)}\0{label}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]


def prepare(data: DataConfig, *, workers: int, show: CheckProgress | None = None, check: bool = True) -> Prepared:
    """Find, list and check the images of `data`; download or draw them first where they are known by name.

    Args:
        data: the section of the config; its `root` is set.
        workers: how many images are checked at once.
        show: where progress is seen; None: nowhere.
        check: decode every image once, unless an earlier start did.

    Raises:
        UserError: no such data, a layout that is not understood, or images that cannot be read.

    """
    assert data.root is not None  # for mypy: main has checked it
    cache = cache_folder(data.cache)
    bar = progress_bar(f"downloading {data.root}") if show and is_known(data.root) else nullcontext()
    with bar as on_progress:
        folder = locate(data.root, cache=cache, seed=data.seed, on_progress=on_progress)
    index = read_index(
        folder,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
        extensions=data.extensions,
    )
    paths = [example.path for part in (index.train, index.val, index.test) for example in part]
    with show() if show else nullcontext() as on_checked:
        unreadable = check_images(paths, cache=cache, workers=workers, on_progress=on_checked) if check else {}
    notes = list(index.notes)
    if unreadable:
        if data.on_unreadable == "stop":
            raise unreadable_error(unreadable, len(paths))
        index = drop(index, unreadable)
        listed = "".join(f"\n  {path}: {reason}" for path, reason in sorted(unreadable.items()))
        notes.append(f"{len(unreadable)} of {len(paths)} images cannot be read and are skipped:{listed}")
    return Prepared(index, tuple(notes))

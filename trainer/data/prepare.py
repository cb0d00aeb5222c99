"""Prepare the dataset of a run: find or download it, list its examples and validate its images."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property

from trainer.config.schema import DataConfig
from trainer.data.index import DatasetIndex, read_index, without_images
from trainer.data.progress import NO_PROGRESS, ProgressHooks
from trainer.data.registry import cache_folder, resolve_root
from trainer.data.table import TableFormat
from trainer.data.validation import check_images, unreadable_error
from trainer.text import escape_unprintable


@dataclass(frozen=True)
class Prepared:
    """The validated examples of a run."""

    index: DatasetIndex
    notes: tuple[str, ...]
    """Messages about ignored files, splits and skipped images."""

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all examples in order; equal hashes mean equal batches and evaluations.

        Paths are relative to the dataset folder, so the hash does not change if the folder is moved.
        """
        root = os.path.join(self.index.root, "")  # noqa: PTH118 (adds a trailing slash)
        digest = hashlib.sha256()
        for split in (self.index.train, self.index.val, self.index.test):
            for path, label in split:
                digest.update(f"{path.removeprefix(root)}\0{label}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\0")
        return digest.hexdigest()[:32]


def prepare(data: DataConfig, *, workers: int, displays: ProgressHooks = NO_PROGRESS, check: bool = True) -> Prepared:
    """List and validate the images of a dataset; download or generate a named dataset first.

    Args:
        data: the data section of the config; `root` must be set.
        workers: number of threads that validate images.
        displays: progress displays.
        check: decode every image once, except those with a cached validation result.

    Raises:
        UserError: no such dataset, an unknown layout, or unreadable images.

    """
    assert data.root is not None  # for mypy: `resolve` has checked it
    cache = cache_folder(data.cache)
    with displays.downloading(data.root) as on_progress:
        folder = resolve_root(data.root, cache=cache, seed=data.seed, on_progress=on_progress)
    index = read_index(
        folder,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
        extensions=data.extensions,
        split_dirs={"train": data.train_dir, "val": data.val_dir, "test": data.test_dir},
        table=TableFormat(columns=data.csv_columns, root=data.csv_root, suffix=data.csv_suffix),
    )
    if not check:
        return Prepared(index, index.notes)
    paths = [example.path for split in (index.train, index.val, index.test) for example in split]
    with displays.checking() as on_checked:
        unreadable = check_images(paths, cache=cache, workers=workers, on_progress=on_checked)
    if not unreadable:
        return Prepared(index, index.notes)
    if data.on_unreadable == "stop":
        raise unreadable_error(unreadable, len(paths))
    index = without_images(index, unreadable)
    skipped = "".join(f"\n  {escape_unprintable(path)}: {reason}" for path, reason in sorted(unreadable.items()))
    return Prepared(
        index, (*index.notes, f"{len(unreadable)} of {len(paths)} images cannot be read and are skipped:{skipped}")
    )

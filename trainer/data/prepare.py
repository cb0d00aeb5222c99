"""Prepare the dataset of a run: find or download it, list its examples and validate its images."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from trainer.config.sections.data import DataConfig
from trainer.data.csv.table import TableFormat
from trainer.data.deferred_checks import DeferredChecks
from trainer.data.digests import to_hex
from trainer.data.exclude import describe, find_excluded
from trainer.data.index import DatasetIndex, Example, without_images
from trainer.data.progress import NO_PROGRESS, ProgressHooks
from trainer.data.read_index import read_index
from trainer.data.registry import cache_folder, resolve_root
from trainer.data.validation import OnDecoded, check_images, unreadable_error
from trainer.data.validation_results import ValidationResults
from trainer.text import escape_unprintable, join_truncated


@dataclass(frozen=True)
class Prepared:
    """The validated examples of a run."""

    index: DatasetIndex
    notes: tuple[str, ...]
    """Messages about ignored files, splits, skipped images and conversions of pixels."""
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """uint64 [N]: hash of the content of each image, in the order of `examples`; empty if they were not checked."""
    deferred: DeferredChecks | None = None
    """Checks of the files that were not compared with their validation results yet, in the order of `examples`."""

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """Return the examples of all splits."""
        return (*self.index.train, *self.index.val, *self.index.test)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of all examples in order; equal hashes mean equal batches and evaluations.

        Paths are relative to the dataset folder, so the hash does not change if the folder is moved.
        """
        root = os.path.join(self.index.root, "")  # noqa: PTH118 (adds a trailing slash)
        labels = [*map(str, range(len(self.index.classes)))]
        digest = hashlib.sha256()
        for split in (self.index.train, self.index.val, self.index.test):
            fields = [""] * 2 * len(split)
            fields[::2], fields[1::2] = split.paths, map(labels.__getitem__, split.labels.tolist())
            # Every field begins after a NUL, which no path has.
            text = "\0".join(["", *fields, ""]).replace(f"\0{root}", "\0").removeprefix("\0")
            digest.update(f"{text}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:32]

    @cached_property
    def content_digest(self) -> str:
        """Return a hash of the contents of all images in order."""
        return hashlib.sha256(to_hex(self.digests).encode("ascii")).hexdigest()[:32]


def prepare(data: DataConfig, *, workers: int, displays: ProgressHooks = NO_PROGRESS, check: bool = True) -> Prepared:
    """List and validate the images of a dataset; download or generate a named dataset first.

    Args:
        data: the data section of the config; `root` must be set.
        workers: number of threads that validate images.
        displays: progress displays.
        check: decode and hash every image once, except those with a cached validation result.

    Raises:
        UserError: no such dataset, an unknown layout, or unreadable images.

    """
    index = list_examples(data, displays=displays)
    if not check:
        return Prepared(index, index.notes)
    return validate_examples(index, data, workers=workers, displays=displays)


def list_examples(data: DataConfig, *, displays: ProgressHooks = NO_PROGRESS) -> DatasetIndex:
    """List the images of a dataset; download or generate a named dataset first. No image is read.

    Raises:
        UserError: no such dataset, or an unknown layout.

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
        group_by=data.group_by,
        cache=cache,
    )
    return index if data.exclude is None else exclude_images(index, Path(data.exclude))


def exclude_images(index: DatasetIndex, file: Path) -> DatasetIndex:
    """Return the index without the images that a file names. The other images keep their splits.

    Args:
        index: the examples of all splits.
        file: see `find_excluded`.

    Raises:
        UserError: see `find_excluded`; or nothing is left of a split or a class.

    """
    splits = {"train": index.train, "val": index.val, "test": index.test}
    paths = find_excluded(file, index.root, index.paths)
    excluded = {split: examples.only(paths) for split, examples in splits.items()}
    counts = ", ".join(f"{len(examples)} of {split}" for split, examples in excluded.items() if examples)
    remaining = without_images(index, paths, absent=f"is left by {describe(file)}", remedy="shorten the list")
    note = f"images left out by {describe(file)}: {len(paths)}" + (f" ({counts})" if counts else "")
    return replace(remaining, excluded=excluded, notes=(*remaining.notes, note))


def validate_examples(
    index: DatasetIndex,
    data: DataConfig,
    *,
    workers: int,
    displays: ProgressHooks = NO_PROGRESS,
    on_decoded: OnDecoded | None = None,
) -> Prepared:
    """Decode and hash every image once, except those with a cached validation result.

    Args:
        index: the examples.
        data: the data section of the config.
        workers: number of threads.
        displays: progress displays.
        on_decoded: called for each readable image that is decoded.

    Raises:
        UserError: unreadable images.

    """
    paths = index.paths
    with displays.checking() as on_checked:
        results = check_images(
            paths, cache=cache_folder(data.cache), workers=workers, on_progress=on_checked, on_decoded=on_decoded
        )
    unreadable = results.unreadable(paths)
    if unreadable and data.on_unreadable == "stop":
        raise unreadable_error(unreadable, len(paths))
    notes = list(index.notes)
    if unreadable:
        index = without_images(index, unreadable)
        skipped = "".join(f"\n  {escape_unprintable(path)}: {reason}" for path, reason in sorted(unreadable.items()))
        notes.append(f"{len(unreadable)} of {len(paths)} images cannot be read and are skipped:{skipped}")
    readable = results.where(lambda outcome: outcome.reason is None)
    digests = results.digests[readable]
    notes += [*_describe_repeats(index, digests), *_describe_pixels(paths, results)]
    deferred = None if results.deferred is None else results.deferred.select(readable)
    return Prepared(index, tuple(notes), digests, deferred)


def _describe_pixels(paths: Sequence[str], results: ValidationResults) -> Iterator[str]:
    """Yield a line for each conversion of pixels, and one for images of a single color."""
    conversions = sorted({conversion for outcome in results.outcomes for conversion in outcome.conversions})
    for conversion in conversions:
        rows = results.where(lambda outcome, conversion=conversion: conversion in outcome.conversions)  # type: ignore[misc]
        yield f"images with {conversion}: {len(rows)}, such as {escape_unprintable(paths[rows[0]])}"
    rows = results.where(lambda outcome: outcome.is_one_color)
    if len(rows):
        names = join_truncated((escape_unprintable(paths[row]) for row in rows), limit=5)
        yield f"images of one color only: {len(rows)} ({names})"


def _describe_repeats(index: DatasetIndex, digests: np.ndarray) -> Iterator[str]:
    """Yield a line if images to evaluate on are training images too, and one if an image has two classes.

    Args:
        index: the readable examples.
        digests: uint64 [N], the hash of each one, in the order train, val, test.

    """
    in_train = digests[: len(index.train)]
    first_digests, first = np.unique(in_train, return_index=True)
    labels = index.train.labels
    conflicts: list[tuple[Example, Example]] = []
    start = 0
    for examples, purpose in (
        (index.train, None),
        (index.val, "to select the best epoch on"),
        (index.test, "to report on"),
    ):
        searched = digests[start : start + len(examples)]
        start += len(examples)
        places = np.searchsorted(first_digests, searched).clip(max=len(first_digests) - 1)
        repeated = np.flatnonzero(first_digests[places] == searched)
        others = first[places[repeated]]  # the first training image of the same content
        differs = labels[others] != examples.labels[repeated]
        conflicts += [
            (examples[row], index.train[other])
            for row, other in zip(repeated[differs].tolist(), others[differs].tolist(), strict=True)
        ]
        if purpose is not None and len(repeated):
            shown = " and ".join(
                escape_unprintable(example.path) for example in (examples[repeated[0]], index.train[others[0]])
            )
            yield (
                f"WARNING: images {purpose} with the content of a training image, which make the accuracy too high: "
                f"{len(repeated)} of {len(examples)}, such as {shown}"
            )
    if conflicts:
        shown = " and ".join(
            f"{escape_unprintable(path)} ({escape_unprintable(index.classes[label])})" for path, label in conflicts[0]
        )
        yield f"WARNING: images with the content of an image of another class: {len(conflicts)}, such as {shown}"

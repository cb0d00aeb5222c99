"""Inspect a dataset: list and read its images, find its duplicates, and collect the findings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.check.duplicates import connect, describe_duplicates, find_exact, make_groups
from trainer.check.file_findings import describe_files
from trainer.check.findings import CheckResult, DuplicateGroup, Finding, ModelFindings, sort_findings
from trainer.check.groups import describe_groups
from trainer.check.images import ImageTable, read_images
from trainer.check.listing import ImageList, list_images
from trainer.check.perceptual_hash import find_near_duplicates
from trainer.check.statistics import count_images, describe_classes, describe_sizes, summarize
from trainer.config.sections.data import DataConfig
from trainer.data.progress import NO_PROGRESS, ProgressHooks

Pair = tuple[int, int]
"""Positions of two images."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The images of a dataset and what their files hold."""

    listing: ImageList
    table: ImageTable
    """In the order of the images of the listing."""
    pairs: tuple[Pair, ...]
    """Images that show the same: exact duplicates, and near-duplicates by their perceptual hash."""


def inspect(data: DataConfig, *, workers: int, near: bool = True, displays: ProgressHooks = NO_PROGRESS) -> Inspection:
    """List and read the images of a dataset, and find duplicates.

    Args:
        data: the data section of the config; `root` must be set.
        workers: number of threads.
        near: whether to search for near-duplicates too.
        displays: progress displays.

    Raises:
        UserError: there is no such dataset.

    """
    listing = list_images(data, displays=displays)
    paths = [image.path for image in listing.images]
    with displays.checking() as on_progress:
        table = read_images(paths, workers=workers, on_progress=on_progress)
    digests = [facts.digest for facts in table.facts]
    pairs = list(find_exact(digests))
    if near:
        with displays.comparing() as on_progress:
            pairs += find_near(table.thumbnails, digests, on_progress)
    return Inspection(listing=listing, table=table, pairs=tuple(pairs))


def make_result(inspection: Inspection, data: DataConfig, model: ModelFindings | None = None) -> CheckResult:
    """Return the result of an inspection.

    Args:
        inspection: the images, their files and their duplicates.
        data: the data section of the config.
        model: what a model has found besides.

    """
    model = model or ModelFindings()
    listing, table = inspection.listing, inspection.table
    images = listing.images
    digests = [facts.digest for facts in table.facts]
    groups = make_groups(images, digests, [*inspection.pairs, *model.pairs])
    counts = count_images(images)
    dataset = str(data.root)
    return CheckResult(
        root=dataset,
        classes=tuple(sorted({image.label for image in images})),
        counts=counts,
        sources=listing.sources,
        statistics=summarize(table),
        findings=sort_findings(
            [
                *describe_duplicates(images, groups, dataset=dataset, split_made=listing.split_made),
                *model.findings,
                *listing.findings,
                *describe_files(images, table),
                *describe_classes(counts),
                *describe_sizes(images, table.facts, data),
                *_describe_groups(listing, groups, dataset),
            ]
        ),
        duplicates=groups,
        label_errors=model.label_errors,
    )


def _describe_groups(listing: ImageList, duplicates: Sequence[DuplicateGroup], dataset: str) -> list[Finding]:
    if listing.index is None or listing.groups:
        return []
    return describe_groups(
        listing.images, str(listing.root), duplicates, dataset=dataset, split_made=listing.split_made
    )


def find_groups(inspection: Inspection, model: ModelFindings | None = None) -> list[int]:
    """Return a number for each image, which images that show the same or are of one group share."""
    pairs = (*inspection.pairs, *(model.pairs if model else ()))
    return connect(len(inspection.listing.images), pairs, inspection.listing.groups)


def find_near(
    thumbnails: np.ndarray, digests: Sequence[str], on_progress: Callable[[int, int], None] | None = None
) -> Iterator[Pair]:
    """Return pairs of near-duplicates by their perceptual hash. Of exact duplicates, the first one stands for all.

    Args:
        thumbnails: of all images, uint8 [N, SIZE, SIZE].
        digests: SHA-256 of each file; empty if it cannot be read.
        on_progress: called from time to time with (images compared, total images).

    """
    mask = np.zeros(len(digests), dtype=bool)
    mask[list({digest: row for row, digest in reversed([*enumerate(digests)]) if digest}.values())] = True
    return find_near_duplicates(thumbnails, mask=mask, on_progress=on_progress)

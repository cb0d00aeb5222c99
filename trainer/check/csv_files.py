"""CSV files of `regraft check`: images that training should leave out, and groups that no split should divide."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.check.findings import CheckResult, DuplicateGroup, LabeledImage
from trainer.check.listing import ImageList
from trainer.data.csv.write import GROUP_COLUMNS, write_table

_COLUMNS = ("path", "label", "split", "reason", "kept", "suggested", "margin")
_PREFERENCE = ("test", "val", "train")
"""Of the copies of an image, one is kept in the first of these splits that has one: what is measured stays the same."""


class Excluded(NamedTuple):
    """An image that training should leave out."""

    image: LabeledImage
    reason: Literal["copy", "conflicting-labels", "label-error", "data.exclude"]
    kept: str = ""
    """Of a copy, the path of the image that is kept."""
    suggested: str = ""
    """Of a label error, the class that the model finds more probable."""
    margin: float | None = None
    """Of a label error, the probability of the label minus that of the suggested class."""


def suggest_excluded(result: CheckResult) -> Iterator[Excluded]:
    """Yield the copies of all splits, and the likely label errors of the training split, each image once.

    Label errors of val and test are left to the user: without the images that a model gets wrong, the accuracy rises.
    """
    seen = set[str]()
    for group in result.duplicates:
        for excluded in _exclude_copies(group):
            seen.add(excluded.image.path)
            yield excluded
    for image, suggested, margin in result.label_errors:
        if image.split == "train" and image.path not in seen:
            yield Excluded(image, "label-error", suggested=suggested, margin=margin)


def _exclude_copies(group: DuplicateGroup) -> Iterator[Excluded]:
    """Yield all images of a group but one; also that one if another image of its split has a different class."""
    split = next(split for split in _PREFERENCE if split in group.splits)
    candidates = [image for image in group.images if image.split == split]
    kept = candidates[0] if len({image.label for image in candidates}) == 1 else None
    for image in group.images:
        if kept is None and image.split == split:
            yield Excluded(image, "conflicting-labels")
        elif image != kept:
            yield Excluded(image, "copy", kept=kept.path if kept else "")


def write_excluded(file: Path, result: CheckResult, listing: ImageList) -> int:
    """Write the images to leave out as a CSV that the option `data.exclude` reads; return their number.

    Images that `data.exclude` leaves out already are listed too, so that the CSV can take the place of that file.

    Args:
        file: the CSV.
        result: the result of the check.
        listing: the images; paths inside of its root are written relative to it.

    Raises:
        UserError: the file cannot be written.

    """
    prefix = os.path.join(listing.root, "")  # noqa: PTH118 (adds a trailing slash)
    excluded = [*(Excluded(image, "data.exclude") for image in listing.excluded), *suggest_excluded(result)]
    rows = [
        (*image, reason, kept.removeprefix(prefix), suggested, "" if margin is None else f"{margin:.4f}")
        for image, reason, kept, suggested, margin in excluded
    ]
    write_table(file, rows, columns=_COLUMNS, root=listing.root)
    return len(rows)


def write_groups(file: Path, images: Sequence[LabeledImage], groups: Sequence[int]) -> int:
    """Write all images as a CSV that is a dataset with groups and without splits; return the number of groups.

    Args:
        file: the CSV.
        images: all images.
        groups: number of the group of each image; an image that is alone in its group is written without one.

    Raises:
        UserError: the file cannot be written.

    """
    sizes = Counter(groups)
    rows = [
        (image.path, image.label, str(group) if sizes[group] > 1 else "")
        for image, group in zip(images, groups, strict=True)
    ]
    write_table(file, rows, columns=GROUP_COLUMNS)
    return sum(size > 1 for size in sizes.values())

"""Suggest `data.group_by`: file names that number the images of a patient, a burst or a video."""

# Paths are strings, as in the scan.
# ruff: noqa: PTH119

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.check.findings import DuplicateGroup, Finding, LabeledImage
from trainer.text import escape_unprintable

_WORDS = re.compile(
    r"(?P<word>patient|subject|subj|participant|person|case|study|animal|specimen|slide|plant|tree|field|plot|video|vid|"
    r"clip|movie|scene|sequence|seq|burst|session|visit|track|camera|cam|location|site|station|drone|flight)"
    r"(?P<separator>[-_ ]?)[0-9]",
    re.IGNORECASE,
)
_PATTERNS = (
    r"([^/]*[^/0-9])[0-9]+\.[^./]+$",  # everything before the last number of the name: walk_a-0001.jpg
    r"([^/]+/[^/]+)/[^/]+$",  # the folder below that of the class: bees/hive 3/001.jpg
)
_MIN_SHARE = 0.8
"""Share of the images that must be in a group with others."""
_MIN_GROUPS_PER_CLASS = 3
"""Fewer groups are other names of the classes or of their parts."""
_MIN_NEAR_SHARE = 0.05
"""Share of the images with near-duplicates, from which on they are likely to be bursts or frames of videos."""


@dataclass(frozen=True)
class GroupPattern:
    """A pattern for `data.group_by` and what it does."""

    pattern: str
    groups: Mapping[str, str]
    """Path -> group."""

    @property
    def num_groups(self) -> int:
        """Return the number of groups."""
        return len({*self.groups.values()})


def suggest_pattern(images: Sequence[LabeledImage], root: str) -> GroupPattern | None:
    """Return the pattern that divides most of the images into groups of several; None if none does.

    Args:
        images: all images.
        root: folder of the dataset, which the paths start with.

    """
    prefix = os.path.join(root, "")  # noqa: PTH118
    names = [image.path.removeprefix(prefix) for image in images]
    classes = {image.label for image in images}
    words = Counter((match["word"], match["separator"]) for name in names if (match := _WORDS.search(name)))
    candidates = [f"({word}{separator}[0-9]+)" for (word, separator), _ in words.most_common(1)]
    for pattern in (*candidates, *_PATTERNS):
        compiled = re.compile(pattern)
        groups = {
            image.path: match[1]
            for image, name in zip(images, names, strict=True)
            if (match := compiled.search(name)) and os.path.basename(match[1]).strip("-_. ") != image.label
        }
        sizes = Counter(groups.values())
        shared = sum(size for size in sizes.values() if size > 1)
        if shared >= _MIN_SHARE * len(images) and len(sizes) >= _MIN_GROUPS_PER_CLASS * len(classes):
            return GroupPattern(pattern, groups)
    return None


def describe_groups(
    images: Sequence[LabeledImage], root: str, duplicates: Sequence[DuplicateGroup], *, dataset: str, split_made: bool
) -> list[Finding]:
    """Return findings about groups that file names or near-duplicates suggest.

    Args:
        images: all images.
        root: folder of the dataset, which the paths start with.
        duplicates: groups of images that show the same.
        dataset: the dataset as the user named it, for commands.
        split_made: whether regraft divides the dataset itself.

    """
    found = suggest_pattern(images, root)
    if found is not None:
        return [_describe_pattern(found, images, split_made=split_made)]
    near = [image.path for group in duplicates if group.kind == "near" for image in group.images]
    if len(near) >= _MIN_NEAR_SHARE * len(images):
        return [
            Finding(
                kind="groups",
                severity="warning",
                message=f"{len(near)} of {len(images)} images have near-duplicates, as frames of a video have. "
                "If several images show one object, a split may divide them, and the accuracy is too high.",
                remedy="Divide the images so that near-duplicates are in one split: by --groups-csv, a column group in "
                "a CSV, or data.group_by if the file names tell the groups.",
                options=(f"regraft check {shlex.quote(dataset)} --groups-csv groups.csv", "regraft train groups.csv"),
                count=len(near),
                paths=tuple(near),
            )
        ]
    return []


def _describe_pattern(found: GroupPattern, images: Sequence[LabeledImage], *, split_made: bool) -> Finding:
    splits: dict[str, set[str]] = {}
    for image in images:
        if group := found.groups.get(image.path):
            splits.setdefault(group, set()).add(image.split)
    divided = {group for group, names in splits.items() if len(names) > 1}
    paths = tuple(image.path for image in images if found.groups.get(image.path) in divided)
    example, group = next((path, group) for path, group in found.groups.items() if not divided or group in divided)
    message = (
        f"file names suggest {found.num_groups} groups of images, such as {escape_unprintable(group)} of "
        f"{escape_unprintable(os.path.basename(example))}"
    )
    if divided:
        message += (
            f"; {len(divided)} of them have images in more than one split. If they are patients, bursts or videos, the "
            "accuracy is too high."
        )
    remedy = "If they are patients, bursts or videos, keep each group in one split"
    return Finding(
        kind="groups",
        severity="warning" if divided else "note",
        message=message if divided else f"{message}.",
        remedy=f"{remedy}:" if split_made else f"{remedy}, and divide the images anew, in one folder per class:",
        options=(f"--data.group_by {shlex.quote(found.pattern)}",),
        count=len(paths),
        paths=paths,
    )

"""Group the images of a dataset that show the same, and describe the leakage between its splits."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from trainer.check.findings import DuplicateGroup, Finding, LabeledImage, Severity
from trainer.text import escape_unprintable

_SPLIT_ORDER = ("train", "val", "test")
_ASSUMED_ACCURACY = 0.8
"""Accuracy without copies in the example of what leakage does."""


class DisjointSets:
    """Sets of positions that are merged pair by pair (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def find(self, position: int) -> int:
        """Return the smallest position of the set."""
        while (parent := self._parents[position]) != position:
            self._parents[position] = position = self._parents[parent]
        return position

    def merge(self, one: int, other: int) -> None:
        """Make one set of the sets of two positions."""
        low, high = sorted((self.find(one), self.find(other)))
        self._parents[high] = low

    def groups(self) -> list[list[int]]:
        """Return the sets of two or more positions, each in ascending order."""
        members: dict[int, list[int]] = {}
        for position in range(len(self._parents)):
            members.setdefault(self.find(position), []).append(position)
        return [group for group in members.values() if len(group) > 1]


def find_exact(digests: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the pairs (first image, later image) of equal SHA-256; an unreadable image has an empty one."""
    first: dict[str, int] = {}
    for position, digest in enumerate(digests):
        if digest and (earlier := first.setdefault(digest, position)) != position:
            yield earlier, position


def make_groups(
    images: Sequence[LabeledImage], digests: Sequence[str], pairs: Iterable[tuple[int, int]]
) -> tuple[DuplicateGroup, ...]:
    """Return the groups of images that pairs connect, those with images of several splits first, then the largest.

    Args:
        images: all images.
        digests: SHA-256 of each file; empty if it cannot be read.
        pairs: positions of two images that show the same.

    """
    sets = DisjointSets(len(images))
    for one, other in pairs:
        sets.merge(one, other)
    groups = []
    for positions in sets.groups():
        positions.sort(key=lambda position: (_SPLIT_ORDER.index(images[position].split), images[position].path))
        groups.append(
            DuplicateGroup(
                images=tuple(images[position] for position in positions),
                digests=tuple(digests[position] for position in positions),
            )
        )
    return tuple(sorted(groups, key=lambda group: (-len(group.splits), -len(group.images), group.images[0].path)))


def connect(count: int, pairs: Iterable[tuple[int, int]], groups: Mapping[int, str]) -> list[int]:
    """Return a number for each image, which images that show the same or are of one group share.

    Args:
        count: number of images.
        pairs: positions of two images that show the same.
        groups: position -> group, such as a patient, for images that have one.

    """
    sets = DisjointSets(count)
    for one, other in pairs:
        sets.merge(one, other)
    first: dict[str, int] = {}
    for position, group in groups.items():
        sets.merge(first.setdefault(group, position), position)
    return [sets.find(position) for position in range(count)]


def describe_duplicates(
    images: Sequence[LabeledImage], groups: Sequence[DuplicateGroup], *, dataset: str, split_made: bool
) -> Iterator[Finding]:
    """Yield the findings about groups of duplicates: leakage, contradicting classes, repeated training images.

    Args:
        images: all images.
        groups: those that show the same.
        dataset: the dataset as the user named it, for commands.
        split_made: whether regraft divides the dataset itself.

    """
    name = shlex.quote(dataset)
    exclude = (f"regraft check {name} --exclude-csv exclude.csv", f"regraft train {name} --data.exclude exclude.csv")
    remedy = "Train without the training copies:"
    commands: tuple[str, ...] = exclude
    if split_made:
        remedy = (
            "Train without the training copies, or divide the images so that copies are in one split: by --groups-csv, "
            "a column group in a CSV, or data.group_by."
        )
        commands = (*exclude, f"regraft check {name} --groups-csv groups.csv", "regraft train groups.csv")
    for finding in _describe_leakage(images, groups):
        yield replace(finding, remedy=remedy, options=commands)
    for finding in _describe_selection(groups):
        yield replace(finding, options=exclude)
    yield from _describe_conflicts([group for group in groups if group.kind == "exact"], "copies of one file", "error")
    yield from _describe_conflicts(
        [group for group in groups if group.kind == "near"], "near-duplicate images", "warning"
    )
    repeated = [image.path for group in groups for image in _in_split(group, "train")[1:]]
    if repeated:
        yield Finding(
            kind="repeated",
            severity="note",
            message=f"training images that repeat another training image: {len(repeated)}. Each repetition adds to the "
            "weight of its picture; a validation split that is held out from them may contain its copies.",
            remedy="Leave out the repetitions: --exclude-csv lists them.",
            count=len(repeated),
            paths=tuple(repeated),
        )


def _describe_leakage(images: Sequence[LabeledImage], groups: Sequence[DuplicateGroup]) -> Iterator[Finding]:
    for split in ("val", "test"):
        exact: list[str] = []
        near: list[str] = []
        for group in groups:
            members = [*zip(group.images, group.digests, strict=True)]
            originals = {digest for image, digest in members if image.split == "train"}
            for image, digest in members:
                if originals and image.split == split:
                    (exact if digest in originals else near).append(image.path)
        if count := len(exact) + len(near):
            total = sum(image.split == split for image in images)
            share = count / total
            reported = _ASSUMED_ACCURACY + share * (1 - _ASSUMED_ACCURACY)
            yield Finding(
                kind="leakage",
                severity="error" if exact else "warning",
                message=f"{count} of {total} {split} images ({100 * share:.1f} %) are copies of training images "
                f"({len(exact)} exact, {len(near)} near), so the {split} accuracy is too high: if the model remembers "
                f"the copies, a true {100 * _ASSUMED_ACCURACY:.1f} % is reported as {100 * reported:.1f} %.",
                count=count,
                paths=(*exact, *near),
            )


def _describe_selection(groups: Sequence[DuplicateGroup]) -> Iterator[Finding]:
    shared = [image.path for group in groups if "val" in group.splits for image in _in_split(group, "test")]
    if shared:
        yield Finding(
            kind="shared-evaluation",
            severity="warning",
            message=f"test images that are copies of validation images: {len(shared)}. The best epoch is selected on "
            "them, so the test accuracy is not independent of the selection.",
            remedy="Leave out the validation copies:",
            count=len(shared),
            paths=tuple(shared),
        )


def _describe_conflicts(groups: Sequence[DuplicateGroup], what: str, severity: Severity) -> Iterator[Finding]:
    different = [group for group in groups if len(group.labels) > 1]
    if not different:
        return
    one_of_each = {image.label: image.path for image in reversed(different[0].images)}
    shown = " and ".join(
        f"{escape_unprintable(path)} ({escape_unprintable(label)})" for label, path in list(one_of_each.items())[:2]
    )
    yield Finding(
        kind="conflicting-labels",
        severity=severity,
        message=f"groups of {what} with different classes: {len(different)}, such as {shown}.",
        remedy="Correct the labels, or leave out these images: --exclude-csv lists them.",
        count=len(different),
        paths=tuple(image.path for group in different for image in group.images),
    )


def _in_split(group: DuplicateGroup, split: str) -> list[LabeledImage]:
    return [image for image in group.images if image.split == split]

"""Groups of images by a regular expression on their paths: the option `data.group_by`."""

# Creating a Path for each of a million images would take longer than matching its name.
# ruff: noqa: PTH118

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from trainer.data import match_paths
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_MAX_LENGTH = 1000
_TIMEOUT = 60.0
"""Seconds after which matching is given up. A million paths take 2 s; nested repeats such as (a+)+ may take forever."""
_EXPECTED = (
    "expected a regular expression with one capturing group, or one named group, that matches the patient, burst or "
    "video in the path of an image relative to data.root, such as '(patient[0-9]+)' or 'video_(?P<id>[0-9]+)'"
)


def check_pattern(option: str, text: str) -> None:
    """Raise a UserError unless a text is a regular expression with one group to capture."""
    try:
        if len(text) > _MAX_LENGTH or "\0" in text:
            raise ValueError(f"it has more than {_MAX_LENGTH} characters, or a null byte")
        match_paths.capturing_group(re.compile(text))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        shown = escape_unprintable(text[:100])
        raise UserError(f"{option} is {shown}: {error}; {_EXPECTED}") from None


def find_groups(text: str, paths: Sequence[str], root: str) -> tuple[dict[str, str], str]:
    """Return path -> group for the images that have one, and a note for the user.

    Args:
        text: a regular expression that `check_pattern` has accepted.
        paths: paths of the images.
        root: folder of the dataset.

    Raises:
        UserError: no path matches, or matching takes too long.

    """
    prefix = os.path.join(root, "")
    content = "\0".join([text, *(path.removeprefix(prefix) for path in paths)])
    # Python's `re` holds the interpreter's lock while it backtracks, so only another process can be stopped.
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-I", "-S", match_paths.__file__],
            input=content.encode("utf-8", "surrogateescape"),
            stdout=subprocess.PIPE,
            timeout=_TIMEOUT,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"data.group_by is {escape_unprintable(text)}: {len(paths)} paths were not matched within {_TIMEOUT:g} s. "
            "A repeat of a repeat, such as (a+)+, may take forever: simplify the expression"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"data.group_by: the process that matches the paths has failed ({error})") from None
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    groups = {path: group for path, group in zip(paths, names, strict=True) if group}
    if not groups:
        example = escape_unprintable(paths[0].removeprefix(prefix))
        raise UserError(
            f"data.group_by is {escape_unprintable(text)}: it matches no path, such as {example}; {_EXPECTED}"
        )
    alone = len(paths) - len(groups)
    note = f"groups of data.group_by: {len({*groups.values()})} of {len(groups)} images"
    return groups, note + (f"; {alone} images do not match, and each is a group of its own" if alone else "")


def describe_divided(splits: Mapping[str, Iterable[str]], groups: Mapping[str, str]) -> list[str]:
    """Return a note if the dataset's own splits divide groups.

    Args:
        splits: split -> paths of its images.
        groups: path -> group.

    """
    splits_of: dict[str, set[str]] = {}
    images: dict[str, int] = {}
    for split, paths in splits.items():
        for path in paths:
            if group := groups.get(path):
                splits_of.setdefault(group, set()).add(split)
                images[group] = images.get(group, 0) + 1
    divided = [group for group, found in splits_of.items() if len(found) > 1]
    if not divided:
        return []
    count = sum(images[group] for group in divided)
    return [
        f"WARNING: groups with images in more than one split, which may make the accuracy too high: {len(divided)} of "
        f"{len(splits_of)}, with {count} images ({join_truncated(divided, limit=3)})"
    ]

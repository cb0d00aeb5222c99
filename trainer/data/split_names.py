"""Recognize the names that people give to the splits of a dataset: `train`, `training_set`, `seg_train`, `dev`, ..."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

SplitKind = Literal["train", "val", "test", "unlabeled"]
"""A split; `unlabeled` holds images without a class, which are not used."""

_WORDS: dict[SplitKind, str] = {
    "train": "trainval|training|train|trn|训练",  # longer words first
    "val": "validation|validate|valid|val|development|devel|dev|evaluation|eval|验证",
    "test": "testing|tests|test|tst|holdout|heldout|测试",
    "unlabeled": "predictions?|predict|pred|unlabel{1,2}ed|inference",
}
# Words that say nothing about the class or the split: seg_train, train_images, test-data, val2017.
_FILLERS = (
    "sets?|data|datasets?|splits?|images?|imgs?|pics?|pictures?|photos?|seg|folder|dir|files?|samples?|jpe?g|png|"
    "all|full|final|raw|clean|cropped|resized|集"
)
_SPLIT_NAME = re.compile(
    rf"\d*(?:{_FILLERS})*(?:{'|'.join(f'(?P<{kind}>{words})' for kind, words in _WORDS.items())})(?:{_FILLERS})*\d*"
)
_FILLER_NAME = re.compile(rf"(?:{_FILLERS})+\d*")
_NUMBERED_PART = re.compile(r".*(?:part|fold|batch|chunk|shard|subset|split|volume|images?|imgs?|set)\d+")


# Names of folders inside a class that divide its images by time or recording.
_DATE_OR_SESSION = re.compile(
    r"(?:19|20)\d\d(?:[01]\d){0,2}|(?:part|batch|chunk|shard|session|video|clip|cam|camera|sequence|seq|day|week|patient|"
    r"subject)\d+"
)


@lru_cache(maxsize=4096)
def split_kind(name: str) -> SplitKind | None:
    """Return the split that a folder name or a value of a CSV means, or None if it is not the name of a split."""
    match = _SPLIT_NAME.fullmatch(_compact(name))
    return next(kind for kind in _WORDS if match[kind]) if match else None


def split_kinds(names: Iterable[str]) -> dict[str, SplitKind]:
    """Return folder name -> split, for those of the folders of a dataset that are named as splits.

    Beside the names that `split_kind` recognizes, these are names that differ only in the word for the split, such as
    `alphabet_train` and `alphabet_test`, `trainA` and `testA`, or `A_train_input` and `A_test_input`.
    """
    names = list(names)
    kinds = {name: kind for name in names if (kind := split_kind(name))}
    groups: dict[str, dict[str, SplitKind]] = {}
    for name in names:
        for rest, kind in _without_split_word(name):
            if name not in kinds:
                groups.setdefault(rest, {})[name] = kind
    for group in groups.values():
        if len(set(group.values())) > 1:
            kinds |= group
    return kinds


def _without_split_word(name: str) -> Iterator[tuple[str, SplitKind]]:
    """Yield the rest of a name and the split for each word of a split in it."""
    compact, words_of_name = _compact(name), re.split(r"[\W_]+", name.lower())
    for kind, words in _WORDS.items():
        for rest in (re.sub(rf"^(?:{words})", "", compact), re.sub(rf"(?:{words})$", "", compact)):
            if rest != compact:
                yield rest, kind
        for position, word in enumerate(words_of_name):
            if re.fullmatch(words, word):
                yield "".join((*words_of_name[:position], " ", *words_of_name[position + 1 :])), kind


def is_wrapper(name: str, parent: str) -> bool:
    """Return whether the only folder in the split folder `parent` repeats its name, or has a general one (`images`)."""
    compact = _compact(name)
    repeats = compact == _compact(parent) or (split_kind(name) is not None and split_kind(name) == split_kind(parent))
    return repeats or _FILLER_NAME.fullmatch(compact) is not None


def are_numbered_parts(names: Iterable[str]) -> bool:
    """Return whether all names are those of parts of a dataset, such as `fold_0` or `images_part_2`."""
    compact = [_compact(name) for name in names]
    return len(compact) > 1 and all(_NUMBERED_PART.fullmatch(name) for name in compact)


def are_dates_or_sessions(names: Iterable[str]) -> bool:
    """Return whether all names are dates, or numbered sessions such as `video_3`, and so no classes."""
    return all(_DATE_OR_SESSION.fullmatch(_compact(name)) for name in names)


def share_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether two folders hold the same class folders: at least two, and half of those of the smaller one."""
    shared = len({*one} & {*other})
    return shared >= 2 and 2 * shared >= min(len(one), len(other))


def _compact(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub(r"[\W_]+", "", name.lower())

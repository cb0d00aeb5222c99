"""Which of the source's classes are those of the target: by name alone, whole names only.

`hot_dog` is `hotdog`, `ants` is `ant`; `not-hotdog` is neither, since no part of a name counts.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchvision.models import WeightsEnum

How = Literal["name", "alias", "spelling", "plural"]
_IRREGULAR = {
    "calves": "calf", "children": "child", "dice": "die", "elves": "elf", "feet": "foot", "geese": "goose",
    "halves": "half", "hooves": "hoof", "indices": "index", "knives": "knife", "leaves": "leaf", "lice": "louse",
    "lives": "life", "loaves": "loaf", "men": "man", "mice": "mouse", "oxen": "ox", "people": "person",
    "scarves": "scarf", "selves": "self", "sheaves": "sheaf", "shelves": "shelf", "teeth": "tooth",
    "thieves": "thief", "wharves": "wharf", "wives": "wife", "wolves": "wolf", "women": "woman",
}  # fmt: skip
_NO_PLURAL = ("ss", "us", "is")
"""Endings of words that an s does not make a plural: dress, bus, iris."""


@dataclass(frozen=True)
class Match:
    """A target class that the source knows."""

    target: int
    source: int
    how: How


@dataclass(frozen=True)
class Matches:
    """What a comparison of names has found."""

    found: tuple[Match, ...]
    """One for each target class at most, in their order."""
    ambiguous: tuple[tuple[int, tuple[int, ...]], ...]
    """Target class -> the several source classes of that name: none is taken."""


def match_labels(
    targets: Sequence[str], sources: Sequence[str], aliases: Mapping[str, str] | None = None
) -> Matches:
    """Return which target classes the source knows: the same name, else an alias, another spelling, a plural.

    Another spelling differs in case, spaces, hyphens and underscores alone.

    Args:
        targets: names of the target's classes.
        sources: names of the source's.
        aliases: target's name -> source's name, where they differ otherwise.

    """
    others = aliases or {}
    indexes: dict[How, dict[str, list[int]]] = {
        "name": _index((name, i) for i, name in enumerate(sources)),
        "spelling": _index((normalize_name(name), i) for i, name in enumerate(sources)),
        "plural": _index((form, i) for i, name in enumerate(sources) for form in singular(name)),
    }
    found, ambiguous = [], []
    for target, name in enumerate(targets):
        ways: list[tuple[How, Iterable[str], dict[str, list[int]]]] = [
            ("name", [name], indexes["name"]),
            ("alias", [normalize_name(others[name])] if name in others else [], indexes["spelling"]),
            ("spelling", [normalize_name(name)], indexes["spelling"]),
            ("plural", singular(name), indexes["plural"]),
        ]
        for how, forms, index in ways:
            there = sorted({i for form in forms for i in index.get(form, ())})
            if len(there) == 1:
                found.append(Match(target, there[0], how))
            elif there:
                ambiguous.append((target, tuple(there)))
            if there:
                break
    return Matches(tuple(found), tuple(ambiguous))


def _index(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    index: defaultdict[str, list[int]] = defaultdict(list)
    for form, i in pairs:
        if form:
            index[form].append(i)
    return dict(index)


def normalize_name(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def singular(name: str) -> set[str]:
    """Return the spellings that a name may have in the singular, its own among them."""
    *before, last = re.split(r"[\s_-]+", name.casefold().strip(" _-"))
    forms = {last}
    if last in _IRREGULAR:
        forms.add(_IRREGULAR[last])
    elif last.endswith("ies") and len(last) > 4:
        forms |= {last[:-3] + "y", last[:-1]}  # puppies, cookies
    elif last.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms |= {last[:-2], last[:-1]}  # buses, vases
    elif last.endswith("s") and not last.endswith(_NO_PLURAL) and len(last) > 2:
        forms.add(last[:-1])
    return {"".join([*before, form]) for form in forms}


def torchvision_labels(weights: WeightsEnum) -> tuple[str, ...]:
    """Return the class names of published weights, in the order of their rows."""
    return tuple(weights.meta["categories"])

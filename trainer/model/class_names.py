"""Match the class names of two data sets: whole names only, up to case, separators and a regular plural.

`hot_dog` matches `hotdog`, and `ants` matches `ant`. `not-hotdog` matches neither: no part of a name counts.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MatchKind = Literal["name", "alias", "spelling", "plural"]


@dataclass(frozen=True)
class Match:
    """A target class that the source model has."""

    target: int
    """Index of the target class."""
    source: int
    """Index of the source class."""
    kind: MatchKind


@dataclass(frozen=True)
class Matches:
    """Result of `match_classes`."""

    matched: tuple[Match, ...]
    """At most one match for each target class, in their order."""
    ambiguous: tuple[tuple[int, tuple[int, ...]], ...]
    """(target class, the several source classes that match it); none of them is chosen."""


def match_classes(targets: Sequence[str], sources: Sequence[str], aliases: Mapping[str, str] | None = None) -> Matches:
    """Match each target class by the same name, else by its alias, else by spelling, else as a plural.

    Spellings differ in case, spaces, hyphens and underscores.

    Args:
        targets: names of the target classes.
        sources: names of the source classes.
        aliases: target name -> source name, where they differ otherwise.

    """
    aliases = aliases or {}
    by_name = _index(sources, lambda name: {name})
    by_spelling = _index(sources, lambda name: {normalize_name(name)})
    by_singular = _index(sources, singular_forms)
    matched, ambiguous = [], []
    for target, name in enumerate(targets):
        attempts: list[tuple[MatchKind, Iterable[str], Mapping[str, list[int]]]] = [
            ("name", [name], by_name),
            ("alias", [normalize_name(aliases[name])] if name in aliases else [], by_spelling),
            ("spelling", [normalize_name(name)], by_spelling),
            ("plural", singular_forms(name), by_singular),
        ]
        for kind, forms, index in attempts:
            indices = sorted({i for form in forms if form for i in index.get(form, ())})
            if len(indices) == 1:
                matched.append(Match(target, indices[0], kind))
            elif indices:
                ambiguous.append((target, tuple(indices)))
            if indices:
                break
    return Matches(tuple(matched), tuple(ambiguous))


def _index(names: Sequence[str], forms: Callable[[str], set[str]]) -> Mapping[str, list[int]]:
    index: defaultdict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        for form in forms(name):
            index[form].append(i)
    return index


def normalize_name(name: str) -> str:
    """Return a name in lower case without spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def singular_forms(name: str) -> set[str]:
    """Return the normalized name, and what it may be in the singular: ants -> ant, boxes -> box, puppies -> puppy."""
    plain = normalize_name(name)
    forms = {plain}
    if plain.endswith("s") and not plain.endswith("ss"):
        forms.add(plain[:-1])
    if plain.endswith("es"):
        forms.add(plain[:-2])
    if plain.endswith("ies"):
        forms.add(plain[:-3] + "y")
    return forms

"""Match the classes of a dataset with those of a model, by name: an index is never taken from the order of folders."""

import difflib
from collections.abc import Mapping, Sequence

from trainer.data.class_names import describe_difference, find_lookalikes
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated, list_lines


def parse_mapping(texts: Sequence[str], names: Sequence[str], classes: Sequence[str]) -> dict[str, str | None]:
    """Return class of the data -> class of the model from texts `NAME=CLASS`, or None from `NAME=`.

    Names may contain `=`: of all ways to divide a text, the one that names two classes is taken.

    Args:
        texts: the values of --map.
        names: classes of the data.
        classes: classes of the model.

    Raises:
        UserError: a text names no class of the data, or no class of the model.

    """
    mapping: dict[str, str | None] = {}
    for text in texts:
        ways = [(text[:i], text[i + 1 :]) for i, character in enumerate(text) if character == "="]
        if not ways:
            raise UserError(f"--map {escape_unprintable(text)}: expected NAME=CLASS, or NAME= to leave a class out")
        known = [(name, target) for name, target in ways if name in names]
        if not known:
            raise UserError(
                f"--map {escape_unprintable(text)}: the data have no class {escape_unprintable(ways[0][0])}; their "
                f"classes are {join_truncated(names)}"
            )
        name, target = next(((name, target) for name, target in known if not target or target in classes), known[0])
        if target and target not in classes:
            raise UserError(
                f"--map {escape_unprintable(text)}: the model has no class {escape_unprintable(target)}"
                f"{_suggestion(target, classes)}; its classes are {join_truncated(classes, limit=20)}"
            )
        if mapping.get(name, target or None) != (target or None):
            raise UserError(f"--map: {escape_unprintable(name)} is given twice, with different classes; give it once")
        mapping[name] = target or None
    return mapping


def map_classes(
    names: Sequence[str], classes: Sequence[str], mapping: Mapping[str, str | None]
) -> dict[str, int | None]:
    """Return class of the data -> index of the model's class, or None for a class that is left out.

    Args:
        names: classes of the data.
        classes: classes of the model.
        mapping: class of the data -> class of the model, or None to leave its images out. All other classes need the
            same name in both.

    Raises:
        UserError: a class of the data is not a class of the model, or no class is left.

    """
    index = {name: number for number, name in enumerate(classes)}
    unmatched = [name for name in names if name not in mapping and name not in index]
    if unmatched:
        lines = [f"{escape_unprintable(name)}{_suggestion(name, classes)}" for name in unmatched]
        raise UserError(
            f"{len(unmatched)} of {len(names)} classes of the data are not classes of the model:"
            f"{list_lines(lines)}\nThe model's classes are {join_truncated(classes, limit=20)}. Give --map "
            "NAME=CLASS for each, or --map NAME= to leave its images out"
        )
    labels: dict[str, int | None] = {}
    for name in names:
        target = mapping.get(name, name)
        labels[name] = None if target is None else index[target]
    if all(label is None for label in labels.values()):
        raise UserError("--map leaves out every class of the data, so there is nothing to evaluate")
    return labels


def _suggestion(name: str, classes: Sequence[str]) -> str:
    alike = next((other for other in classes if find_lookalikes([name, other])), None)
    if alike is not None and alike.lower() != name.lower():  # a person could not see the difference
        return f" ({describe_difference(name, alike)})"
    by_lower = {other.lower(): other for other in reversed(classes)}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {escape_unprintable(by_lower[similar[0]])}?)" if similar else ""

"""Find the columns of a CSV that hold the path, label, split and group of an image."""

import re
from collections.abc import Iterable, Mapping, Sequence

from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

ROLES = ("path", "label", "split", "group")
"""What a column can hold."""
# Role -> recognized names, as letters and digits in lower case; names in an earlier group are preferred.
_NAMES: dict[str, tuple[frozenset[str], ...]] = {
    "path": (
        frozenset({"path"}),
        frozenset({"filepath", "filepaths", "imagepath", "imgpath", "relativepath", "fullpath", "paths"}),
        frozenset({"filename", "filenames", "file", "files", "fname", "imagename", "imgname", "imagefile", "image"})
        | {"images", "img", "picture", "photo", "imagefilename"},
        frozenset({"imageid", "imgid", "idcode", "fileid", "photoid", "id"}),
    ),
    "label": (
        frozenset({"label"}),
        frozenset({"labels", "class", "classes", "classname", "classlabel", "category", "categoryname", "target"}),
        frozenset({"classid", "labelid", "categoryid", "targetid", "breed", "species", "genus", "variety", "diagnosis"})
        | {"disease", "dx", "emotion"},
    ),
    "split": (
        frozenset({"split", "partition", "datasplit", "splitname", "splitset"}),
        frozenset({"set", "dataset", "subset", "phase", "usage"}),
    ),
    "group": (frozenset({"group", "groups", "groupid"}),),  # others, such as patient, may be more than one
}


def find_columns(where: str, header: Sequence[str], given: Mapping[str, str]) -> tuple[dict[str, int], bool]:
    """Return role -> position of its column, and whether the split column is a guess.

    It is a guess if its name is a general one, such as `set`, which may mean something else. The label may be missing:
    each class may have a column.

    Args:
        where: the CSV, for messages.
        header: the fields of the header.
        given: role -> name of its column, from the option `data.csv_columns`; the others are recognized.

    Raises:
        UserError: no column for the path, several for one role, or a given column that does not exist.

    """
    names = [_simplify(name) for name in header]
    positions: dict[str, int] = {}
    for role in ROLES:
        if role in given:
            found = [i for i, name in enumerate(header) if name.strip() == given[role].strip()]
            found = found or [i for i, name in enumerate(names) if name == _simplify(given[role])]
        else:
            groups = ([i for i, name in enumerate(names) if name in group] for group in _NAMES.get(role, ()))
            found = next(filter(None, groups), [])
        if len(found) == 1:
            positions[role] = found[0]
        elif role in given:
            problem = "several columns have" if found else "no column has"
            raise columns_error(where, header, f"data.csv_columns says {role}: {given[role]}, but {problem} this name")
        elif found:
            candidates = join_truncated(header[i] for i in found)
            raise columns_error(where, header, f"several columns may be the {role}: {candidates}")
    others = [position for role, position in positions.items() if role != "group"]
    if "group" not in given and positions.get("group") in others:
        del positions["group"]
    if "path" not in positions:
        roles = "path" if "label" in positions else "path and the label"
        raise columns_error(where, header, f"no column for the {roles} is recognized{_hint_at_header(header)}")
    if len(set(positions.values())) < len(positions):
        raise columns_error(where, header, "one column has two roles")
    is_guess = "split" in positions and "split" not in given
    return positions, is_guess and names[positions["split"]] not in _NAMES["split"][0]


def find_path_column(where: str, header: Sequence[str], name: str | None) -> int:
    """Return the position of the column of paths: the one with a name, or for None the one that is recognized.

    Args:
        where: the CSV, for messages.
        header: the fields of the header.
        name: name of the column, or None.

    Raises:
        UserError: there is no such column, or there are several.

    """
    names = [_simplify(field) for field in header]
    groups: Iterable[frozenset[str]] = _NAMES["path"] if name is None else [frozenset({_simplify(name)})]
    exact = [i for i, field in enumerate(header) if name is not None and field.strip() == name.strip()]
    found = exact or next(filter(None, ([i for i, own in enumerate(names) if own in group] for group in groups)), [])
    if len(found) == 1:
        return found[0]
    shown = join_truncated(header, limit=8) or "nothing"
    problem = "several columns may hold" if found else "no column is recognized to hold"
    if name is not None:
        problem = f"--column {escape_unprintable(name)}: {'several columns have' if found else 'no column has'}"
        raise UserError(f"{where}: {problem} this name. Its first line has {shown}")
    raise UserError(
        f"{where}: {problem} the paths of the images; expected one that is called path, or --column NAME. Its first "
        f"line has {shown}"
    )


def describe_columns(header: Sequence[str], positions: Mapping[str, int], used: set[int]) -> list[str]:
    """Return notes about columns with other names than their roles, and columns that are not `used`."""
    notes = []
    if any(header[position].strip().lower() != role for role, position in positions.items()):
        shown = join_truncated(f"{role}: {header[position].strip()}" for role, position in positions.items())
        notes.append(f"columns of the CSV: {shown}")
    others = [name.strip() for position, name in enumerate(header) if position not in used]
    if any(others):
        notes.append(f"columns of the CSV that are ignored: {join_truncated(filter(None, others))}")
    return notes


def columns_error(where: str, header: Sequence[str], problem: str) -> UserError:
    """Return the error to raise if the columns of a CSV are not understood."""
    shown = join_truncated((repr(name) if name != name.strip() else name for name in header), limit=8)
    example = escape_unprintable(header[0].strip()) or "FILE"
    return UserError(
        f"{where}: {problem}. Expected a CSV with the columns path, label and optionally split, or data.csv_columns "
        f"with their names, such as {{path: {example}, label: CLASS}}. Its first line is {shown[:300] or 'empty'}"
    )


def _hint_at_header(header: Sequence[str]) -> str:
    """Return a hint if the first line of the CSV is an image."""
    has_image = any(re.search(r"\.(?:jpe?g|png|gif|bmp|tiff?|webp)\b", name, re.IGNORECASE) for name in header)
    return ". The first line seems to be a row: put a line with the names of the columns before it" * has_image


def _simplify(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())

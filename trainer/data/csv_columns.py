"""Find the columns of a CSV that hold the path, label, split and group of an image."""

import re
from collections.abc import Mapping, Sequence

from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

ROLES = ("path", "label", "split", "group")
"""What a column can hold. A column is used as the group only if `data.csv_columns` names it."""
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
        frozenset({"split"}),
        frozenset({"set", "dataset", "datasplit", "subset", "partition", "phase", "usage", "splitname", "splitset"}),
    ),
}


def find_columns(where: str, header: Sequence[str], given: Mapping[str, str]) -> tuple[dict[str, int], bool]:
    """Return role -> position of its column, and whether the split column is a guess.

    It is a guess if its name is a general one, such as `set`, which may mean something else.

    Args:
        where: the CSV, for messages.
        header: the fields of the header.
        given: role -> name of its column, from the option `data.csv_columns`; the others are recognized.

    Raises:
        UserError: no column for the path or the label, several of them, or a given column that does not exist.

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
            raise _error(where, header, f"data.csv_columns says {role}: {given[role]}, but {problem} this name")
        elif found:
            candidates = join_truncated(header[i] for i in found)
            raise _error(where, header, f"several columns may be the {role}: {candidates}")
    missing_roles = [role for role in ("path", "label") if role not in positions]
    if missing_roles:
        one_hot = "; if each class has a column, write the name of the class into one" * (
            len(header) > 2 and missing_roles == ["label"]
        )
        raise _error(where, header, f"no column for the {' and the '.join(missing_roles)} is recognized{one_hot}")
    if len(set(positions.values())) < len(positions):
        raise _error(where, header, "one column has two roles")
    return positions, "split" in positions and "split" not in given and names[positions["split"]] != "split"


def describe_columns(header: Sequence[str], positions: Mapping[str, int]) -> list[str]:
    """Return notes about columns with other names than their roles, and columns that are ignored."""
    notes = []
    if any(header[position].strip().lower() != role for role, position in positions.items()):
        used = join_truncated(f"{role}: {header[position].strip()}" for role, position in positions.items())
        notes.append(f"columns of the CSV: {used}")
    others = [name.strip() for position, name in enumerate(header) if position not in positions.values()]
    if others:
        notes.append(f"columns of the CSV that are ignored: {join_truncated(others)}")
    return notes


def _error(where: str, header: Sequence[str], problem: str) -> UserError:
    shown = join_truncated((repr(name) if name != name.strip() else name for name in header), limit=8)
    example = escape_unprintable(header[0].strip()) or "FILE"
    return UserError(
        f"{where}: {problem}. Expected a CSV with the columns path, label and optionally split, or data.csv_columns "
        f"with their names, such as {{path: {example}, label: CLASS}}. Its first line is {shown[:300] or 'empty'}"
    )


def _simplify(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())

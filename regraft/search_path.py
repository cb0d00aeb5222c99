"""The imports of a program: other modules must not shadow those of regraft, and a signal must not interrupt them.

A program that is run by its path has its folder first on the search path, and one that is run by `python -m` has the
working folder, which may contain a `yaml.py` or a `trainer.py`. Each program replaces this entry by regraft's folder,
and then calls `protect_imports` before its other imports.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from regraft.contract import USER_ERROR
from regraft.files import IS_CHECKOUT
from regraft.startup_signals import exit_on_signals

_ROOT = Path(__file__).resolve().parents[1]
"""Folder of the packages `trainer`, `launch` and `regraft`."""
PACKAGES = ("trainer", "launch")


def protect_imports() -> None:
    """Put regraft's folder in its place on the search path, and protect the processes that this one starts.

    Exits with an error if another distribution has installed a package `trainer` or `launch`, or if the working folder
    is gone; from now on until the command sets its own handlers, also at a stop signal.
    """
    exit_on_signals()
    root = str(_ROOT)
    if IS_CHECKOUT and sys.path[0] != root:
        sys.path.insert(0, root)
    elif not IS_CHECKOUT and sys.path[0] == root and root in sys.path[1:]:
        del sys.path[0]  # the folder of all packages must come after the standard library
    try:
        folder = os.path.realpath(os.curdir)
    except FileNotFoundError:
        print("error: the working folder was deleted or moved: change to another one (cd)", file=sys.stderr)
        sys.exit(USER_ERROR)
    if Path(folder) != _ROOT:  # a checkout that is not installed is found in the working folder
        os.environ["PYTHONSAFEPATH"] = "1"
    for name in PACKAGES:
        if problem := find_conflict(name):
            print(f"error: {problem}", file=sys.stderr)
            sys.exit(USER_ERROR)


def find_conflict(package: str) -> str | None:
    """Return an error message if Python would import another package of this name than regraft's."""
    spec = PathFinder.find_spec(package)
    origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
    expected = _ROOT / package / "__init__.py"
    if origin is None or (origin.resolve() == expected and b"regraft" in expected.read_bytes()):
        return None
    from importlib.metadata import packages_distributions  # noqa: PLC0415 (slow)

    others = [name for name in packages_distributions().get(package, []) if name != "regraft"]
    owner = f"the distribution {others[0]}" if others else "another program"
    return (
        f"the module {package!r} is {origin}, which belongs to {owner} and hides regraft's: uninstall the other one or "
        "remove it from PYTHONPATH, or install regraft in a virtual environment of its own"
    )

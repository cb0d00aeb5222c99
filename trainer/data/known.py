"""`data.root` -> a folder or a CSV: what lies there, or a data set known by name."""

import os
from collections.abc import Callable
from pathlib import Path

from trainer.data import synthetic
from trainer.data.download import KNOWN, fetch
from trainer.errors import UserError

_DRAWN = {f"synthetic-{task}": task for task in synthetic.TASKS}


def known_names() -> tuple[str, ...]:
    """Return the data sets that can be asked for by name."""
    return (*sorted(KNOWN), *sorted(_DRAWN))


def is_known(root: str) -> bool:
    """Return whether `root` is a name rather than a path; what lies at a path of that name wins."""
    return root in known_names() and not Path(root).exists()


def cache_folder(asked: str | None) -> Path:
    """Return the folder of downloads, drawn data sets and verdicts: asked for, $REGRAFT_CACHE or ~/.cache/regraft."""
    return Path(asked or os.environ.get("REGRAFT_CACHE") or Path.home() / ".cache" / "regraft").expanduser().absolute()


def locate(
    root: str, *, cache: Path, seed: int, on_progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Return the folder or CSV of `root`, downloaded or drawn first where it is a known name.

    Raises:
        UserError: neither a path nor a known name, or the download failed.

    """
    if not is_known(root):
        if Path(root).exists():
            return Path(root)
        raise UserError(
            f"data.root is {root!r}: there is no such folder or CSV file, and no data set known by that name "
            f"({', '.join(known_names())})"
        )
    if root in _DRAWN:
        folder = cache / f"{root}-v{synthetic.VERSION}-seed{seed}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        synthetic.draw(_DRAWN[root], folder, seed=seed)
        return folder
    return fetch(KNOWN[root], cache, on_progress=on_progress)

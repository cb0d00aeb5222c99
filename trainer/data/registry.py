"""`data.root` -> a folder or a CSV: what lies there, or a data set known by name."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from trainer.data import synthetic
from trainer.data.download import KNOWN, cache_error, fetch
from trainer.errors import UserError

_DRAWN = {f"synthetic-{task}": task for task in synthetic.TASKS}


def known_names() -> tuple[str, ...]:
    """Return the data sets that can be asked for by name."""
    return (*sorted(KNOWN), *sorted(_DRAWN))


def is_known(root: str) -> bool:
    """Return whether `root` is a name rather than a path; what lies at a path of that name wins."""
    return root in known_names() and not Path(root).exists()


def cache_folder(asked: str | None) -> Path:
    """Return the folder of downloads, drawn data sets and verdicts: `asked` or $REGRAFT_CACHE or the default.

    Raises:
        UserError: it would lie in a home folder that does not exist.

    """
    folder = asked or os.environ.get("REGRAFT_CACHE") or "~/.cache/regraft"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:  # a container's user without a name, or a misspelt ~user
        raise UserError(
            f"the cache is to be {folder}, and there is no such home folder here: give data.cache "
            "(or $REGRAFT_CACHE) a folder by its whole path"
        ) from None


def locate(
    root: str, *, cache: Path, seed: int, on_progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Return the folder or CSV of `root`, downloaded or drawn first where it is a known name.

    Args:
        root: a path, or one of `known_names()`.
        cache: the folder of `cache_folder`; made if need be.
        seed: of the drawn data sets.
        on_progress: called with (bytes so far, bytes in all or None) while there is a download.

    Raises:
        UserError: neither a path nor a known name, the download failed, or the cache cannot be used.

    """
    if not is_known(root):
        return _existing(root)
    if root not in _DRAWN:
        return fetch(KNOWN[root], cache, on_progress=on_progress)
    folder = cache / f"{root}-v{synthetic.VERSION}-seed{seed}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        synthetic.draw(_DRAWN[root], folder, seed=seed)
    except OSError as error:
        raise cache_error(error, cache) from error
    return folder


def _existing(root: str) -> Path:
    """Return the path that `root` is."""
    if not root.strip():
        raise UserError("data.root is empty: give the folder of your images, a CSV, or a known name")
    try:
        path = Path(root).expanduser()
        if path.exists():
            return path
        why = "there is no such folder or CSV file"
    except (OSError, RuntimeError) as error:  # no permission, too long a name, no such ~user
        why = f"it cannot be looked at ({getattr(error, 'strerror', None) or error})"
    # A relative path may have been made absolute on its way here: a near miss is sought in its last part.
    near = difflib.get_close_matches(Path(root).name.lower(), known_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(
        f"data.root is {root!r}: {why}, and no data set is known by that name "
        f"({', '.join(known_names())}).{hint}"
    )

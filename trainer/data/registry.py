"""Resolve `data.root` to a folder or a CSV file: a path, or the name of a registered or synthetic dataset."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from trainer.data import synthetic
from trainer.data.download import RemoteDataset, cache_error, fetch_dataset
from trainer.errors import UserError

REGISTRY = {
    "hotdog": RemoteDataset(
        name="hotdog",
        url="http://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip",
        sha1="fba480ffa8aa7e0febbb511d181409f899b9baa5",
        folder="hotdog",
    )
}
"""Name -> dataset that is downloaded."""
_SYNTHETIC = {f"synthetic-{task}": task for task in synthetic.TASKS}


def dataset_names() -> tuple[str, ...]:
    """Return the dataset names that `data.root` accepts instead of a path."""
    return (*sorted(REGISTRY), *sorted(_SYNTHETIC))


def is_known(root: str) -> bool:
    """Return whether `root` is a dataset name; an existing file or folder of that name takes precedence."""
    return root in dataset_names() and not Path(root).exists()


def cache_folder(path: str | None) -> Path:
    """Return the folder of downloads, synthetic datasets and validation results.

    Args:
        path: the option `data.cache`; None selects $REGRAFT_CACHE or, if that is not set, ~/.cache/regraft.

    Raises:
        UserError: the path begins with ~ and there is no such home folder.

    """
    folder = path or os.environ.get("REGRAFT_CACHE") or "~/.cache/regraft"
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError:  # a container user without a home folder, or a misspelled ~user
        raise UserError(
            f"the cache folder is {folder}, and there is no such home folder here: set data.cache "
            "(or $REGRAFT_CACHE) to an absolute path"
        ) from None


def resolve_root(
    root: str, *, cache: Path, seed: int, on_progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Return the folder or CSV file of `root`; download or generate a named dataset first.

    Args:
        root: a path, or one of `dataset_names()`.
        cache: the folder returned by `cache_folder`; created if needed.
        seed: seed of synthetic datasets.
        on_progress: called during a download with (bytes downloaded, total bytes or None).

    Raises:
        UserError: neither a path nor a dataset name, a failed download or an unusable cache.

    """
    if not is_known(root):
        return _existing_path(root)
    if root in REGISTRY:
        return fetch_dataset(REGISTRY[root], cache, on_progress=on_progress)
    folder = cache / f"{root}-v{synthetic.VERSION}-seed{seed}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        synthetic.generate(_SYNTHETIC[root], folder, seed=seed)
    except OSError as error:
        raise cache_error(error, cache) from error
    return folder


def _existing_path(root: str) -> Path:
    if not root.strip():
        raise UserError("data.root is empty: set it to an image folder, a CSV file or a dataset name")
    try:
        path = Path(root).expanduser()
        if path.exists():
            return path
        reason = "there is no such folder or CSV file"
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long, no such ~user
        reason = f"it cannot be accessed ({getattr(error, 'strerror', None) or error})"
    # A relative path may have been made absolute before: compare only its last part with the names.
    similar = difflib.get_close_matches(Path(root).name.lower(), dataset_names(), n=1)
    hint = f" Did you mean {similar[0]}?" if similar else ""
    raise UserError(
        f"data.root is {root!r}: {reason}, and it is not a dataset name ({', '.join(dataset_names())}).{hint}"
    )

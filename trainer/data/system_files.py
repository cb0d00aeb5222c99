"""Recognize files and folders that operating systems, storage devices and other programs leave in a dataset."""

_NAMES = frozenset(
    {"__macosx", "_ds_store", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "lost+found"}
    | {"$recycle.bin", "system volume information", "@eadir", "@recycle", "@recently-snapshot", "@tmp"}
    | {"#recycle", "#snapshot", "thumbnails", "_thumbnails", "_thumbs", "__pycache__"}
    | {"wandb", "mlruns", "lightning_logs", "site-packages", "dist-packages", "node_modules"}
)
_PREFIXES = (".", "synophoto_thumb", "synofile_thumb")


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot or is that of a system file, thumbnails, logs or installed packages."""
    lower = name.lower()
    return lower in _NAMES or lower.startswith(_PREFIXES)

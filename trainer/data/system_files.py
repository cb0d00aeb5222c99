"""Recognize files and folders that operating systems, storage devices and archive programs leave in a dataset."""

_NAMES = frozenset(
    {"__macosx", "_ds_store", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "lost+found"}
    | {"$recycle.bin", "system volume information", "@eadir", "@recycle", "@recently-snapshot", "@tmp"}
    | {"#recycle", "#snapshot", "__pycache__"}
)
_PREFIXES = (".", "synophoto_thumb", "synofile_thumb")


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot or is that of a system file, a recycle bin or a thumbnail."""
    lower = name.lower()
    return lower in _NAMES or lower.startswith(_PREFIXES)

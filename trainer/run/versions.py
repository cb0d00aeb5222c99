"""Versions of regraft, Python and the packages that affect the results of a run."""

import sys
from importlib.metadata import PackageNotFoundError, version

from regraft.contract import own_version

__all__ = ["describe_versions", "own_version", "versions"]
_PACKAGES = ("torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow")
_OPTIONAL_PACKAGES = ("timm",)


def versions() -> dict[str, str]:
    """Return package -> version."""
    python = sys.version.split()[0]
    found = {name: version(name) for name in _PACKAGES}
    for name in _OPTIONAL_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"regraft": own_version(), "python": python, **found}


def describe_versions() -> str:
    """Return the versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())

"""Versions of regraft, Python and the packages that affect the results of a run."""

import sys
from importlib.metadata import version

from regraft.contract import own_version

__all__ = ["describe_versions", "own_version", "versions"]
_PACKAGES = ("torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return package -> version."""
    python = sys.version.split()[0]
    return {"regraft": own_version(), "python": python, **{name: version(name) for name in _PACKAGES}}


def describe_versions() -> str:
    """Return the versions on one line."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())

"""What all jobs of a cluster have in common, in one small YAML: partition, account, modules, network interface ..."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError

SITE_FILE = "REGRAFT_SITE"
"""Variable: where the site's file lies."""
DEFAULT_FILE = "~/.config/regraft/site.yaml"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster's settings; what the command line says goes before them."""

    partition: str | None = None
    """Slurm's partition."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Slurm's quality of service."""
    modules: tuple[str, ...] = ()
    """For `module load`."""
    activate: tuple[str, ...] = ()
    """A virtual environment's folder, or commands that prepare Python, each a line of words: no shell reads between."""
    nccl_interface: str | None = None
    """Network interface that the nodes talk over (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    stage: str | None = None
    """Folder of each node's own disk to which the data is copied first; may begin with $TMPDIR."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables of the environment, and their values."""


def find(given: str | None, environment: Mapping[str, str]) -> Site:
    """Return the settings of the file that was given, else of $REGRAFT_SITE, else of the user's own if there is one.

    Raises:
        LaunchError: the file cannot be read, or holds what is no setting.

    """
    named = given or environment.get(SITE_FILE)
    if named:
        return read(Path(named).expanduser())
    own = Path(DEFAULT_FILE).expanduser()
    return read(own) if own.is_file() else Site()


def read(path: Path) -> Site:
    """Return the settings that a file holds.

    Raises:
        LaunchError: as in `find`.

    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise LaunchError(f"site {path}: cannot be read ({' '.join(str(error).split())})") from None
    if content is None:
        return Site()
    valid = [item.name for item in fields(Site)]
    if not isinstance(content, dict):
        raise LaunchError(
            f"site {path}: expected settings, as in `partition: gpu`; valid: {', '.join(valid)}"
        )
    for key in content:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise LaunchError(f"site {path}: there is no setting {key!r}.{hint} Valid: {', '.join(valid)}")
    return Site(**{key: _checked(path, key, value) for key, value in content.items() if value is not None})


def _checked(path: Path, key: str, value: Any) -> Any:
    if key == "env":
        if not isinstance(value, dict):
            raise LaunchError(
                f"site {path}: env is {value!r}, expected names with values, as in `NCCL_DEBUG: WARN`"
            )
        return tuple(
            (_variable(path, name), _text(path, f"env.{name}", text)) for name, text in value.items()
        )
    if key in ("modules", "activate"):
        return tuple(_text(path, key, item) for item in (value if isinstance(value, list) else [value]))
    return _text(path, key, value)


def _variable(path: Path, name: Any) -> str:
    if not (isinstance(name, str) and _VARIABLE.fullmatch(name)):
        raise LaunchError(
            f"site {path}: env has {name!r}, expected the name of a variable: letters, digits and _"
        )
    return name


def _text(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise LaunchError(
            f"site {path}: {key} is {value!r}, expected a text; quote it if YAML reads it otherwise"
        )
    text = str(value)
    if not (text.strip() and text.isprintable()):
        raise LaunchError(f"site {path}: {key} is {text!r}, expected a text of one line that is not empty")
    return text

"""Settings that all jobs of a cluster share, in a YAML file: partition, account, modules, network interface ..."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError

SITE_VARIABLE = "REGRAFT_SITE"
"""Environment variable with the path of the site file."""
DEFAULT_FILE = "~/.config/regraft/site.yaml"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Settings of a cluster; options on the command line override them."""

    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Slurm's quality of service."""
    modules: tuple[str, ...] = ()
    """Modules for `module load`."""
    activate: tuple[str, ...] = ()
    """Folder of a virtual environment, or commands that activate Python; `&&`, `;` and `$X` are not interpreted."""
    nccl_interface: str | None = None
    """Network interface between the nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    stage: str | None = None
    """Folder on each node's local disk to which the data is copied first; may start with $TMPDIR."""
    env: tuple[tuple[str, str], ...] = ()
    """Environment variables and their values."""


def load_site(path: str | None, environment: Mapping[str, str]) -> Site:
    """Load the site file: the given one, else $REGRAFT_SITE, else ~/.config/regraft/site.yaml if it exists.

    Raises:
        LaunchError: the file cannot be read, or has an invalid setting.

    """
    chosen = path or environment.get(SITE_VARIABLE)
    if chosen:
        return read_site(Path(chosen).expanduser())
    default = Path(DEFAULT_FILE).expanduser()
    return read_site(default) if default.is_file() else Site()


def read_site(path: Path) -> Site:
    """Read a site file.

    Raises:
        LaunchError: the file cannot be read, or has an invalid setting.

    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise LaunchError(f"site {path}: cannot be read ({' '.join(str(error).split())})") from None
    if content is None:
        return Site()
    valid = [item.name for item in fields(Site)]
    if not isinstance(content, dict):
        raise LaunchError(f"site {path}: expected settings, as in `partition: gpu`; valid: {', '.join(valid)}")
    for key in content:
        if key not in valid:
            similar = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise LaunchError(f"site {path}: there is no setting {key!r}.{hint} Valid: {', '.join(valid)}")
    return Site(**{key: _convert(path, key, value) for key, value in content.items() if value is not None})


def _convert(path: Path, key: str, value: Any) -> Any:
    if key == "env":
        if not isinstance(value, dict):
            raise LaunchError(f"site {path}: env is {value!r}, expected names with values, as in `NCCL_DEBUG: WARN`")
        return tuple((_variable_name(path, name), _text(path, f"env.{name}", text)) for name, text in value.items())
    if key in ("modules", "activate"):
        return tuple(_text(path, key, item) for item in (value if isinstance(value, list) else [value]))
    return _text(path, key, value)


def _variable_name(path: Path, name: Any) -> str:
    if not (isinstance(name, str) and _VARIABLE_NAME.fullmatch(name)):
        raise LaunchError(f"site {path}: env has {name!r}, expected the name of a variable: letters, digits and _")
    return name


def _text(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise LaunchError(f"site {path}: {key} is {value!r}, expected text; quote it if YAML reads it as another type")
    text = str(value)
    if not (text.strip() and text.isprintable()):
        raise LaunchError(f"site {path}: {key} is {text!r}, expected text on one line, not empty")
    return text

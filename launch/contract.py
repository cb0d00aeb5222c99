"""All that launcher and trainer know of each other: the run folder's files, exit codes, variables of the environment.

Neither imports the other. `tests/test_contract.py` holds both to what stands here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from launch.errors import LaunchError

ATTEMPTS, METRICS, LOGS, STOP = "attempts", "metrics.jsonl", "logs", "STOP"
DONE, USER_ERROR, STOPPED, INTERRUPTED = 0, 2, 75, 130
"""The trainer's exit codes; under torchrun a stop is 0 and the last attempt says that it was one."""
DEFAULT_RUN_DIR = "runs/default"
LOG_FOLDER = "REGRAFT_LOGS"
"""Variable: where the trainer leaves what is to be read after a failure."""


def trainer_folder() -> Path:
    """Return where the trainer lies, without importing it.

    Raises:
        LaunchError: it is not installed here.

    """
    spec = find_spec("trainer")
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError(
            "the package `trainer` is not installed in this Python: pip install -e . in regraft's folder"
        )
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What one start of the trainer has written of itself (`attempts/NNNN.json`)."""

    attempt: int
    state: str
    """running, stopped, done, failed."""
    reason: str | None
    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int
    began: str
    ended: str | None
    host: str
    pid: int
    seen: float
    """When it last gave a sign of life [seconds since 1970, by the file system's clock]."""


def latest_attempt(run: Path) -> Attempt | None:
    """Return the last attempt of a run, or None if there was none or its record cannot be read."""
    try:
        names = [path.stem for path in (run / ATTEMPTS).iterdir() if path.suffix == ".json"]
        number = max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)
        path = run / ATTEMPTS / f"{number:04}.json"
        fields = json.loads(path.read_text(encoding="ascii"))
        known = {name: fields[name] for name in Attempt.__dataclass_fields__ if name != "seen"}
        return Attempt(**known, seen=path.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_number(run: Path) -> int:
    """Return the highest number that an attempt of the run has; 0 before the first."""
    try:
        names = [path.stem for path in (run / ATTEMPTS).iterdir() if path.suffix == ".json"]
    except OSError:
        return 0
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def run_folder(options: Sequence[str]) -> Path:
    """Return the run folder that the trainer will use for these options of its command line.

    As there, options count from left to right, those of a config file in its place; an unreadable file is the
    trainer's to complain of.
    """
    found: Any = None
    given = False
    for i, word in enumerate(options):
        name, equals, value = word.partition("=")
        following = value if equals else (options[i + 1] if i + 1 < len(options) else "")
        if name == "--run.dir":
            found = following
        elif name == "--config":
            given = True
            found = _dir_of(Path(following)) or found
        elif name == "--data.root":
            given = True
    if not given:
        found = found or _dir_of(trainer_folder().parent / "configs" / "quickstart.yaml")
    return Path(str(found or DEFAULT_RUN_DIR)).expanduser().absolute()


def _dir_of(config: Path) -> str | None:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    section = values.get("run") if isinstance(values, dict) else None
    found = section.get("dir") if isinstance(section, dict) else None
    return found if isinstance(found, str) else None

"""All that launcher and trainer know of each other: the run folder's files, exit codes, variables of the environment.

Neither imports the other. `tests/test_contract.py` holds both to what stands here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from launch.errors import LaunchError

ATTEMPTS, METRICS, LOGS, HANGS, STOP = "attempts", "metrics.jsonl", "logs", "hangs", "STOP"
JOB = "job-id"
"""Of `regraft submit`: the id of the last job, which may still wait in the queue."""
DONE, FAILED, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""The trainer's exit codes; under torchrun a stop is 0 and the last attempt says that it was one."""
STOP_FILE = "the file STOP"
"""An attempt's reason for a stop that a person asked for."""
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
    return _read(run / ATTEMPTS / f"{last_number(run):04}.json")


def all_attempts(run: Path) -> tuple[Attempt, ...]:
    """Return the attempts of a run in their order, as far as their records can be read."""
    found = map(_read, sorted((run / ATTEMPTS).glob("*.json")))
    return tuple(attempt for attempt in found if attempt is not None)


def _read(path: Path) -> Attempt | None:
    try:
        fields = json.loads(path.read_text(encoding="ascii"))
        known = {name: fields[name] for name in Attempt.__dataclass_fields__ if name != "seen"}
        sound = all(
            type(known[name]) is int for name in ("attempt", "step", "steps", "epoch", "epochs", "pid")
        )
        return Attempt(**known, seen=path.stat().st_mtime) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_number(run: Path) -> int:
    """Return the highest number that an attempt of the run has; 0 before the first."""
    try:
        names = [path.stem for path in (run / ATTEMPTS).iterdir() if path.suffix == ".json"]
    except OSError:
        return 0
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def new_logs(run: Path) -> Path:
    """Return a folder for the logs of a launch that none has used: numbered as its first attempt, or higher."""
    used = [int(path.name[:4]) for path in (run / LOGS).glob("[0-9][0-9][0-9][0-9]*")]
    return run / LOGS / f"{max([last_number(run), *used]) + 1:04}"


def run_folder(options: Sequence[str]) -> Path:
    """Return the run folder that the trainer will use for these options of its command line."""
    found = given(options, "run", "dir")
    if not any(word.partition("=")[0] in ("--config", "--data.root") for word in options):
        found = found or _value(trainer_folder().parent / "configs" / "quickstart.yaml", "run", "dir")
    return whole_path("run.dir", found or DEFAULT_RUN_DIR)


def whole_path(key: str, path: str) -> Path:
    """Return a path of the options as a whole one; raises a LaunchError where it names no user's home folder."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise LaunchError(
            f"{key} is {path}, and there is no such home folder here: give the whole path"
        ) from None


def given(options: Sequence[str], section: str, key: str) -> str | None:
    """Return the text that these options give `section.key`, or None.

    As in the trainer, options count from left to right, those of a config file in its place; an unreadable file is
    the trainer's to complain of.
    """
    found = None
    for i, word in enumerate(options):
        name, equals, value = word.partition("=")
        following = value if equals else (options[i + 1] if i + 1 < len(options) else "")
        if name == f"--{section}.{key}":
            found = following
        elif name == f"--{section}":  # a whole section, as YAML
            found = _inner(_loaded(following), key) or found
        elif name == "--config":
            found = _value(Path(following), section, key) or found
    return found


def _value(config: Path, section: str, key: str) -> str | None:
    try:
        values = _loaded(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _inner(values.get(section), key) if isinstance(values, dict) else None


def _loaded(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def _inner(section: object, key: str) -> str | None:
    found = section.get(key) if isinstance(section, dict) else None
    return found if isinstance(found, str) else None

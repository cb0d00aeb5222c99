"""Settings of a Slurm job beside the options of the trainer: `regraft submit`, `regraft render`, `launch.slurm.job`."""

import argparse
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.errors import LaunchError
from launch.slurm.requeue import MAX_ATTEMPTS

SEEDS = "seeds"
"""The sweep whose tasks take their number as seed."""
RUNTIMES = ("apptainer", "pyxis")
_VARIABLES = {
    "nproc": "REGRAFT_NPROC",
    "max_restarts": "REGRAFT_MAX_RESTARTS",
    "max_attempts": "REGRAFT_MAX_ATTEMPTS",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job starts the trainer, and how often."""

    nproc: int | None = None
    """Processes of each node; None: one a GPU, else one for every 8 cores."""
    max_restarts: int = 1
    """How often torchrun starts failed processes again within a start of the job."""
    max_attempts: int = MAX_ATTEMPTS
    """Attempts of the run after which the job is not queued again."""
    sweep: str | None = None
    """Of an array: `seeds`, or a file with one line of options for each task."""
    stage: str | None = None
    """Folder of each node's own disk to which the data is copied first."""
    container: str | None = None
    """Image in which the nodes' programs run."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """Who runs it."""
    mounts: tuple[str, ...] = ()
    """Further folders that are seen in the container."""

    def __post_init__(self) -> None:
        _require(self.nproc is None or self.nproc >= 1, f"--nproc {self.nproc}: expected 1 or more")
        _require(self.max_restarts >= 0, f"--max-restarts {self.max_restarts}: expected 0 or more")
        _require(self.max_attempts >= 1, f"--max-attempts {self.max_attempts}: expected 1 or more")
        _require(
            self.container_runtime in RUNTIMES,
            f"--container-runtime {self.container_runtime!r}: expected {' or '.join(RUNTIMES)}",
        )
        for name, value in (("sweep", self.sweep), ("stage", self.stage), ("container", self.container)):
            _require(
                value is None or (bool(value.strip()) and value.isprintable() and not value.startswith("-")),
                f"--{name} {value!r}: expected a name on one line",
            )
        for mount in self.mounts:
            _require(
                mount.startswith("/") and mount.isprintable() and not set(mount) & set(",:"),
                f"--mount {mount!r}: expected a whole path without a comma or a colon, which separate mounts",
            )

    def words(self) -> list[str]:
        """Return the words that `parse` reads again to the same; none for what is the default."""
        usual = Settings()
        words = [
            f"--{name.replace('_', '-')}={getattr(self, name)}"
            for name in (
                "nproc",
                "max_restarts",
                "max_attempts",
                "sweep",
                "stage",
                "container",
                "container_runtime",
            )
            if getattr(self, name) != getattr(usual, name)
        ]
        return [*words, *(f"--mount={mount}" for mount in self.mounts)]


NAMES = tuple(
    f"--{name}"
    for name in (
        "nproc",
        "max-restarts",
        "max-attempts",
        "sweep",
        "stage",
        "container",
        "container-runtime",
        "mount",
    )
)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a parser; what is not given stays None."""
    add = parser.add_argument
    add(
        "--nproc",
        metavar="N|auto",
        help="processes of each node; auto: one a GPU, else one for every 8 cores (default)",
    )
    add(
        "--max-restarts",
        metavar="K",
        help="how often torchrun starts failed processes again in a start (default: 1)",
    )
    add("--max-attempts", metavar="K", help=f"attempts of the run, over all starts (default: {MAX_ATTEMPTS})")
    add(
        "--sweep",
        metavar="seeds|FILE",
        help="of an array: the task's number as seed, or a line of options for each task",
    )
    add("--stage", metavar="FOLDER", help="copy the data there on each node first; may begin with $TMPDIR")
    add("--container", metavar="IMAGE", help="run in this image, which holds regraft")
    add("--container-runtime", choices=RUNTIMES, help="who runs it (default: apptainer)")
    add(
        "--mount",
        metavar="FOLDER",
        action="append",
        help="a further folder seen in the container; may be repeated",
    )


def settings(found: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Return what was parsed; a number that is not given is taken from the environment (REGRAFT_...).

    Raises:
        LaunchError: a value that is impossible.

    """
    texts = {name: getattr(found, name) or environment.get(variable) for name, variable in _VARIABLES.items()}
    if texts["nproc"] == "auto":
        texts["nproc"] = None
    for name, text in texts.items():
        _require(
            text is None or re.fullmatch(r"[0-9]{1,6}", text) is not None,
            f"--{name.replace('_', '-')} (or {_VARIABLES[name]}) is {text!r}: expected a whole number",
        )
    given: dict[str, Any] = {name: int(text) for name, text in texts.items() if text}
    for name in ("sweep", "stage", "container", "container_runtime"):
        if getattr(found, name) is not None:
            given[name] = getattr(found, name)
    return Settings(**given, mounts=tuple(found.mount or ()))


def sweep_options(sweep: str, task: int) -> list[str]:
    """Return the options that an array's task has of its own.

    Raises:
        LaunchError: the file cannot be read, or has no line for the task.

    """
    if sweep == SEEDS:
        return [f"--run.seed={task}"]
    lines = sweep_lines(Path(sweep))
    if task >= len(lines):
        raise LaunchError(
            f"--sweep {sweep}: has {len(lines)} lines of options, none for task {task}; "
            f"expected --array=0-{len(lines) - 1}"
        )
    return lines[task]


def sweep_lines(path: Path) -> list[list[str]]:
    """Return the options of each line of a sweep's file, quoted as in a shell; empty lines and `#` do not count.

    Raises:
        LaunchError: the file cannot be read, holds no line, or a quotation mark too many.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"--sweep {path}: cannot be read ({error}); expected a file of options, or {SEEDS}"
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(shlex.split(line))
            except ValueError as error:
                raise LaunchError(f"--sweep {path}, line {number}: {error}; quote as in a shell") from None
    _require(bool(found), f"--sweep {path}: holds no options; expected one line of them for each task")
    return found


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise LaunchError(text)

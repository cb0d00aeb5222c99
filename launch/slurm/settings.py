"""Options of a Slurm job beside the trainer's, shared by `regraft submit`, `regraft render` and `launch.slurm.job`."""

import argparse
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.errors import LaunchError, require
from launch.options import option_name
from launch.slurm.requeue import MAX_ATTEMPTS

SEEDS = "seeds"
"""The value of `--sweep` that gives each array task its index as `run.seed`."""
RUNTIMES = ("apptainer", "pyxis")
_VARIABLES = {"nproc": "REGRAFT_NPROC", "max_restarts": "REGRAFT_MAX_RESTARTS", "max_attempts": "REGRAFT_MAX_ATTEMPTS"}
_SCALAR_FIELDS = (*("nproc", "max_restarts", "max_attempts"), *("sweep", "stage", "container", "container_runtime"))


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How a job starts the trainer, and how often."""

    nproc: int | None = None
    """Number of processes per node; None: one per GPU, or one per 8 cores on nodes without GPUs."""
    max_restarts: int = 1
    """How often torchrun restarts failed processes within one start of the job."""
    max_attempts: int = MAX_ATTEMPTS
    """Number of attempts of the run after which the job is not requeued."""
    sweep: str | None = None
    """For a job array: `seeds`, or a file with one line of options for each task."""
    stage: str | None = None
    """Folder on each node's local disk to which the data is copied first."""
    container: str | None = None
    """Container image in which the nodes run the trainer."""
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """Program that runs the container."""
    mounts: tuple[str, ...] = ()
    """Additional folders to mount in the container."""

    def __post_init__(self) -> None:
        require(self.nproc is None or self.nproc >= 1, f"--nproc {self.nproc}: expected 1 or more")
        require(self.max_restarts >= 0, f"--max-restarts {self.max_restarts}: expected 0 or more")
        require(self.max_attempts >= 1, f"--max-attempts {self.max_attempts}: expected 1 or more")
        require(
            self.container_runtime in RUNTIMES,
            f"--container-runtime {self.container_runtime!r}: expected {' or '.join(RUNTIMES)}",
        )
        for name, value in (("sweep", self.sweep), ("stage", self.stage), ("container", self.container)):
            require(
                value is None or (bool(value.strip()) and value.isprintable() and not value.startswith("-")),
                f"--{name} {value!r}: expected a name on one line",
            )
        for mount in self.mounts:
            require(
                mount.startswith("/") and mount.isprintable() and not set(mount) & set(",:"),
                f"--mount {mount!r}: expected an absolute path without commas and colons, which separate mounts",
            )

    def to_argv(self) -> list[str]:
        """Return the command-line arguments that give these settings, without those at their defaults."""
        default = JobSettings()
        argv = [
            f"{option_name(name)}={getattr(self, name)}"
            for name in _SCALAR_FIELDS
            if getattr(self, name) != getattr(default, name)
        ]
        return [*argv, *(f"--mount={mount}" for mount in self.mounts)]

    @property
    def sweep_file(self) -> Path | None:
        """Return the file of a sweep; None without a sweep, or for one over seeds."""
        return None if self.sweep in (None, SEEDS) else Path(str(self.sweep))


OPTION_NAMES = (*map(option_name, _SCALAR_FIELDS), "--mount")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a parser; those that are not given are None."""
    add = parser.add_argument_group("start and restart").add_argument
    add(
        "--nproc",
        metavar="N|auto",
        help="processes per node; auto: one per GPU, or one per 8 cores without GPUs (default: auto)",
    )
    add(
        "--max-restarts",
        metavar="K",
        help="how often torchrun restarts failed processes in one start of the job (default: 1)",
    )
    add(
        "--max-attempts",
        metavar="K",
        help=f"do not requeue the job after K attempts of the run (default: {MAX_ATTEMPTS})",
    )
    add(
        "--sweep",
        metavar="seeds|FILE",
        help="in a job array, use the task index as run.seed, or one line of FILE as options per task",
    )
    add = parser.add_argument_group("data and container").add_argument
    add("--stage", metavar="FOLDER", help="copy the data to this local folder of each node; may start with $TMPDIR")
    add("--container", metavar="IMAGE", help="run in this container image, which must contain regraft")
    add("--container-runtime", choices=RUNTIMES, help="program that runs the container (default: apptainer)")
    add("--mount", metavar="FOLDER", action="append", help="mount another folder in the container; may be repeated")


def make_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> JobSettings:
    """Return the parsed settings; numbers that are not given come from the environment (REGRAFT_...).

    Raises:
        LaunchError: a value is invalid.

    """
    numbers = {name: getattr(arguments, name) or environment.get(variable) for name, variable in _VARIABLES.items()}
    if numbers["nproc"] == "auto":
        numbers["nproc"] = None
    for name, text in numbers.items():
        require(
            text is None or re.fullmatch(r"[0-9]{1,6}", text) is not None,
            f"{option_name(name)} (or {_VARIABLES[name]}) is {text!r}: expected a whole number",
        )
    values: dict[str, Any] = {name: int(text) for name, text in numbers.items() if text}
    for name in ("sweep", "stage", "container", "container_runtime"):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    return JobSettings(**values, mounts=tuple(arguments.mount or ()))


def task_options(sweep: str, task: int) -> list[str]:
    """Return the trainer's options that a sweep gives to one task of the array.

    Raises:
        LaunchError: the file cannot be read, or has no line for the task.

    """
    if sweep == SEEDS:
        return [f"--run.seed={task}"]
    lines = read_sweep(Path(sweep))
    if task >= len(lines):
        raise LaunchError(
            f"--sweep {sweep}: has {len(lines)} lines of options, none for task {task}; "
            f"expected --array=0-{len(lines) - 1}"
        )
    return lines[task]


def read_sweep(path: Path) -> list[list[str]]:
    """Return the options on each line of a sweep file, quoted as in a shell; empty lines and `#` are skipped.

    Raises:
        LaunchError: the file cannot be read, has no options, or has an unclosed quotation mark.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LaunchError(f"--sweep {path}: cannot be read ({error}); expected a file of options, or {SEEDS}") from None
    options = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                options.append(shlex.split(line))
            except ValueError as error:
                raise LaunchError(f"--sweep {path}, line {number}: {error}; quote as in a shell") from None
    require(bool(options), f"--sweep {path}: has no options; expected one line of options for each task")
    return options

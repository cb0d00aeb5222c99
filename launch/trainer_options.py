"""The trainer's options as far as the launcher reads them: the run folder, and values given on the command line."""

import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from launch.errors import LaunchError
from launch.local.process import run_trainer_program
from regraft import yaml_file
from regraft.command_line import is_dataset, join_values
from regraft.contract import CONFIG, DEFAULT_RUN_DIR, LOGS, latest_attempt_number
from regraft.files import CONFIGS, find_config


def trainer_folder() -> Path:
    """Return the folder of the package `trainer`, without importing it.

    Raises:
        LaunchError: it is not installed.

    """
    spec = find_spec("trainer")
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError("the package `trainer` is not installed in this Python: pip install -e . in regraft's folder")
    return Path(spec.submodule_search_locations[0])


def new_logs(run: Path) -> Path:
    """Return an unused folder for the logs of a launch, numbered as its first attempt or higher."""
    used = [int(path.name[:4]) for path in (run / LOGS).glob("[0-9][0-9][0-9][0-9]*")]
    return run / LOGS / f"{max([latest_attempt_number(run), *used]) + 1:04}"


def run_folder(options: Sequence[str]) -> Path:
    """Return the run folder that the trainer will use for these options of its command line."""
    value = option_value(options, "run", "dir")
    if not any(is_dataset(word) or word.startswith(("--config=", "--data.root=")) for word in join_values(options)):
        value = value or _value(CONFIGS / "quickstart.yaml", "run", "dir")
    return absolute_path("run.dir", value or DEFAULT_RUN_DIR)


def choose_run_folder(options: Sequence[str]) -> Path | None:
    """Return the run folder of a training run; None if the trainer refuses the options, and has said why.

    If the default folder holds a run, the trainer decides whether these options belong to it.
    """
    folder = run_folder(options)
    is_default = folder == absolute_path("run.dir", DEFAULT_RUN_DIR) and option_value(options, "run", "dir") is None
    if not is_default or not (folder / CONFIG).exists():
        return folder
    program = trainer_folder() / "commands" / "run_folder.py"
    done = run_trainer_program(program, options, stdout=subprocess.PIPE)
    return Path(done.stdout.rstrip("\n")) if done.returncode == 0 else None


def absolute_path(key: str, path: str) -> Path:
    """Return an absolute path; raises a LaunchError if it starts with a `~user` that does not exist."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise LaunchError(f"{key} is {path}, and there is no such home folder here: give the whole path") from None


def option_value(options: Sequence[str], section: str, key: str) -> str | None:
    """Return the value that these options give `section.key`, or None.

    As in the trainer, options count from left to right, with those of a config file in its place. The trainer reports
    a file that cannot be read.
    """
    result = None
    for word in join_values(options):
        name, _, value = word.partition("=")
        if name == f"--{section}.{key}":
            result = value
        elif name == "--config":
            result = _value(find_config(value), section, key) or result
        elif is_dataset(word) and (section, key) == ("data", "root"):
            result = word
    return result


def _value(config: Path, section: str, key: str) -> str | None:
    """Return the value of an option in a config file, or None."""
    try:
        values = yaml_file.load(config)
    except yaml_file.ERRORS:
        return None
    if not isinstance(values, dict):
        return None
    options = values.get(section)
    value = options.get(key) if isinstance(options, dict) else values.get(f"{section}.{key}")
    return str(value) if isinstance(value, str | date) else None

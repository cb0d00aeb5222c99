"""The runs in one folder, such as `runs/`: the state of each, and the options in which they differ."""

from pathlib import Path
from typing import Any

from regraft import yaml_file
from regraft.contract import ATTEMPTS, CONFIG, JOB_ID

_NOT_COMPARED = ("run.dir", "run.resume")


def find_runs(parent: Path) -> list[Path]:
    """Return the run folders directly below a folder, without archived runs (`NAME.earlier-N`)."""
    folders = (path for path in parent.iterdir() if path.is_dir() and ".earlier-" not in path.name)
    return sorted(path for path in folders if any((path / name).exists() for name in (ATTEMPTS, JOB_ID)))


def differing_options(runs: list[Path]) -> list[str]:
    """Return for each run the options in which the runs differ, as `optim.lr 0.1, train.epochs 5`."""
    configs = [read_options(run) for run in runs]
    keys = sorted({key for config in configs for key in config} - set(_NOT_COMPARED))
    known = [config for config in configs if config]
    differing = [key for key in keys if any(config.get(key) != known[0].get(key) for config in known)]
    return [", ".join(f"{key} {config[key]}" for key in differing if key in config) for config in configs]


def read_options(run: Path) -> dict[str, Any]:
    """Return the options of a run by their dotted names; empty if its config cannot be read."""
    try:
        values = yaml_file.load(run / CONFIG)
    except yaml_file.ERRORS:
        return {}
    return dict(yaml_file.flatten(values)) if isinstance(values, dict) else {}

"""What differs between the experiment trackers: how accelerate's classes are started, resumed, and given pictures."""

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from trainer.errors import UserError
from trainer.report.tracker_entries import Entry

Service = Literal["tensorboard", "wandb", "mlflow", "trackio"]
_SECONDS_TO_FINISH = 20.0


@dataclass(frozen=True, kw_only=True)
class TrackerRun:
    """A run in a tracker."""

    project: str
    """Project that the run belongs to; an experiment in MLflow."""
    name: str
    folder: Path
    """Folder for local files of trackers."""
    id: str | None
    """Identity of the tracker's run to continue; None starts a new one."""


def check_installed(services: Sequence[str]) -> None:
    """Raise a UserError for a tracker whose package is not installed."""
    for service in services:
        spec = importlib.util.find_spec(service)
        if spec is None or spec.origin is None:  # a folder of that name, as wandb creates one
            raise UserError(
                f"run.trackers contains {service}, which is not installed: pip install 'regraft[{service}]', or remove "
                "it from run.trackers"
            )


def start(service: Service, run: TrackerRun, config: Mapping[str, Any]) -> GeneralTracker:
    """Start a run in a tracker, or continue one, and send the config: option -> value."""
    tracker = _make(service, run)
    tracker.start()
    # A run of MLflow keeps the config that it began with, and refuses another one. Trackio forgets it.
    if run.id is None or service in ("wandb", "trackio"):
        _send_config(service, tracker, {key: _plain(value) for key, value in config.items()})
    return tracker


def _make(service: Service, run: TrackerRun) -> GeneralTracker:
    token = secrets.token_hex(4)
    match service:
        case "tensorboard":
            # A run that starts anew in the same folder replaces the events of an earlier start.
            return TensorBoardTracker("tensorboard", run.folder, purge_step=0 if run.id is None else None)
        case "wandb":
            import wandb  # noqa: PLC0415

            wandb.setup(wandb.Settings(silent=True))  # without a key, it raises an error instead of asking for one
            settings = {"silent": True, "console": "off", "finish_timeout": _SECONDS_TO_FINISH}
            return WandBTracker(
                run.project, name=run.name, id=run.id or token, resume="allow", dir=str(run.folder), settings=settings
            )
        case "mlflow":
            # What could not be sent is sent again later: by default, MLflow would retry for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
            for name in ("alembic", "mlflow"):  # they log each step of the creation of a database
                logging.getLogger(name).setLevel(logging.WARNING)
            return MLflowTracker(run.project, run_id=run.id, run_name=run.name)
        case "trackio":  # knows a run by its name
            return TrackioTracker(
                run.project, name=run.id or f"{run.name}-{token}", resume="allow" if run.id else "never", embed=False
            )


def _send_config(service: Service, tracker: Any, config: dict[str, Any]) -> None:
    if service != "tensorboard":
        tracker.store_init_configuration(config)
        return
    # accelerate would write the options into a run of their own, apart from the curves.
    from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415

    for summary in hparams(config, {}):
        tracker.tracker.file_writer.add_summary(summary)


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def send(service: Service, tracker: Any, entry: Entry) -> None:
    """Send an entry."""
    tracker.log(entry.values, step=entry.step)
    for name, path in entry.pictures.items():
        if service == "mlflow":
            tracker.log_artifact(str(path))
            continue
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if service == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=entry.step, dataformats="NHWC")
        elif service == "wandb":
            tracker.log_images({name: [pixels]}, step=entry.step)
        else:
            import trackio  # noqa: PLC0415

            tracker.log({name: trackio.Image(pixels)}, step=entry.step)


def run_id(service: Service, tracker: Any) -> str:
    """Return the identity by which a later start continues the tracker's run."""
    match service:
        case "tensorboard":
            return "tensorboard"  # the folder
        case "wandb":
            return str(tracker.tracker.id)
        case "mlflow":
            return str(tracker.tracker.info.run_id)
        case "trackio":
            return str(tracker.tracker.name)


def location(service: Service, tracker: Any, run: TrackerRun) -> str:
    """Return where a person finds the run: a URL, a folder, or its name."""
    match service:
        case "tensorboard":
            return str(run.folder / "tensorboard")
        case "wandb":
            return str(tracker.tracker.url or tracker.tracker.dir)
        case "mlflow":
            import mlflow  # noqa: PLC0415

            return f"{mlflow.get_tracking_uri()}, experiment {run.project}, run {tracker.tracker.info.run_name}"
        case "trackio":
            return f"project {run.project}, run {tracker.tracker.name}"

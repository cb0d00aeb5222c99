"""Experiment trackers of a run: TensorBoard, Weights & Biases, MLflow and Trackio, through accelerate's classes.

`Accelerator.log` calls the trackers in turn, in the thread that trains: a tracker that waits for its server would delay
the training, and one that fails would end it. Here each tracker has a thread of its own. Only rank 0 has trackers.
"""

import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from regraft import yaml_file
from regraft.contract import CONFIG, CURVES, EVALUATION, TRACKERS
from trainer.errors import UserError
from trainer.evaluation.pictures import CONFUSION, write_confusion
from trainer.report.metrics import Row
from trainer.report.tracker_entries import final_entry, to_entries
from trainer.report.tracker_services import Service, TrackerRun
from trainer.report.tracker_thread import TrackerThread
from trainer.run.session import OpenRun

_SECONDS_TO_FINISH, _SECONDS_AFTER_ERROR = 20.0, 5.0
"""How long to wait for the trackers at the end of a run, and after a stop or an error."""


class Trackers:
    """Sends the metrics of a run to its trackers. Without trackers, it does nothing."""

    def __init__(self, services: Sequence[Service], project: str, run: OpenRun) -> None:
        """Take the names of the trackers, the project of the run in them, and the run at the start of a phase."""
        self._services, self._project, self._run = services, project, run
        self._folder = run.folder / TRACKERS
        self._threads: list[TrackerThread] = []

    def start(self, rows: Sequence[Row], *, finished_at: int | None = None) -> None:
        """Start the run in each tracker, or continue it.

        Args:
            rows: rows of metrics.jsonl so far; none for a new run. Each tracker receives those that it lacks.
            finished_at: updates of a run that is finished: a tracker that has received everything is left alone.

        Raises:
            UserError: a tracker could not be started.

        """
        if not self._services:
            return
        run = self._run
        try:
            self._folder.mkdir(exist_ok=True)
            config = dict(yaml_file.flatten(yaml.safe_load((run.folder / CONFIG).read_text(encoding="utf-8"))))
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror}); free some disk space") from None
        name = run.root.resolve().name + (f"-{run.folder.name}" if run.folder != run.root else "")
        tracker_run = TrackerRun(project=self._project, name=name, folder=self._folder, id=None)
        threads = [
            TrackerThread(service, tracker_run, resumed=bool(rows), check=run.check_lock, warn=run.console.print)
            for service in self._services
        ]
        self._threads = [thread for thread in threads if finished_at is None or not thread.has_finished(finished_at)]
        with _no_output():
            for thread in self._threads:
                thread.start(config)
        locations = [f"{thread.service} ({thread.location})" for thread in self._threads if thread.location]
        if locations:
            run.console.print(f"trackers: {', '.join(locations)}")
        self.log(rows)

    def log(self, rows: Iterable[Row]) -> None:
        """Send rows of metrics.jsonl. Return at once."""
        if self._threads:
            for entry in to_entries(rows):
                for thread in self._threads:
                    thread.put(entry)

    def finish(self, step: int) -> None:
        """Send evaluation.json, curves.png and the confusion matrix of a run of `step` updates, and end it."""
        if not self._threads:
            return
        try:
            evaluation = json.loads((self._run.folder / EVALUATION).read_text(encoding="utf-8"))
            pictures = {"curves": self._run.folder / CURVES, "confusion": self._draw_confusion(evaluation)}
            entry = final_entry(step, evaluation, {name: path for name, path in pictures.items() if path.exists()})
        except (OSError, ValueError, KeyError) as error:
            self._run.console.print(f"warning: {EVALUATION} was not sent to the trackers ({error})")
        else:
            for thread in self._threads:
                thread.put(entry)
        self._end(_SECONDS_TO_FINISH)

    def _draw_confusion(self, evaluation: Mapping[str, Any]) -> Path:
        path, split = self._folder / CONFUSION, evaluation["splits"]["test"]
        if split["confusion_matrix"] is not None:
            classes = split["per_class"]["classes"]
            write_confusion(path, split["confusion_matrix"], classes, title="test", warn=self._run.console.print)
        return path

    @contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """End the run in each tracker if the block raises an error or is asked to stop."""
        try:
            yield
        except BaseException:
            self._end(_SECONDS_AFTER_ERROR)
            raise

    def _end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with _no_output():
            for thread in self._threads:
                thread.end()
            for thread in self._threads:
                thread.join(max(0.1, deadline - time.monotonic()))


def _no_output() -> redirect_stdout[io.StringIO]:
    """Hide what trackers print while the main thread waits for them."""
    return redirect_stdout(io.StringIO())

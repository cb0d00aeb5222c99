"""The evaluation at the end of a run: of its model file, on each split, with the predictions of all examples.

If the process is killed or stopped, the next start repeats it. `evaluation.json` is written last, and removed before
another model file is written.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor, nn

from regraft.contract import EVALUATION, MODEL, PREDICTIONS
from trainer.distributed.broadcast import load_from_rank_0, prepare_for_eval
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations, Interrupted
from trainer.evaluation.calibration import calibrated_metrics, fit_temperature
from trainer.evaluation.predictions import Predictions, write_predictions
from trainer.evaluation.recorded import EpochEvaluator, RecordedEvaluation, RecordingEvaluator, record
from trainer.evaluation.report import make_report, to_json
from trainer.model.file import load, read_state
from trainer.model.metadata import ModelMetadata, read_metadata, update_metadata
from trainer.run.atomic import write_text_atomically
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun
from trainer.state import TrainState


class FinalEvaluation:
    """Evaluates the model file of a finished run, and writes `evaluation.json` and `predictions.csv`."""

    def __init__(
        self, run: OpenRun, paths: Mapping[str, Sequence[str]], classes: Sequence[str], calibrate_on: str | None
    ) -> None:
        """Take the run and its data.

        Args:
            run: the open run folder.
            paths: split -> paths of its examples, in order.
            classes: names of the classes.
            calibrate_on: split that the temperature is fitted on; None: the model is not calibrated.

        """
        self._run, self._paths, self._classes, self._calibrate_on = run, paths, classes, calibrate_on
        self._epochs: EpochEvaluator | None = None

    def record_epochs(self, evaluate: RecordingEvaluator, state: TrainState) -> EpochEvaluator:
        """Return what evaluates each epoch, and keeps the predictions of the best one, so that `write` may take them.

        Args:
            evaluate: evaluates the splits.
            state: the training state, which has the best epoch.

        """
        self._epochs = EpochEvaluator(evaluate, state)
        return self._epochs

    def write(
        self, make_model: Callable[[], nn.Module], evaluate: RecordingEvaluator, *, step: int, is_of_epoch: bool = False
    ) -> None:
        """Evaluate the model file and write the results, unless that is done. Every process must call it.

        Args:
            make_model: returns the unwrapped model, on its device and prepared for its precision. Its weights are
                overwritten.
            evaluate: evaluates the splits.
            step: updates completed.
            is_of_epoch: whether the model file has the weights of an epoch. Its evaluation is taken, unless an earlier
                start of the run has made it.

        Raises:
            UserError: the model file cannot be read, or a file cannot be written.
            Stopped: the run was asked to stop; the same command repeats the evaluation.

        """
        run = self._run
        metadata = run.ctx.broadcast(run.ctx.main_process_first(self._metadata_if_due))
        if metadata is None:
            return
        recorded = self._epochs.find(metadata.metrics.get("step")) if is_of_epoch and self._epochs else None
        if recorded is None:
            recorded = self._evaluate(make_model(), evaluate, step)
        predictions = {split: gatherer.predictions() for split, gatherer in recorded.gatherers.items()}
        run.ctx.main_process_first(lambda: self._write(metadata, recorded.evaluations, predictions))

    def _evaluate(self, model: nn.Module, evaluate: RecordingEvaluator, step: int) -> RecordedEvaluation:
        """Return the evaluation of the model file."""
        run = self._run
        with run.signals.deferred(), run.watchdog(Heartbeat(step=step)) as heartbeat:
            load_from_rank_0(run.ctx, model, lambda: self._read_weights(model))

            def interrupted() -> bool:
                heartbeat.tick(step)
                return run.signal_received() > 0

            try:
                return record(evaluate, model, interrupted)
            except Interrupted:
                run.raise_if_signaled(saved="the end of training, before the final evaluation")
                raise

    def load_for_eval(self, *, channels_last: bool) -> nn.Module:
        """Return a finished run's model for evaluation, on its device and prepared for its precision."""
        run = self._run
        return prepare_for_eval(run.ctx, lambda: load(run.folder / MODEL).module, channels_last=channels_last)

    def _read_weights(self, model: nn.Module) -> dict[str, Tensor]:
        path = self._run.folder / MODEL
        try:
            return read_state(path, model.state_dict())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def _metadata_if_due(self) -> ModelMetadata | None:
        """Return the header of the model file on rank 0; None if its evaluation was written already."""
        folder = self._run.folder
        if not self._run.is_writer:
            return None
        metadata = read_metadata(folder / MODEL)
        if metadata is None:
            raise UserError(f"{folder / MODEL}: was not written by this run; restore that file")
        try:
            is_done = "splits" in json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, RecursionError):  # missing or damaged
            is_done = False
        return None if is_done and (folder / PREDICTIONS).exists() else metadata

    def _write(
        self, metadata: ModelMetadata, evaluations: Evaluations, predictions: Mapping[str, Predictions | None]
    ) -> None:
        if not self._run.is_writer:
            return
        folder, complete = self._run.folder, {split: entry for split, entry in predictions.items() if entry is not None}
        reports = {split: make_report(entry, self._classes) for split, entry in complete.items()}
        for split, report in reports.items():
            if report.evaluation.support != evaluations[split].support:
                raise RuntimeError(f"{split}: the predictions and the evaluation count different examples")
        temperature = fit_temperature(complete[self._calibrate_on]) if self._calibrate_on else None
        fields = {
            "model": MODEL,
            "epoch": metadata.metrics.get("epoch"),
            "step": metadata.metrics.get("step"),
            "temperature": temperature,
            "calibrated": {}
            if temperature is None
            else {split: asdict(calibrated_metrics(entry, temperature)) for split, entry in complete.items()},
            "splits": {split: report.to_fields() for split, report in reports.items()},
        }
        with saving_to(folder / EVALUATION):
            self._run.check_lock()
            if temperature != metadata.temperature:
                update_metadata(folder / MODEL, temperature=temperature)
            tables = {split: (self._paths[split], entry) for split, entry in complete.items()}
            write_predictions(folder / PREDICTIONS, tables, self._classes)
            write_text_atomically(folder / EVALUATION, to_json(fields))

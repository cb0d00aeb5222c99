"""WiSE-FT: average the initial and the fine-tuned weights (Wortsman et al. 2022, Robust fine-tuning of zero-shot
models).

The weights (1 - alpha) * initial + alpha * fine-tuned are evaluated for eleven values of alpha. The best ones on the
validation split are written into the run's model file. If the process is killed, the next start repeats this from the
same two files: `initial.safetensors` and the best epoch's weights, which are saved as `fine-tuned.safetensors` before
`model.safetensors` gets other weights.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from regraft.contract import MODEL
from trainer.distributed.broadcast import broadcast_state_dict, prepare_for_eval
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Evaluations, Interrupted, SelectBy
from trainer.model.file import load, read_state
from trainer.model.load_state import load_state
from trainer.model.metadata import ModelMetadata, read_metadata, write_model
from trainer.run.atomic import sync_folder, write_text_atomically
from trainer.run.folder import FINE_TUNED, INITIAL, WISE, remove_evaluation, saving_to
from trainer.run.session import OpenRun

ALPHAS = tuple(tenths / 10 for tenths in range(11))

StateDict = dict[str, Tensor]


class EvaluateSplits(Protocol):
    """Evaluates splits over all processes."""

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], splits: Sequence[str] | None = None
    ) -> Evaluations:
        """Return split -> evaluation."""


@dataclass(frozen=True, kw_only=True)
class AlphaResult:
    """Evaluation of one alpha on the validation split."""

    alpha: float
    accuracy: float
    loss: float
    value: float
    """Metric that selects alpha; higher is better, so a log loss is negative."""


def interpolate(initial: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> StateDict:
    """Return (1 - alpha) * initial + alpha * tuned, exact at both ends. Integer tensors are the fine-tuned model's."""
    return {
        name: torch.lerp(initial[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def best_alpha(results: Sequence[AlphaResult]) -> AlphaResult:
    """Return the result of the best metric; then the lowest loss, then the highest alpha."""
    return max(results, key=lambda result: (result.value, -result.loss, result.alpha))


class WiseFT:
    """WiSE-FT of one run; it does nothing if transfer.wise_ft is off. Every process must call its methods."""

    def __init__(self, run: OpenRun, split: str | None, select_by: SelectBy = "accuracy") -> None:
        """Take the run, the split to select alpha on (None turns WiSE-FT off), and the metric to select it by."""
        self._run = run
        self._split = split
        self._select_by = select_by

    def save_initial_weights(self, model: nn.Module, metadata: ModelMetadata, *, resumed: bool) -> None:
        """Save the model before its first update. If the run is resumed, restore its best epoch's model instead.

        Raises:
            UserError: the file of initial weights of a resumed run is missing, or a file cannot be written.

        """
        if self._split is not None:
            self._run.ctx.main_process_first(lambda: self._save_initial_weights(None if resumed else model, metadata))

    def _save_initial_weights(self, new: nn.Module | None, metadata: ModelMetadata) -> None:
        if not self._run.is_writer:
            return
        folder = self._run.folder
        with saving_to(folder / INITIAL):
            self._run.check_lock()
            if new is None:
                _require_initial(folder)
            else:
                write_model(folder / INITIAL, new.state_dict(), metadata)
            (folder / WISE).unlink(missing_ok=True)
            sync_folder(folder)  # first: if that file were left, WiSE-FT would count as done
            if new is None and _is_moved(folder):
                remove_evaluation(folder)
                (folder / FINE_TUNED).replace(folder / MODEL)
            (folder / FINE_TUNED).unlink(missing_ok=True)
            sync_folder(folder)

    def select_alpha(self, make_model: Callable[[], nn.Module], evaluate: EvaluateSplits, *, step: int) -> float:
        """Write the best weights into the model file of a finished run, unless that is done. Return their alpha.

        Args:
            make_model: returns the unwrapped model, on its device and prepared for its precision. Its weights are
                overwritten.
            evaluate: evaluates splits.
            step: updates completed.

        Raises:
            UserError: a file of weights cannot be read or written.
            Stopped: the run was asked to stop; the same command repeats WiSE-FT.

        """
        if self._split is None:
            return 1.0
        run, split = self._run, self._split
        alpha, tuned_path = run.ctx.broadcast(_read_result(run.folder) if run.ctx.is_main_process else (None, Path()))
        if alpha is not None:
            return alpha
        model = make_model()
        with run.signals.deferred(), run.watchdog(Heartbeat(step=step)) as heartbeat:
            initial = self._broadcast_state_dict(model, run.folder / INITIAL)
            tuned = self._broadcast_state_dict(model, tuned_path)

            def interrupted() -> bool:
                heartbeat.tick(step)
                return run.signal_received() > 0

            def evaluate_alpha(alpha: float, split: str) -> Evaluation:
                load_state(model, interpolate(initial, tuned, alpha))
                return evaluate(model, interrupted, (split,))[split]

            try:
                results, summary = _evaluate_alphas(evaluate_alpha, split, self._select_by)
            except Interrupted:
                run.raise_if_signaled(saved="the end of training, before transfer.wise_ft was evaluated")
                raise
            run.ctx.main_process_first(lambda: self._write_result(summary, results, initial, tuned, tuned_path))
        run.console.print(_table(results, summary, split))
        return summary["alpha"]

    def load_for_eval(self, *, channels_last: bool) -> nn.Module:
        """Return a finished run's model for evaluation, on its device and prepared for its precision."""
        folder = self._run.folder

        def read() -> nn.Module:
            _require_initial(folder)
            return load(folder / INITIAL).module

        return prepare_for_eval(self._run.ctx, read, channels_last=channels_last)

    def _broadcast_state_dict(self, model: nn.Module, path: Path) -> StateDict:
        def read() -> StateDict:
            if path.name == INITIAL:
                _require_initial(path.parent)
            try:
                return read_state(path, model.state_dict())
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

        return broadcast_state_dict(self._run.ctx, model, read)

    def _write_result(
        self,
        summary: Mapping[str, float],
        results: Sequence[AlphaResult],
        initial: StateDict,
        tuned: StateDict,
        tuned_path: Path,
    ) -> None:
        """Write the best weights into the run's model file, and then the result, on rank 0."""
        if not self._run.is_writer:
            return
        folder, metadata = self._run.folder, read_metadata(tuned_path)
        if metadata is None:
            raise UserError(
                f"{tuned_path}: was not written by this run. Restore that file, or start anew with --run.resume "
                "never, which archives the run"
            )
        with saving_to(folder / MODEL):
            self._run.check_lock()
            remove_evaluation(folder)
            if summary["alpha"] < 1:
                if tuned_path.name == MODEL:
                    write_model(folder / FINE_TUNED, tuned, metadata)
                metrics = {**metadata.metrics, "wise_ft": dict(summary)}
                best = interpolate(initial, tuned, summary["alpha"])
                write_model(folder / MODEL, best, _of_other_weights(metadata, metrics))
            elif tuned_path.name != MODEL:  # an earlier evaluation with other rounding selected another alpha
                (folder / FINE_TUNED).replace(folder / MODEL)
            points = [dataclasses.asdict(result) for result in results]
            write_text_atomically(folder / WISE, json.dumps({**summary, "points": points}, indent=1) + "\n")


def _of_other_weights(metadata: ModelMetadata, metrics: Mapping[str, Any]) -> ModelMetadata:
    """Return the header of other weights of the same model: a calibration belongs to the weights it was fitted to."""
    return dataclasses.replace(metadata, metrics=metrics, temperature=None, unknown=None)


def read_test_accuracy(folder: Path) -> float:
    """Return the test accuracy of the weights that WiSE-FT wrote into a run's model file.

    Raises:
        UserError: the result cannot be read.

    """
    try:
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / WISE}: damaged or missing ({error}): delete it, and the next start writes it again"
        ) from None


def _require_initial(folder: Path) -> None:
    if not (folder / INITIAL).exists():
        raise UserError(
            f"{folder / INITIAL}: is missing, and transfer.wise_ft needs it: the model before its first update. "
            "Restore that file, or start anew with --run.resume never, which archives the run"
        )


def _read_result(folder: Path) -> tuple[float | None, Path]:
    """Return (alpha of the model file, or None if WiSE-FT is not done; path of the fine-tuned weights)."""
    tuned = folder / (FINE_TUNED if _is_moved(folder) else MODEL)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: WiSE-FT is repeated
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["alpha"]), tuned
    return None, tuned


def _evaluate_alphas(
    evaluate: Callable[[float, str], Evaluation], split: str, select_by: SelectBy
) -> tuple[tuple[AlphaResult, ...], dict[str, float]]:
    """Return the result of each alpha on the split, and the summary of the selection."""
    evaluations = {alpha: evaluate(alpha, split) for alpha in ALPHAS}
    results = tuple(
        AlphaResult(alpha=a, accuracy=e.accuracy, loss=e.loss, value=e.score(select_by)[0])
        for a, e in evaluations.items()
    )
    best = best_alpha(results)
    tuned = evaluate(1.0, "test")  # after the selection, which must not depend on it
    test = tuned if best.alpha == 1 else evaluate(best.alpha, "test")
    return results, {
        "alpha": best.alpha,
        f"{split}_accuracy": best.accuracy,
        f"{split}_loss": best.loss,
        f"{split}_accuracy_of_fine_tuned": results[-1].accuracy,
        f"{split}_loss_of_fine_tuned": results[-1].loss,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_accuracy_of_fine_tuned": tuned.accuracy,
        "test_loss_of_fine_tuned": tuned.loss,
    }


def _table(results: Sequence[AlphaResult], summary: Mapping[str, float], split: str) -> Table:
    """Return the results as a table with the best alpha marked."""
    test, tuned = summary["test_accuracy"], summary["test_accuracy_of_fine_tuned"]
    selection = (
        f"alpha {summary['alpha']:g} is the best on {split} and is written to {MODEL}; test accuracy {test:.3f}, "
        f"{tuned:.3f} for alpha 1"
        if summary["alpha"] < 1
        else f"alpha 1 is the best on {split}, and {MODEL} is not changed; test accuracy {test:.3f}"
    )
    title = f"WiSE-FT, from the initial weights (alpha 0) to the fine-tuned weights (alpha 1): {selection}"
    table = Table("alpha", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in (f"{split} accuracy", f"{split} loss", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        mark = "best" if result.alpha == summary["alpha"] else ""
        table.add_row(f"{result.alpha:g}", f"{result.accuracy:.3f}", f"{result.loss:.4f}", mark)
    return table


def _is_moved(folder: Path) -> bool:
    """Return whether the best epoch's weights are in `fine-tuned.safetensors`, not in `model.safetensors`."""
    if not (folder / FINE_TUNED).exists():
        return False
    try:
        metadata = read_metadata(folder / MODEL)
    except UserError:  # missing or damaged
        return True
    return metadata is None or "wise_ft" in metadata.metrics

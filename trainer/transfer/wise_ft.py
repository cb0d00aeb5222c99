"""WiSE-FT: average the initial and the fine-tuned weights (Wortsman et al. 2022, Robust fine-tuning of zero-shot
models).

The weights (1 - alpha) * initial + alpha * fine-tuned are evaluated for eleven values of alpha, and the best on the
validation split become the run's model file. There is no training. A process that is killed repeats it from the same
two files: `initial.safetensors`, and the best epoch's weights, which are moved to `fine-tuned.safetensors` before
other weights take their place in `model.safetensors`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from regraft.contract import MODEL
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Evaluations, Interrupted
from trainer.model.file import load, read_state
from trainer.model.metadata import ModelMetadata, read_metadata, write_model
from trainer.run.atomic import sync_folder, write_text_atomically
from trainer.run.folder import FINE_TUNED, INITIAL, WISE, saving_to
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


def interpolate(initial: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> StateDict:
    """Return (1 - alpha) * initial + alpha * tuned, exact at both ends. Integer tensors are the fine-tuned model's."""
    return {
        name: torch.lerp(initial[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def best_alpha(results: Sequence[AlphaResult]) -> AlphaResult:
    """Return the result of the highest accuracy; then the lowest loss, then the highest alpha."""
    return max(results, key=lambda result: (result.accuracy, -result.loss, result.alpha))


class WiseFT:
    """WiSE-FT of one run; it does nothing where transfer.wise_ft is off. Every process must call its methods."""

    def __init__(self, run: OpenRun, split: str | None) -> None:
        """Take the run, and the split to select alpha on; None turns WiSE-FT off."""
        self._run = run
        self._split = split

    def save_initial_weights(self, model: nn.Module, metadata: ModelMetadata, *, resumed: bool) -> None:
        """Save the model before its first update. A resumed run keeps its file, and gets its best epoch's model back.

        Raises:
            UserError: the run is resumed and its file of initial weights is gone; or a file cannot be written.

        """
        if self._split is not None:
            self._run.ctx.main_process_first(
                lambda: self._save_initial_weights(None if resumed else model, metadata)
            )

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
            sync_folder(folder)  # before the rest: with that file, WiSE-FT would count as done
            if new is None and _is_moved(folder):
                (folder / FINE_TUNED).replace(folder / MODEL)
            (folder / FINE_TUNED).unlink(missing_ok=True)
            sync_folder(folder)

    def select_alpha(
        self, make_model: Callable[[], nn.Module], evaluate: EvaluateSplits, *, step: int
    ) -> float:
        """Write the best weights into the model file of a finished run, unless that is done; return their alpha.

        Args:
            make_model: returns the unwrapped model, on its device, prepared for its precision. Its weights are
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
        alpha, tuned_path = run.ctx.broadcast(
            _read_result(run.folder) if run.ctx.is_main_process else (None, Path())
        )
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
                model.load_state_dict(interpolate(initial, tuned, alpha))
                return evaluate(model, interrupted, (split,))[split]

            try:
                results, summary = _evaluate_alphas(evaluate_alpha, split)
            except Interrupted:
                run.raise_if_signaled(saved="the end of training, before transfer.wise_ft was evaluated")
                raise
            run.ctx.main_process_first(
                lambda: self._write_result(summary, results, initial, tuned, tuned_path)
            )
        run.console.print(_table(results, summary, split))
        return summary["alpha"]

    def load_for_eval(self, *, channels_last: bool) -> nn.Module:
        """Return a finished run's model, to be evaluated: on its device, for its precision, in no process group."""
        ctx = self._run.ctx

        def read() -> nn.Module:
            _require_initial(self._run.folder)
            return load(self._run.folder / INITIAL).model

        model = ctx.main_process_first(read).to(ctx.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        prepared: nn.Module = ctx.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def _broadcast_state_dict(self, model: nn.Module, path: Path) -> StateDict:
        """Return the tensors of a model file as rank 0 reads it: other machines may still see an earlier file."""
        ctx = self._run.ctx

        def read() -> StateDict | None:
            if not ctx.is_main_process:
                return None
            if path.name == INITIAL:
                _require_initial(path.parent)
            try:
                return read_state(path, model.state_dict())
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

        state = ctx.main_process_first(read)
        result = {}
        for name, tensor in model.state_dict().items():
            value = torch.empty_like(tensor) if state is None else state[name].to(tensor.device)
            if ctx.world_size > 1:
                value = value.contiguous()
                torch.distributed.broadcast(value, src=0)
            result[name] = value
        return result

    def _write_result(
        self,
        summary: Mapping[str, float],
        results: Sequence[AlphaResult],
        initial: StateDict,
        tuned: StateDict,
        tuned_path: Path,
    ) -> None:
        """Write the best weights into the run's model file, and then the result; on rank 0 alone."""
        if not self._run.is_writer:
            return
        folder, metadata = self._run.folder, read_metadata(tuned_path)
        if metadata is None:
            raise UserError(
                f"{tuned_path}: is not what the run has written. Restore that file, or --run.resume never, which "
                "archives the run"
            )
        with saving_to(folder / MODEL):
            self._run.check_lock()
            if summary["alpha"] < 1:
                if tuned_path.name == MODEL:
                    write_model(folder / FINE_TUNED, tuned, metadata)
                metrics = {**metadata.metrics, "wise_ft": dict(summary)}
                best = interpolate(initial, tuned, summary["alpha"])
                write_model(folder / MODEL, best, dataclasses.replace(metadata, metrics=metrics))
            elif tuned_path.name != MODEL:  # evaluated again, with other rounding
                (folder / FINE_TUNED).replace(folder / MODEL)
            points = [dataclasses.asdict(result) for result in results]
            write_text_atomically(folder / WISE, json.dumps({**summary, "points": points}, indent=1) + "\n")


def read_test_accuracy(folder: Path) -> float:
    """Return the test accuracy of the weights that WiSE-FT put into a run's model file.

    Raises:
        UserError: the result cannot be read.

    """
    try:
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / WISE}: damaged, or gone ({error}): delete it, and the next start writes it again"
        ) from None


def _require_initial(folder: Path) -> None:
    if not (folder / INITIAL).exists():
        raise UserError(
            f"{folder / INITIAL} is gone, and transfer.wise_ft needs it: the model before its first update. Restore "
            "that file, or --run.resume never, which archives the run"
        )


def _read_result(folder: Path) -> tuple[float | None, Path]:
    """Return the alpha of the model file, None if WiSE-FT is not done; and the path of the fine-tuned weights."""
    tuned = folder / (FINE_TUNED if _is_moved(folder) else MODEL)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: WiSE-FT is done again
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["alpha"]), tuned
    return None, tuned


def _evaluate_alphas(
    evaluate: Callable[[float, str], Evaluation], split: str
) -> tuple[tuple[AlphaResult, ...], dict[str, float]]:
    """Return the result of each alpha, and the summary that is written."""
    evaluations = {alpha: evaluate(alpha, split) for alpha in ALPHAS}
    results = tuple(AlphaResult(alpha=a, accuracy=e.accuracy, loss=e.loss) for a, e in evaluations.items())
    best = best_alpha(results)
    tuned = evaluate(1.0, "test")  # only now, so that nothing is selected by it
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
    """Return the results as a table, the best one marked."""
    test, tuned = summary["test_accuracy"], summary["test_accuracy_of_fine_tuned"]
    verdict = (
        f"alpha {summary['alpha']:g} is the best on {split} and becomes {MODEL}; test accuracy {test:.3f}, {tuned:.3f} "
        "for alpha 1"
        if summary["alpha"] < 1
        else f"alpha 1 is the best on {split}, and {MODEL} stays as it is; test accuracy {test:.3f}"
    )
    title = f"WiSE-FT, from the initial weights (alpha 0) to the fine-tuned ones (alpha 1): {verdict}"
    table = Table("alpha", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in (f"{split} accuracy", f"{split} loss", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        mark = "best" if result.alpha == summary["alpha"] else ""
        table.add_row(f"{result.alpha:g}", f"{result.accuracy:.3f}", f"{result.loss:.4f}", mark)
    return table


def _is_moved(folder: Path) -> bool:
    """Return whether `model.safetensors` holds interpolated weights, and `fine-tuned.safetensors` the best epoch's."""
    if not (folder / FINE_TUNED).exists():
        return False
    try:
        metadata = read_metadata(folder / MODEL)
    except UserError:  # gone, or damaged
        return True
    return metadata is None or "wise_ft" in metadata.metrics

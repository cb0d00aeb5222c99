"""WiSE-FT: the line between the start and the fine-tuned weights, and its best point on the images to select on.

Fine-tuning may forget what the source knew; half-way back some of it is there again (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models"). No training: eleven evaluations. Whatever kills it, it is done again from the same
two ends: `start.safetensors`, and the best epoch's weights, which are set aside as `fine-tuned.safetensors` before
another point takes their place in `model.safetensors`.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext, main_process_first
from trainer.distributed.signals import Stopped, StopSignals
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Interrupted
from trainer.loop import Evaluations
from trainer.model.file import ModelMetadata, load, read_metadata, read_state, write_model
from trainer.run.atomic import sync_folder, write_text_atomically
from trainer.run.folder import FINE_TUNED, MODEL, START, WISE, saving_to
from trainer.run.lock import RunLock

ALPHAS = tuple(tenths / 10 for tenths in range(11))
"""Shares of the way from the start to the fine-tuned weights."""

StateDict = dict[str, Tensor]


class EvaluateSplits(Protocol):
    """Evaluates named parts of the data, over all processes."""

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], parts: Sequence[str] | None = None
    ) -> Evaluations:
        """Return part -> evaluation."""


@dataclass(frozen=True, kw_only=True)
class AlphaResult:
    """A point of the line, and what it is worth on the images to select on."""

    alpha: float
    accuracy: float
    loss: float


def interpolate(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> StateDict:
    """Return (1 - alpha) start + alpha tuned, exact at both ends; of integers, the fine-tuned model's."""
    return {
        name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def best_alpha(points: Sequence[AlphaResult]) -> AlphaResult:
    """Return the point of the highest accuracy; of equals that of the lowest loss, then the nearest to fine-tuned."""
    return max(points, key=lambda point: (point.accuracy, -point.loss, point.alpha))


@dataclass(frozen=True, kw_only=True)
class WiseFT:
    """The line of a run: its start is kept, and in the end its best point. All processes call it together."""

    folder: Path
    """Of the run."""
    split: str | None
    """Of the data, to select on; None: there is no such search."""
    ctx: DistributedContext
    attempt: RunLock | None
    """Rank 0's right to write; None elsewhere."""
    signals: StopSignals
    watch: Callable[[Heartbeat], AbstractContextManager[Heartbeat]]
    """Makes what notices that this process hangs."""
    log: Callable[[object], None]

    def save_initial_weights(self, model: nn.Module, description: ModelMetadata, *, goes_on: bool) -> None:
        """Keep the model before its first update, and put an extended run's best epoch back: training follows.

        Raises:
            UserError: the run goes on and its start is not there any more, or a file could not be written.

        """
        if self.split is not None:
            main_process_first(
                self.ctx.accelerator,
                lambda: _save_initial_weights(
                    self.folder, None if goes_on else model, description, self.attempt
                ),
            )

    def select_alpha(self, make: Callable[[], nn.Module], evaluate: EvaluateSplits, *, step: int) -> float:
        """Keep the best point as the model file of a finished run, if that is not done; return its alpha.

        Args:
            make: returns the model, bare, on its device, prepared for its precision; it is left at some point.
            evaluate: over all processes.
            step: updates that were made.

        Raises:
            UserError: one of the two ends cannot be read, or the best point not be written.
            Stopped: the run was asked to stop; the same command does it again.

        """
        if self.split is None:
            return 1.0
        alpha, tuned_path = self.ctx.broadcast(
            _read_result(self.folder) if self.ctx.is_main_process else (None, Path())
        )
        if alpha is not None:
            return alpha
        model, part = make(), self.split
        with self.signals.deferred(), self.watch(Heartbeat(step=step)) as heartbeat:
            start, tuned = (
                _broadcast_state_dict(model, path, self.ctx) for path in (self.folder / START, tuned_path)
            )

            def interrupted() -> bool:
                asked = self._asked() > 0
                heartbeat.tick(step)
                return asked

            def accuracy_at(alpha: float, part: str) -> Evaluation:
                model.load_state_dict(interpolate(start, tuned, alpha))
                return evaluate(model, interrupted, (part,))[part]

            try:
                points, figures = _evaluate_alphas(accuracy_at, part)
            except Interrupted:
                before = "the end of training, before the line of transfer.wise_ft was evaluated"
                raise Stopped(signal.Signals(self._asked()).name, saved=before) from None
            main_process_first(
                self.ctx.accelerator,
                lambda: _write_result(self.folder, figures, points, start, tuned, tuned_path, self.attempt),
            )
        self.log(_table(points, figures, part))
        return figures["alpha"]

    def _asked(self) -> int:
        return self.ctx.all_reduce_max([self.signals.received or 0])[0]


def load_for_eval(folder: Path, ctx: DistributedContext, *, channels_last: bool) -> nn.Module:
    """Return a finished run's model to evaluate: on its device, for its precision, in no process group."""

    def read() -> nn.Module:
        require_start(folder)
        return load(folder / START).model

    model = main_process_first(ctx.accelerator, read).to(ctx.accelerator.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    prepared: nn.Module = ctx.accelerator.prepare_model(model, evaluation_mode=True)
    return prepared


def require_start(folder: Path) -> None:
    """Raise a UserError where the run goes on and its start is not there any more."""
    if not (folder / START).exists():
        raise UserError(
            f"{folder / START} is gone, and transfer.wise_ft needs it: the model before its first update. Restore that "
            "file, or --run.resume never, which moves the run aside"
        )


def _save_initial_weights(
    folder: Path, new: nn.Module | None, description: ModelMetadata, attempt: RunLock | None
) -> None:
    if attempt is None:
        return
    with saving_to(folder / START):
        attempt.check()
        if new is None:
            require_start(folder)
        else:
            write_model(folder / START, new.state_dict(), description)
        (folder / WISE).unlink(missing_ok=True)
        sync_folder(folder)  # first: with that file, the line would count as evaluated
        if new is None and _is_moved(folder):
            (folder / FINE_TUNED).replace(folder / MODEL)
        (folder / FINE_TUNED).unlink(missing_ok=True)
        sync_folder(folder)


def test_accuracy(folder: Path) -> float:
    """Return the test accuracy of the point that was kept as a run's model file.

    Raises:
        UserError: what was found on the line cannot be read.

    """
    try:
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["test_accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / WISE}: damaged, or gone ({error}): delete it, and it is made again"
        ) from None


def _read_result(folder: Path) -> tuple[float | None, Path]:
    """Return which point the model file is, if the line was evaluated; and where the fine-tuned weights are."""
    tuned = folder / (FINE_TUNED if _is_moved(folder) else MODEL)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: it is evaluated again
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["alpha"]), tuned
    return None, tuned


def _evaluate_alphas(
    at: Callable[[float, str], Evaluation], part: str
) -> tuple[tuple[AlphaResult, ...], dict[str, float]]:
    """Return the points of the line, and what is written of the best and of the last of them."""
    found = {alpha: at(alpha, part) for alpha in ALPHAS}
    points = tuple(AlphaResult(alpha=a, accuracy=e.accuracy, loss=e.loss) for a, e in found.items())
    best = best_alpha(points)
    tuned = at(1.0, "test")  # only now, so that nothing is chosen by it
    test = tuned if best.alpha == 1 else at(best.alpha, "test")
    return points, {
        "alpha": best.alpha,
        f"{part}_accuracy": best.accuracy,
        f"{part}_loss": best.loss,
        f"{part}_accuracy_of_fine_tuned": points[-1].accuracy,
        f"{part}_loss_of_fine_tuned": points[-1].loss,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_accuracy_of_fine_tuned": tuned.accuracy,
        "test_loss_of_fine_tuned": tuned.loss,
    }


def _broadcast_state_dict(model: nn.Module, path: Path, ctx: DistributedContext) -> StateDict:
    """Return the tensors of a model file as rank 0 reads it: another machine may see an earlier file there yet."""

    def read() -> StateDict | None:
        if not ctx.is_main_process:
            return None
        if path.name == START:
            require_start(path.parent)
        try:
            return read_state(path, model.state_dict())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    state = main_process_first(ctx.accelerator, read)
    shared = {}
    for name, tensor in model.state_dict().items():
        value = torch.empty_like(tensor) if state is None else state[name].to(tensor.device)
        if ctx.world_size > 1:
            value = value.contiguous()
            torch.distributed.broadcast(value, src=0)
        shared[name] = value
    return shared


def _write_result(  # noqa: PLR0917 (all of it is written)
    folder: Path,
    figures: Mapping[str, float],
    points: Sequence[AlphaResult],
    start: StateDict,
    tuned: StateDict,
    tuned_path: Path,
    attempt: RunLock | None,
) -> None:
    """Write the best point as the run's model file, and then what was found; rank 0 alone does."""
    if attempt is None:
        return
    description = read_metadata(tuned_path)
    if description is None:
        raise UserError(
            f"{tuned_path}: is not what the run has written. Restore that file, or --run.resume never, which moves the "
            "run aside"
        )
    with saving_to(folder / MODEL):
        attempt.check()
        if figures["alpha"] < 1:
            if tuned_path.name == MODEL:
                write_model(folder / FINE_TUNED, tuned, description)
            described = dataclasses.replace(
                description, metrics={**description.metrics, "wise_ft": dict(figures)}
            )
            write_model(folder / MODEL, interpolate(start, tuned, figures["alpha"]), described)
        elif tuned_path.name != MODEL:  # evaluated again, by other arithmetic
            (folder / FINE_TUNED).replace(folder / MODEL)
        curve = [dataclasses.asdict(point) for point in points]
        write_text_atomically(folder / WISE, json.dumps({**figures, "points": curve}, indent=1) + "\n")


def _table(points: Sequence[AlphaResult], figures: Mapping[str, float], part: str) -> Table:
    """Return the line as a table: the best point is marked."""
    tested, tuned = figures["test_accuracy"], figures["test_accuracy_of_fine_tuned"]
    found = (
        f"{figures['alpha']:g} is the best on {part} and becomes {MODEL}; test accuracy {tested:.3f}, at 1 {tuned:.3f}"
        if figures["alpha"] < 1
        else f"1 is the best on {part}, and {MODEL} stays as it is; test accuracy {tested:.3f}"
    )
    title = f"the line from the start (0) to the fine-tuned weights (1): {found}"
    table = Table("alpha", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in (f"{part} accuracy", f"{part} loss", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        mark = "best" if point.alpha == figures["alpha"] else ""
        table.add_row(f"{point.alpha:g}", f"{point.accuracy:.3f}", f"{point.loss:.4f}", mark)
    return table


def _is_moved(folder: Path) -> bool:
    """Return whether another point of the line stands in the place of the best epoch's weights."""
    if not (folder / FINE_TUNED).exists():
        return False
    try:
        description = read_metadata(folder / MODEL)
    except UserError:  # gone, or damaged
        return True
    return description is None or "wise_ft" in description.metrics

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

from trainer.distributed.context import Runtime, in_turn
from trainer.distributed.signals import Stopped, StopSignals
from trainer.distributed.watchdog import Beats
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Interrupted
from trainer.loop import Evaluations
from trainer.model.file import Description, load, read_description, read_state, write_model
from trainer.run.atomic import sync_folder, write_text_atomically
from trainer.run.folder import FINE_TUNED, MODEL, START, WISE, saving
from trainer.run.lock import Attempt

ALPHAS = tuple(tenths / 10 for tenths in range(11))
"""Shares of the way from the start to the fine-tuned weights."""

State = dict[str, Tensor]


class Evaluate(Protocol):
    """Evaluates named parts of the data, over all processes."""

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], parts: Sequence[str] | None = None
    ) -> Evaluations:
        """Return part -> evaluation."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the line, and what it is worth on the images to select on."""

    alpha: float
    accuracy: float
    loss: float


def between(start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> State:
    """Return (1 - alpha) start + alpha tuned, exact at both ends; of integers, the fine-tuned model's."""
    return {
        name: torch.lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.items()
    }


def best_of(points: Sequence[Point]) -> Point:
    """Return the point of the highest accuracy; of equals that of the lowest loss, then the nearest to fine-tuned."""
    return max(points, key=lambda point: (point.accuracy, -point.loss, point.alpha))


@dataclass(frozen=True, kw_only=True)
class Search:
    """The line of a run: its start is kept, and in the end its best point. All processes call it together."""

    folder: Path
    """Of the run."""
    part: str | None
    """Of the data, to select on; None: there is no such search."""
    machine: Runtime
    attempt: Attempt | None
    """Rank 0's right to write; None elsewhere."""
    signals: StopSignals
    watch: Callable[[Beats], AbstractContextManager[Beats]]
    """Makes what notices that this process hangs."""
    say: Callable[[object], None]

    def begin(self, model: nn.Module, description: Description, *, goes_on: bool) -> None:
        """Keep the model before its first update, and put an extended run's best epoch back: training follows.

        Raises:
            UserError: the run goes on and its start is not there any more, or a file could not be written.

        """
        if self.part is not None:
            in_turn(
                self.machine.accelerator,
                lambda: _begin(self.folder, None if goes_on else model, description, self.attempt),
            )

    def settle(self, make: Callable[[], nn.Module], evaluate: Evaluate, *, step: int) -> float:
        """Keep the best point as the model file of a finished run, if that is not done; return its alpha.

        Args:
            make: returns the model, bare, on its device, prepared for its precision; it is left at some point.
            evaluate: over all processes.
            step: updates that were made.

        Raises:
            UserError: one of the two ends cannot be read, or the best point not be written.
            Stopped: the run was asked to stop; the same command does it again.

        """
        if self.part is None:
            return 1.0
        alpha, tuned_path = self.machine.from_main(
            _stand(self.folder) if self.machine.is_main else (None, Path())
        )
        if alpha is not None:
            return alpha
        model, part = make(), self.part
        with self.signals.as_flags(), self.watch(Beats(step=step)) as beats:
            start, tuned = (_shared(model, path, self.machine) for path in (self.folder / START, tuned_path))

            def interrupted() -> bool:
                asked = self._asked() > 0
                beats.beat(step)
                return asked

            def accuracy_at(alpha: float, part: str) -> Evaluation:
                model.load_state_dict(between(start, tuned, alpha))
                return evaluate(model, interrupted, (part,))[part]

            try:
                points, figures = _walked(accuracy_at, part)
            except Interrupted:
                before = "the end of training, before the line of transfer.wise_ft was evaluated"
                raise Stopped(signal.Signals(self._asked()).name, saved=before) from None
            in_turn(
                self.machine.accelerator,
                lambda: _keep(self.folder, figures, points, start, tuned, tuned_path, self.attempt),
            )
        self.say(_table(points, figures, part))
        return figures["alpha"]

    def _asked(self) -> int:
        return self.machine.agree([self.signals.asked or 0])[0]


def alone(folder: Path, machine: Runtime, *, channels_last: bool) -> nn.Module:
    """Return a finished run's model to evaluate: on its device, for its precision, in no process group."""

    def read() -> nn.Module:
        require_start(folder)
        return load(folder / START).model

    model = in_turn(machine.accelerator, read).to(machine.accelerator.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    prepared: nn.Module = machine.accelerator.prepare_model(model, evaluation_mode=True)
    return prepared


def require_start(folder: Path) -> None:
    """Raise a UserError where the run goes on and its start is not there any more."""
    if not (folder / START).exists():
        raise UserError(
            f"{folder / START} is gone, and transfer.wise_ft needs it: the model before its first update. Restore that "
            "file, or --run.resume never, which moves the run aside"
        )


def _begin(folder: Path, new: nn.Module | None, description: Description, attempt: Attempt | None) -> None:
    if attempt is None:
        return
    with saving(folder / START):
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


def _stand(folder: Path) -> tuple[float | None, Path]:
    """Return which point the model file is, if the line was evaluated; and where the fine-tuned weights are."""
    tuned = folder / (FINE_TUNED if _is_moved(folder) else MODEL)
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # damaged: it is evaluated again
        return float(json.loads((folder / WISE).read_text(encoding="utf-8"))["alpha"]), tuned
    return None, tuned


def _walked(at: Callable[[float, str], Evaluation], part: str) -> tuple[tuple[Point, ...], dict[str, float]]:
    """Return the points of the line, and what is written of the best and of the last of them."""
    found = {alpha: at(alpha, part) for alpha in ALPHAS}
    points = tuple(Point(alpha=a, accuracy=e.accuracy, loss=e.loss) for a, e in found.items())
    best = best_of(points)
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


def _shared(model: nn.Module, path: Path, machine: Runtime) -> State:
    """Return the tensors of a model file as rank 0 reads it: another machine may see an earlier file there yet."""

    def read() -> State | None:
        if not machine.is_main:
            return None
        if path.name == START:
            require_start(path.parent)
        try:
            return read_state(path, model.state_dict())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    state = in_turn(machine.accelerator, read)
    shared = {}
    for name, tensor in model.state_dict().items():
        value = torch.empty_like(tensor) if state is None else state[name].to(tensor.device)
        if machine.world > 1:
            value = value.contiguous()
            torch.distributed.broadcast(value, src=0)
        shared[name] = value
    return shared


def _keep(  # noqa: PLR0917 (all of it is written)
    folder: Path,
    figures: Mapping[str, float],
    points: Sequence[Point],
    start: State,
    tuned: State,
    tuned_path: Path,
    attempt: Attempt | None,
) -> None:
    """Write the best point as the run's model file, and then what was found; rank 0 alone does."""
    if attempt is None:
        return
    description = read_description(tuned_path)
    if description is None:
        raise UserError(
            f"{tuned_path}: is not what the run has written. Restore that file, or --run.resume never, which moves the "
            "run aside"
        )
    with saving(folder / MODEL):
        attempt.check()
        if figures["alpha"] < 1:
            if tuned_path.name == MODEL:
                write_model(folder / FINE_TUNED, tuned, description)
            described = dataclasses.replace(
                description, metrics={**description.metrics, "wise_ft": dict(figures)}
            )
            write_model(folder / MODEL, between(start, tuned, figures["alpha"]), described)
        elif tuned_path.name != MODEL:  # evaluated again, by other arithmetic
            (folder / FINE_TUNED).replace(folder / MODEL)
        curve = [dataclasses.asdict(point) for point in points]
        write_text_atomically(folder / WISE, json.dumps({**figures, "points": curve}, indent=1) + "\n")


def _table(points: Sequence[Point], figures: Mapping[str, float], part: str) -> Table:
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
        description = read_description(folder / MODEL)
    except UserError:  # gone, or damaged
        return True
    return description is None or "wise_ft" in description.metrics

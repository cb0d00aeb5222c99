"""WiSE-FT: interpolated weights, the selected alpha, and the run's files after a kill between any two of them."""

import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from regraft.contract import MODEL
from tests.trainer.runs import MODEL_METADATA, make_run
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Evaluations, Interrupted
from trainer.model.metadata import read_metadata, write_model
from trainer.run.folder import FINE_TUNED, INITIAL, WISE
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun
from trainer.transfer import wise_ft as wise_ft_module
from trainer.transfer.wise_ft import ALPHAS, AlphaResult, WiseFT, best_alpha, interpolate


def make_net(value: float) -> nn.Module:
    """Return a network with BatchNorm in which all weights and statistics have the same value."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    for tensor in net.state_dict().values():
        tensor.fill_(value)
    return net


def test_interpolation_is_linear_and_exact_at_both_ends() -> None:
    torch.manual_seed(5)
    initial, tuned = (nn.BatchNorm2d(2).state_dict() for _ in range(2))
    for state, num_batches in ((initial, 3), (tuned, 9)):
        state |= {name: torch.randn(2) for name in state if name != "num_batches_tracked"}
        state["num_batches_tracked"].fill_(num_batches)
    for alpha in ALPHAS:
        for name, tensor in interpolate(initial, tuned, alpha).items():
            if name == "num_batches_tracked":
                assert tensor.item() == 9, "integers are those of the fine-tuned model"
            elif alpha in {0.0, 1.0}:
                assert torch.equal(tensor, (initial, tuned)[int(alpha)][name])
            else:
                expected = (1 - alpha) * initial[name].double() + alpha * tuned[name].double()
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(0.5, 1.0), (0.9, 1.0), (0.8, 0.1)], 0.5),
        ([(0.9, 1.0), (0.9, 0.7), (0.9, 0.8)], 0.5),
        ([(0.9, 1.0), (0.9, 1.0), (0.9, 1.0)], 1.0),
    ],
)
def test_the_best_alpha_has_the_highest_accuracy_then_the_lowest_loss_then_the_highest_alpha(
    results: list[tuple[float, float]], expected: float
) -> None:
    points = [AlphaResult(alpha=i / 2, accuracy=a, loss=loss, value=a) for i, (a, loss) in enumerate(results)]
    assert best_alpha(points).alpha == expected


@dataclass
class Evaluator:
    """Evaluates a network of `make_net` by its value: 0 for the initial weights, 1 for the fine-tuned weights."""

    best: float
    """Value at which the validation accuracy is highest."""
    interrupt_after: int | None = None
    calls: list[tuple[float, str]] = field(default_factory=list)

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], splits: Sequence[str] | None = None
    ) -> Evaluations:
        value = round(model[1].running_mean[0].item(), 3)  # type: ignore[index, union-attr, operator]
        (split,) = splits or ()
        if len(self.calls) == self.interrupt_after:
            assert interrupted()
            raise Interrupted
        self.calls.append((value, split))
        correct = 100 - round(50 * abs(value - self.best)) if split == "val" else round(10 * value)
        return {split: Evaluation(loss_sum=1.0, correct=(correct, 0), support=(100, 0), predicted=(100, 0))}


@dataclass
class Run:
    """A run with WiSE-FT. Its training is replaced by `train`."""

    open_run: OpenRun
    wise_ft: WiseFT

    @property
    def folder(self) -> Path:
        return self.open_run.folder

    def start(self, value: float, *, resumed: bool) -> None:
        self.wise_ft.save_initial_weights(make_net(value), MODEL_METADATA, resumed=resumed)

    def train(self, value: float = 1.0, step: int = 4) -> None:
        write_model(self.folder / MODEL, make_net(value).state_dict(), replace(MODEL_METADATA, metrics={"step": step}))

    def select(self, evaluator: Evaluator) -> float:
        return self.wise_ft.select_alpha(lambda: make_net(7), evaluator, step=4)

    def values(self, *names: str) -> list[float]:
        """Return the value of the weights in each model file."""
        states = [load_file(self.folder / name).values() for name in names]
        values = [{round(t.flatten()[0].item(), 3) for t in state if t.is_floating_point()} for state in states]
        return [value for (value,) in values]

    def metrics(self) -> Any:
        metadata = read_metadata(self.folder / MODEL)
        assert metadata is not None
        return metadata.metrics

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


@pytest.fixture
def new_run(tmp_path: Path, ctx: DistributedContext) -> Iterator[Run]:
    lock = RunLock.acquire(tmp_path, log=print)
    open_run = make_run(tmp_path, ctx, lock)
    yield Run(open_run, WiseFT(open_run, "val"))
    lock.end("done")


@pytest.fixture
def run(new_run: Run) -> Run:
    """Return a run after its training."""
    new_run.start(0, resumed=False)
    new_run.train()
    return new_run


def test_the_best_weights_become_the_model_file(run: Run) -> None:
    evaluator = Evaluator(best=0.6)
    assert run.select(evaluator) == 0.6
    assert run.values(INITIAL, MODEL, FINE_TUNED) == [0.0, 0.6, 1.0]
    result = json.loads((run.folder / WISE).read_text())
    assert result.pop("points")[3] == {"alpha": 0.3, "accuracy": 0.85, "loss": 0.01, "value": 0.85}
    assert run.metrics() == {"step": 4, "wise_ft": result}
    accuracies = [result[f"{split}_accuracy{of}"] for split in ("val", "test") for of in ("", "_of_fine_tuned")]
    assert accuracies == [1.0, 0.8, 0.06, 0.1]
    assert result["alpha"] == 0.6
    assert {value for key, value in result.items() if "loss" in key} == {0.01}
    # The test split is evaluated after the selection, for two alphas.
    assert evaluator.calls == [*((alpha, "val") for alpha in ALPHAS), (1.0, "test"), (0.6, "test")]


def test_the_model_file_is_not_changed_if_alpha_1_is_the_best(run: Run) -> None:
    before, evaluator = run.files(), Evaluator(best=1.0)
    assert run.select(evaluator) == 1.0
    assert evaluator.calls == [*((alpha, "val") for alpha in ALPHAS), (1.0, "test")]
    after = run.files()
    assert {name: after[name] for name in after if name != WISE} == before


class Killed(BaseException):
    """Ends the code at once, as SIGKILL does."""


@pytest.mark.parametrize("write", [0, 1, 2])
def test_a_kill_before_any_write_is_harmless(write: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = itertools.count()

    def killed_at(function: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: Any) -> None:
            if next(writes) == write:
                raise Killed
            function(*args)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("write_model", "write_text_atomically"):
            patch.setattr(wise_ft_module, name, killed_at(getattr(wise_ft_module, name)))
        with pytest.raises(Killed):
            run.select(Evaluator(best=0.6))
    assert not (run.folder / WISE).exists()
    assert run.metrics()["step"] == 4
    assert run.select(Evaluator(best=0.6)) == 0.6
    assert run.values(INITIAL, MODEL, FINE_TUNED) == [0.0, 0.6, 1.0]


def test_a_finished_selection_is_not_repeated_until_the_run_is_longer(run: Run) -> None:
    run.select(Evaluator(best=0.6))
    evaluator = Evaluator(best=0.8)
    assert run.select(evaluator) == 0.6
    assert evaluator.calls == []
    (run.folder / WISE).write_text("{")  # damaged: repeated, from the fine-tuned weights
    assert run.select(Evaluator(best=0.6)) == 0.6
    assert run.values(MODEL, FINE_TUNED) == [0.6, 1.0]
    assert json.loads((run.folder / WISE).read_text())["alpha"] == 0.6
    run.start(5, resumed=True)
    assert run.values(INITIAL, MODEL) == [0.0, 1.0], "the initial weights are those of the first start"
    assert run.metrics() == {"step": 4}
    assert {FINE_TUNED, WISE}.isdisjoint(run.files())
    run.train(3.0, step=8)
    assert run.select(Evaluator(best=1.5)) == 0.5
    assert run.values(MODEL, FINE_TUNED) == [1.5, 3.0]


def test_a_stop_during_the_evaluation_changes_no_file(run: Run) -> None:
    before = run.files()
    run.open_run.signals.received = signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        run.select(Evaluator(best=0.6, interrupt_after=5))
    assert stopped.value.saved == "the end of training, before transfer.wise_ft was evaluated"
    assert run.files() == before
    run.open_run.signals.received = None
    assert run.select(Evaluator(best=0.6)) == 0.6


@pytest.mark.parametrize("name", [INITIAL, MODEL])
def test_a_missing_or_foreign_file_is_an_error_with_its_name(name: str, run: Run) -> None:
    write_model(run.folder / name, {"0.weight": torch.zeros(2, 3, 1, 1)}, MODEL_METADATA)
    with pytest.raises(UserError, match=rf"{name}: .*0\.bias is missing"):
        run.select(Evaluator(best=0.6))
    (run.folder / name).unlink()
    with pytest.raises(UserError, match=name):
        run.select(Evaluator(best=0.6))


def test_it_does_nothing_when_off(new_run: Run) -> None:
    run = Run(new_run.open_run, WiseFT(new_run.open_run, None))
    run.start(0, resumed=False)
    evaluator = Evaluator(best=0.6)
    assert run.select(evaluator) == 1.0
    assert evaluator.calls == []
    assert run.files() == {}

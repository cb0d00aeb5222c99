"""The line between two models: its points, its best one, and the files whatever kills the process between them."""

import copy
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.data.augment import Preprocessing
from trainer.distributed import context
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Interrupted
from trainer.loop import Evaluations
from trainer.model.metadata import ModelMetadata, read_metadata, write_model
from trainer.run.folder import FINE_TUNED, MODEL, START, WISE
from trainer.run.lock import RunLock
from trainer.transfer import wise_ft
from trainer.transfer.wise_ft import ALPHAS, AlphaResult, WiseFT, best_alpha, interpolate

DESCRIPTION = ModelMetadata(
    version="0",
    architecture="resnet18",
    classes=("a", "b"),
    preprocessing=Preprocessing(
        image_size=8,
        resize_size=8,
        resize="squash",
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    source="",
    metrics={},
)


def net(value: float, batches: int) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            tensor.fill_(batches if name.endswith("num_batches_tracked") else value)
    return made


def test_the_line_is_straight_for_weights_and_statistics_and_exact_at_its_ends() -> None:
    generator = torch.Generator().manual_seed(5)
    start, tuned = net(0, 3).state_dict(), net(0, 9).state_dict()
    for state in (start, tuned):
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = torch.randn(tensor.shape, generator=generator)
    for alpha in ALPHAS:
        for name, tensor in interpolate(start, tuned, alpha).items():
            if name.endswith("num_batches_tracked"):
                assert tensor.item() == 9, "an integer lies on no line"
                continue
            wanted = (1 - alpha) * start[name].double() + alpha * tuned[name].double()
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
    for alpha, end in ((0.0, start), (1.0, tuned)):
        point = interpolate(start, tuned, alpha)
        assert all(torch.equal(point[name], end[name]) for name in end if end[name].is_floating_point())


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.9, 1.0), (0.8, 0.1)], 0.5),
        ([(0.9, 1.0), (0.9, 0.7), (0.9, 0.8)], 0.5),
        ([(0.9, 1.0), (0.9, 1.0), (0.9, 1.0)], 1.0),
        ([(0.9, 1.0), (0.9, 1.0), (0.8, 0.1)], 0.5),
    ],
)
def test_the_best_is_the_most_accurate_then_of_the_lowest_loss_then_the_fine_tuned(
    scores: list[tuple[float, float]], best: float
) -> None:
    points = [AlphaResult(alpha=i / 2, accuracy=a, loss=loss) for i, (a, loss) in enumerate(scores)]
    assert best_alpha(points).alpha == best


@dataclass
class Judge:
    """Evaluates a model by the value of its weights: from 0 (the start) to 1 (fine-tuned)."""

    peak: float
    """Where the accuracy on val is highest."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    end_at: int | None = None

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], parts: Sequence[str] | None = None
    ) -> Evaluations:
        value = round(model[1].running_mean[0].item(), 3)  # type: ignore[index, union-attr, operator]
        (part,) = parts or ()
        if self.end_at == len(self.asked):
            assert interrupted()
            raise Interrupted
        self.asked.append((value, part))
        right = 100 - round(50 * abs(value - self.peak)) if part == "val" else round(10 * value)
        return {part: Evaluation(loss_sum=1.0, correct=(right, 0), support=(100, 0), predicted=(100, 0))}


@dataclass
class Run:
    search: WiseFT
    folder: Path
    said: list[Any]

    def settle(self, judge: Judge) -> float:
        return self.search.select_alpha(lambda: net(7, 7), judge, step=4)

    def held(self, name: str) -> float:
        state = load_file(self.folder / name)
        values = {round(t.flatten()[0].item(), 3) for key, t in state.items() if t.is_floating_point()}
        (value,) = values
        return value

    def metrics(self) -> Any:
        described = read_metadata(self.folder / MODEL)
        assert described is not None
        return described.metrics

    def begin(self, model: nn.Module, *, goes_on: bool) -> None:
        self.search.save_initial_weights(model, DESCRIPTION, goes_on=goes_on)

    def tune(self, value: float = 1.0, **metrics: Any) -> None:
        """Stand for the training: the model file is the best epoch's."""
        write_model(
            self.folder / MODEL,
            net(value, 9).state_dict(),
            ModelMetadata(**{**vars(DESCRIPTION), "metrics": {"step": 4, **metrics}}),
        )


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Run]:
    threads, said = torch.get_num_threads(), list[Any]()
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    attempt = RunLock.acquire(tmp_path, log=print)
    search = WiseFT(
        folder=tmp_path,
        split="val",
        ctx=ctx,
        attempt=attempt,
        signals=StopSignals(),
        watch=nullcontext,
        log=said.append,
    )
    yield Run(search, tmp_path, said)
    attempt.end("done")
    torch.set_num_threads(threads)


@pytest.fixture
def trained(made: Run) -> Run:
    made.begin(net(0, 0), goes_on=False)
    made.tune()
    return made


def test_a_better_point_takes_the_model_files_place_and_the_fine_tuned_weights_are_set_aside(
    trained: Run,
) -> None:
    judge = Judge(peak=0.6)
    assert trained.settle(judge) == 0.6
    assert (trained.held(START), trained.held(MODEL), trained.held(FINE_TUNED)) == (0.0, 0.6, 1.0)
    assert load_file(trained.folder / MODEL)["1.num_batches_tracked"].item() == 9
    figures = {
        "alpha": 0.6,
        "val_accuracy": 1.0,
        "val_loss": 0.01,
        "val_accuracy_of_fine_tuned": 0.8,
        "val_loss_of_fine_tuned": 0.01,
        "test_accuracy": 0.06,
        "test_loss": 0.01,
        "test_accuracy_of_fine_tuned": 0.1,
        "test_loss_of_fine_tuned": 0.01,
    }
    assert trained.metrics() == {"step": 4, "wise_ft": figures}
    written = json.loads((trained.folder / WISE).read_text())
    assert written.pop("points")[3] == {"alpha": 0.3, "accuracy": 0.85, "loss": 0.01}
    assert written == figures
    # Only two points are looked at on the images that are reported, after the choice.
    assert judge.asked == [*((alpha, "val") for alpha in ALPHAS), (1.0, "test"), (0.6, "test")]


def test_where_the_fine_tuned_weights_are_the_best_the_model_file_is_not_touched(trained: Run) -> None:
    before = (trained.folder / MODEL).read_bytes()
    judge = Judge(peak=1.0)
    assert trained.settle(judge) == 1.0
    assert (trained.folder / MODEL).read_bytes() == before
    assert not (trained.folder / FINE_TUNED).exists()
    assert judge.asked[-1] == (1.0, "test")
    assert len(judge.asked) == 12


def test_what_was_done_is_not_done_again(trained: Run) -> None:
    trained.settle(Judge(peak=0.2))
    judge = Judge(peak=0.8)
    assert trained.settle(judge) == 0.2
    assert judge.asked == []


class Killed(BaseException):
    """As SIGKILL, but within the test's process."""


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_kill_between_any_two_files_is_harmless(
    before: int, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def writing(*given: Any) -> None:
            nonlocal written
            written += 1
            if written == before:
                raise Killed
            write(*given)

        return writing

    with monkeypatch.context() as patch:
        for name in ("write_model", "write_text_atomically"):
            patch.setattr(wise_ft, name, dying(getattr(wise_ft, name)))
        with pytest.raises(Killed):
            trained.settle(Judge(peak=0.6))
    assert not (trained.folder / WISE).exists()
    assert trained.metrics()["step"] == 4
    assert trained.settle(Judge(peak=0.6)) == 0.6
    assert (trained.held(START), trained.held(MODEL), trained.held(FINE_TUNED)) == (0.0, 0.6, 1.0)


def test_a_run_that_is_made_longer_goes_on_from_the_best_epochs_own_weights(trained: Run) -> None:
    trained.settle(Judge(peak=0.6))
    trained.begin(net(5, 5), goes_on=True)
    assert (trained.held(START), trained.held(MODEL)) == (0.0, 1.0), "the start is that of the first start"
    assert trained.metrics() == {"step": 4}
    assert not (trained.folder / FINE_TUNED).exists()
    assert not (trained.folder / WISE).exists()
    trained.tune(3.0, step=8)
    assert trained.settle(Judge(peak=1.5)) == 0.5
    assert (trained.held(MODEL), trained.held(FINE_TUNED)) == (1.5, 3.0)


def test_a_damaged_finding_is_found_again(trained: Run) -> None:
    trained.settle(Judge(peak=0.6))
    (trained.folder / WISE).write_text("{")
    assert trained.settle(Judge(peak=0.6)) == 0.6
    assert (trained.held(MODEL), trained.held(FINE_TUNED)) == (0.6, 1.0)
    assert json.loads((trained.folder / WISE).read_text())["alpha"] == 0.6


def test_a_stop_while_the_line_is_evaluated_leaves_it_to_the_next_start(trained: Run) -> None:
    before = {p.name: p.read_bytes() for p in trained.folder.iterdir() if p.is_file()}
    trained.search.signals.received = signal.SIGTERM
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        trained.settle(Judge(peak=0.6, end_at=5))
    assert "before the line of transfer.wise_ft was evaluated" in str(stopped.value.saved)
    assert {p.name: p.read_bytes() for p in trained.folder.iterdir() if p.is_file()} == before
    trained.search.signals.received = None
    assert trained.settle(Judge(peak=0.6)) == 0.6


@pytest.mark.parametrize("gone", [START, MODEL])
def test_an_end_that_is_gone_is_named(gone: str, trained: Run) -> None:
    (trained.folder / gone).unlink()
    with pytest.raises(UserError, match=gone):
        trained.settle(Judge(peak=0.6))


def test_an_end_of_another_model_is_refused(trained: Run) -> None:
    other = copy.deepcopy(net(0, 0))
    write_model(trained.folder / START, {"0.weight": other.state_dict()["0.weight"]}, DESCRIPTION)
    with pytest.raises(UserError, match=r"start\.safetensors: .*0\.bias is missing"):
        trained.settle(Judge(peak=0.6))


def test_without_the_option_nothing_is_kept_and_nothing_evaluated(made: Run) -> None:
    search = WiseFT(**{**vars(made.search), "part": None})
    search.save_initial_weights(net(0, 0), DESCRIPTION, goes_on=False)
    judge = Judge(peak=0.6)
    assert search.select_alpha(lambda: net(7, 7), judge, step=4) == 1.0
    assert judge.asked == []
    assert not (made.folder / START).exists()

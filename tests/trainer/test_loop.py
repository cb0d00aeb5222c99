import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer import loop
from trainer.distributed import context
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Interrupted
from trainer.loop import (
    Evaluations,
    NullCheckpointManager,
    Progress,
    ResumePoint,
    StepDecision,
    TrainSchedule,
    backward,
    fit,
    split_micro_batches,
)
from trainer.metrics import MetricState
from trainer.optim.param_groups import group_parameters, make_optimizer

SIZES = (4, 4, 3)
PLAN = TrainSchedule(
    batch_sizes=SIZES,
    epochs=2,
    loss_reduction="mean",
    grad_accum_steps=1,
    max_grad_norm=None,
    seed=0,
    logs_per_epoch=3,
    lr_multiplier=lambda step: 1.0,
)


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.conv(images).relu().mean(dim=(2, 3))))  # type: ignore[no-any-return]


@pytest.fixture
def accelerator() -> Accelerator:
    return context.start(device="cpu", precision="fp32", threads=1).accelerator


def normalize(images: Tensor) -> Tensor:
    return images.float() / 255


def batches(plan: TrainSchedule = PLAN) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(plan.epochs):
        for size in plan.batch_sizes:
            images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
            labels = torch.randint(3, (size,), generator=generator)
            yield images, labels, torch.arange(size)


class Told:
    """Remembers all that it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.points: list[Progress] = []
        self.epochs: list[Progress] = []
        self.evaluations: list[Evaluations] = []

    def step(self, epoch: int, epoch_step: int) -> None:
        self.steps.append((epoch, epoch_step))

    def point(self, progress: Progress) -> None:
        self.points.append(progress)

    def epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        self.epochs.append(progress)
        self.evaluations.append(evaluations)


class Kept:
    """Remembers what it is told to save; wishes what a test has planned for a step."""

    over = False

    def __init__(
        self, wishes: Mapping[int, StepDecision] | None = None, stop_after_epoch: int | None = None
    ) -> None:
        self.wishes = wishes or {}
        self.stop_after_epoch = stop_after_epoch
        self.asked: list[int] = []
        self.saved: list[tuple[int, int, MetricState]] = []
        self.epochs: list[int] = []

    def agree(self, step: int) -> StepDecision:
        self.asked.append(step)
        return self.wishes.get(step, StepDecision(save=False, stop=None))

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
        self.saved.append((epoch, step, sums))

    def epoch(self, progress: Progress, evaluations: Evaluations) -> str | None:
        self.epochs.append(progress.epoch)
        return "SIGTERM" if progress.epoch == self.stop_after_epoch else None


Evaluate = Callable[[nn.Module, Callable[[], bool]], Evaluations]


def unevaluated(model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
    return {}


def prepare(
    model: nn.Module, accelerator: Accelerator, *, name: Any = "sgd", momentum: float = 0.0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    groups = group_parameters(model, ["fc"], lr=0.05, head_lr_scale=2, weight_decay=0.01)
    prepared: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(
        model, make_optimizer(name, groups, momentum=momentum)
    )
    return prepared


def run(
    model: nn.Module,
    accelerator: Accelerator,
    plan: TrainSchedule = PLAN,
    start: ResumePoint = ResumePoint(),  # noqa: B008 (frozen)
    *,
    data: Iterator[Any] | None = None,
    evaluate: Evaluate = unevaluated,
    keeper: loop.CheckpointManager | None = None,
    batch_paths: Callable[[int, int], Sequence[str]] = lambda epoch, step: [],
) -> Told:
    prepared, optimizer = prepare(model, accelerator)
    return go_on(
        prepared, optimizer, accelerator, plan, start,
        data=data, evaluate=evaluate, keeper=keeper, batch_paths=batch_paths,
    )  # fmt: skip


def go_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    plan: TrainSchedule,
    start: ResumePoint,
    *,
    told: Told | None = None,
    data: Iterator[Any] | None = None,
    evaluate: Evaluate = unevaluated,
    keeper: loop.CheckpointManager | None = None,
    batch_paths: Callable[[int, int], Sequence[str]] = lambda epoch, step: [],
) -> Told:
    told = told or Told()
    fit(
        model,
        optimizer,
        itertools.islice(batches(plan), start.step, None) if data is None else data,
        plan,
        start,
        accelerator=accelerator,
        normalize=normalize,
        evaluate=evaluate,
        keeper=keeper or NullCheckpointManager(),
        listener=told,
        batch_paths=batch_paths,
    )
    return told


def model(seed: int = 0, **settings: float) -> Net:
    torch.manual_seed(seed)
    return Net(**settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_progress_counts_steps_epochs_and_examples(accelerator: Accelerator) -> None:
    keeper = Kept()
    told = run(model(), accelerator, keeper=keeper)
    assert told.steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert [(p.epoch, p.epoch_step, p.step, p.metrics.seen) for p in told.points] == [
        (1, 1, 1, 4), (1, 2, 2, 8), (1, 3, 3, 11), (2, 1, 4, 4), (2, 2, 5, 8), (2, 3, 6, 11),
    ]  # fmt: skip
    assert [p.metrics.seen for p in told.epochs] == [11, 11]
    assert (keeper.epochs, keeper.saved) == ([1, 2], [])
    assert keeper.asked == [1, 2, 4, 5], "an epoch ends with its evaluation, which asks by itself"
    figures = told.epochs[0].metrics
    assert 0 < figures.compute_seconds <= figures.seconds
    assert figures.rate <= figures.compute_rate


@pytest.mark.parametrize(
    ("points", "steps", "expected"),
    [(5, 16, {4, 7, 10, 13, 16}), (5, 3, {1, 2, 3}), (5, 1, {1}), (1, 7, {7}), (100, 4, {1, 2, 3, 4})],
)
def test_figures_are_read_a_few_times_an_epoch_and_at_its_end(
    points: int, steps: int, expected: set[int]
) -> None:
    plan = replace(PLAN, batch_sizes=(1,) * steps, logs_per_epoch=points)
    assert plan.log_steps == expected


def test_the_loss_shown_is_that_of_the_forward_pass_before_each_update(accelerator: Accelerator) -> None:
    net = model()
    first = copy.deepcopy(net)
    told = run(net, accelerator)
    images, labels, _ = next(batches())
    expected = cross_entropy(first(normalize(images)), labels).item()
    assert told.points[0].metrics.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("grad_accum_steps", [2, 3, 4])
def test_a_cut_batch_gives_the_same_update(
    reduction: Any, grad_accum_steps: int, accelerator: Accelerator
) -> None:
    whole, pieces = model(), model()
    plan = replace(PLAN, loss_reduction=reduction)
    run(whole, accelerator, plan)
    run(pieces, accelerator, replace(plan, grad_accum_steps=grad_accum_steps))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mean_divides_by_the_batchs_real_size_and_sum_does_not(accelerator: Accelerator) -> None:
    images, labels, examples = next(batches())
    gradients = {}
    for name, scale in (("mean", 1 / 4), ("sum", 1.0)):
        net = model()
        loss_sum, correct = backward(
            net, (images, labels, examples), scale, accelerator=accelerator, normalize=normalize
        )
        gradients[name] = net.fc.weight.grad
    logits = model()(normalize(images))
    assert loss_sum.item() == pytest.approx(cross_entropy(logits, labels, reduction="sum").item())
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    torch.testing.assert_close(gradients["sum"], 4 * gradients["mean"])


def test_an_empty_share_gives_a_gradient_of_zero_to_every_parameter(accelerator: Accelerator) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    before = copy.deepcopy(net.state_dict())
    empty = (torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss_sum, correct = backward(net, empty, 1.0, accelerator=accelerator, normalize=normalize)
    assert (loss_sum.item(), correct.item()) == (0, 0)
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("size", "parts"), [(7, 3), (2, 5), (1, 1), (8, 4)])
def test_a_cut_covers_everything_once(size: int, parts: int) -> None:
    pieces = split_micro_batches(size, parts)
    assert [i for piece in pieces for i in range(size)[piece]] == list(range(size))
    assert len(pieces) == min(size, parts)
    lengths = [piece.stop - piece.start for piece in pieces]
    assert max(lengths) - min(lengths) <= 1


def test_an_empty_share_is_one_empty_piece() -> None:
    assert split_micro_batches(0, 3) == [slice(0, 0)]


def test_the_learning_rate_is_that_of_the_step(accelerator: Accelerator) -> None:
    told = run(model(), accelerator, replace(PLAN, lr_multiplier=lambda step: 1 / (step + 1)))
    assert [p.lr["backbone"] for p in told.points] == pytest.approx([0.05 / (step + 1) for step in range(6)])
    assert [p.lr["head"] for p in told.points] == pytest.approx([0.1 / (step + 1) for step in range(6)])


def test_dropout_masks_belong_to_the_step(accelerator: Accelerator) -> None:
    # The second epoch alone, on what the first has left, draws the masks that it drew in the whole run.
    whole = model(dropout=0.5)
    run(whole, accelerator)
    parts = model(dropout=0.5)
    run(parts, accelerator, replace(PLAN, epochs=1))
    torch.rand(17)  # something else draws in between
    run(parts, accelerator, start=ResumePoint(epoch=1, step=3))
    assert same(whole, parts)


def test_clipping_bounds_the_whole_gradient(accelerator: Accelerator) -> None:
    clipped, start_from = model(), model()
    plan = replace(PLAN, batch_sizes=(4,), epochs=1, max_grad_norm=1e-3, loss_reduction="sum")
    groups = [{"params": list(clipped.parameters()), "lr": 1.0, "peak_lr": 1.0, "name": "head"}]
    prepared, optimizer = accelerator.prepare(clipped, torch.optim.SGD(groups))
    fit(
        prepared, optimizer, batches(plan), plan, ResumePoint(), accelerator=accelerator, normalize=normalize,
        evaluate=unevaluated, keeper=NullCheckpointManager(), listener=Told(), batch_paths=lambda epoch, step: [],
    )  # fmt: skip
    moved = [a - b for a, b in zip(clipped.parameters(), start_from.parameters(), strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_an_example_too_few_is_noticed(accelerator: Accelerator) -> None:
    def short() -> Iterator[Any]:
        for images, labels, examples in batches():
            yield images[:-1], labels[:-1], examples[:-1]

    with pytest.raises(RuntimeError, match="trained on 8 examples, expected 11"):
        run(model(), accelerator, data=short())


def test_a_loss_that_is_not_finite_stops_with_its_first_step_and_its_files(accelerator: Accelerator) -> None:
    def spoilt() -> Iterator[Any]:
        for number, (images, labels, examples) in enumerate(batches()):
            # float images: a NaN can come in
            yield images.float() * (float("nan") if number == 4 else 1), labels, examples

    plan = replace(PLAN, logs_per_epoch=1)  # read at the ends of epochs only
    with pytest.raises(UserError) as caught:
        run(
            model(),
            accelerator,
            plan,
            data=spoilt(),
            batch_paths=lambda epoch, step: [f"epoch{epoch}-batch{step}.jpg"],
        )
    assert "step 5 (epoch 2, batch 2)" in str(caught.value)
    assert "epoch1-batch1.jpg" in str(caught.value)
    assert "optim.lr" in str(caught.value)


def test_nothing_is_saved_of_a_model_that_diverged_on_its_last_update(accelerator: Accelerator) -> None:
    # Every loss was finite, what the last update left is not.
    diverged = {"test": Evaluation(float("nan"), (0,), (1,), (1,))}
    keeper = Kept()
    with pytest.raises(UserError, match="step 3"):
        run(model(), accelerator, evaluate=lambda model, interrupted: diverged, keeper=keeper)
    assert (keeper.epochs, keeper.saved) == ([], [])


def test_the_model_is_trained_in_train_mode_and_evaluated_bare(accelerator: Accelerator) -> None:
    seen: list[bool] = []
    net = model()

    def look(evaluated: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
        seen.append(evaluated is net and net.training)
        return {}

    run(net.eval(), accelerator, evaluate=look)
    assert seen == [True, True]


# Going on from any place, and what is agreed at the boundaries


class WithState(nn.Module):
    """All that may depend on what ran before: dropout's masks and BatchNorm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        return self.fc(self.dropout(features))  # type: ignore[no-any-return]


def evaluate(model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
    """Return figures in which every weight and statistic has a say."""
    if interrupted():
        raise Interrupted
    total = sum(float(value.double().abs().sum()) for value in model.state_dict().values())
    return {"test": Evaluation(total, (1, 1), (1, 2), (2, 1))}


def heard(*parts: Told) -> dict[str, Any]:
    """Return all that was told, times apart."""

    def without_times(progress: Progress) -> Progress:
        return replace(progress, figures=replace(progress.metrics, seconds=0.0, compute_seconds=0.0))

    return {
        "steps": [step for told in parts for step in told.steps],
        "points": [without_times(point) for told in parts for point in told.points],
        "epochs": [without_times(epoch) for told in parts for epoch in told.epochs],
        "evaluations": [found for told in parts for found in told.evaluations],
    }


LONG = replace(
    PLAN,
    epochs=3,
    logs_per_epoch=2,
    grad_accum_steps=2,
    max_grad_norm=0.5,
    lr_multiplier=lambda step: 1 / (1 + step),
)
PLACES = [
    *(
        (epoch, step) for epoch in range(3) for step in range(3 * epoch + 1, 3 * epoch + 4)
    ),  # evaluation is to come
    (1, 3),
    (2, 6),
]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"epoch {place[0]}, step {place[1]}")
def test_a_run_stopped_at_any_place_goes_on_as_if_nothing_had_happened(
    place: tuple[int, int], name: str, accelerator: Accelerator
) -> None:
    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        return prepare(WithState(), accelerator, name=name, momentum=0.9)

    whole, optimizer = new()
    told_whole = go_on(whole, optimizer, accelerator, LONG, ResumePoint(), evaluate=evaluate)

    epoch, step = place
    between = step == 3 * epoch
    keeper = Kept(
        {} if between else {step: StepDecision(save=False, stop="SIGTERM")},
        stop_after_epoch=epoch if between else None,
    )
    first, first_optimizer = new()
    told = Told()
    with pytest.raises(Stopped) as stopped:
        go_on(
            first,
            first_optimizer,
            accelerator,
            LONG,
            ResumePoint(),
            told=told,
            evaluate=evaluate,
            keeper=keeper,
        )
    assert stopped.value.reason == "SIGTERM"
    assert stopped.value.saved == (
        f"the end of epoch {epoch} of 3" if between else f"step {step} of 9, in epoch {epoch + 1} of 3"
    )
    assert keeper.epochs == list(range(1, epoch + 1))
    assert [(e, s) for e, s, _ in keeper.saved] == ([] if between else [place])

    torch.rand(17)
    second, second_optimizer = new()
    second.load_state_dict(first.state_dict())
    # Its moments, as a checkpoint keeps them: learning rates are the step's.
    moments, groups = first_optimizer.state_dict()["state"], second_optimizer.state_dict()["param_groups"]
    second_optimizer.load_state_dict({"state": copy.deepcopy(moments), "param_groups": groups})
    start = ResumePoint(epoch=epoch, step=step, sums=None if between else keeper.saved[0][2])
    told_then = go_on(second, second_optimizer, accelerator, LONG, start, evaluate=evaluate)

    assert same(whole, second)
    assert heard(told, told_then) == heard(told_whole)


def test_statistics_that_were_averaged_before_an_evaluation_was_interrupted_are_not_averaged_again(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The average of three equal float32 values need not be that value: (x + x + x) / 3 is rounded twice.
    x = torch.tensor(1.3333337306976318)
    assert (x + x + x) / 3 != x
    averaged: list[int] = []
    monkeypatch.setattr(
        loop, "average_batch_norm_statistics", lambda model, world_size: averaged.append(world_size)
    )
    sums = MetricState(rows=((1.0, 1, 11),), seconds=1.0, compute_seconds=1.0)
    run(model(), accelerator, start=ResumePoint(epoch=1, step=6, sums=sums), evaluate=evaluate)
    assert averaged == []
    run(model(), accelerator, start=ResumePoint(epoch=1, step=5, sums=replace(sums, rows=((1.0, 1, 8),))))
    assert averaged == [1]


def test_a_save_is_made_at_its_boundary_with_what_the_epoch_has_added_up(accelerator: Accelerator) -> None:
    weights: list[dict[str, Tensor]] = []

    class Copying(Kept):
        def save(self, epoch: int, step: int, sums: MetricState) -> None:
            super().save(epoch, step, sums)
            weights.append(copy.deepcopy(net.state_dict()))

    net = model()
    keeper = Copying({step: StepDecision(save=step in (2, 4), stop=None) for step in range(7)})
    told = run(net, accelerator, keeper=keeper)
    assert [(epoch, step) for epoch, step, _ in keeper.saved] == [(0, 2), (1, 4)]
    for (_, _, sums), point in zip(keeper.saved, (told.points[1], told.points[3]), strict=True):
        figures = point.metrics
        assert sums.rows == ((figures.loss_sum, figures.correct, figures.seen),)
        assert 0 < sums.compute_seconds <= sums.seconds
    # What is saved is what that many updates have made of the model.
    for number, step in enumerate((2, 4)):
        until = model()
        with pytest.raises(Stopped):
            run(until, accelerator, keeper=Kept({step: StepDecision(save=False, stop="SIGINT")}))
        assert all(torch.equal(value, weights[number][name]) for name, value in until.state_dict().items())


def test_a_stop_wins_over_a_save_and_saves_once(accelerator: Accelerator) -> None:
    keeper = Kept({2: StepDecision(save=True, stop="the file STOP")})
    with pytest.raises(Stopped, match="the file STOP"):
        run(model(), accelerator, keeper=keeper)
    assert [(epoch, step) for epoch, step, _ in keeper.saved] == [(0, 2)]


def test_an_evaluation_that_is_interrupted_ends_the_run_with_its_updates_saved(
    accelerator: Accelerator,
) -> None:
    keeper = Kept({3: StepDecision(save=False, stop="SIGUSR1")})
    told = Told()
    net, optimizer = prepare(model(), accelerator)
    with pytest.raises(Stopped, match="SIGUSR1"):
        go_on(net, optimizer, accelerator, PLAN, ResumePoint(), told=told, evaluate=evaluate, keeper=keeper)
    ((epoch, step, sums),) = keeper.saved
    assert (epoch, step) == (0, 3), "no whole epoch: it has yet to be evaluated"
    assert sums.rows[0][2] == 11
    assert (told.epochs, keeper.epochs) == ([], [])


def test_a_stop_that_comes_with_the_last_epoch_is_none(accelerator: Accelerator) -> None:
    keeper = Kept(stop_after_epoch=2)
    told = run(model(), accelerator, keeper=keeper)
    assert len(told.epochs) == 2


def test_what_the_keeper_has_met_ends_the_run_at_the_boundary(accelerator: Accelerator) -> None:
    class Failing(Kept):
        def agree(self, step: int) -> StepDecision:
            if step == 4:
                raise UserError("the disk is full")
            return super().agree(step)

    told = Told()
    net, optimizer = prepare(model(), accelerator)
    with pytest.raises(UserError, match="the disk is full"):
        go_on(net, optimizer, accelerator, PLAN, ResumePoint(), told=told, keeper=Failing())
    assert told.steps[-1] == (2, 1)


@pytest.mark.parametrize(
    "wish", [StepDecision(save=True, stop=None), StepDecision(save=False, stop="SIGTERM")]
)
@pytest.mark.parametrize("step", [2, 3])
def test_a_loss_that_is_not_finite_is_never_saved_within_an_epoch(
    step: int, wish: StepDecision, accelerator: Accelerator
) -> None:
    def spoilt() -> Iterator[Any]:
        for number, (images, labels, examples) in enumerate(batches()):
            yield images.float() * (float("nan") if number == 1 else 1), labels, examples

    plan = replace(PLAN, batch_sizes=(4, 4, 3, 4), logs_per_epoch=1)  # its loss is read by the save alone
    keeper = Kept({step: wish})
    with pytest.raises(UserError, match=r"not finite since step 2 \(epoch 1, batch 2\)"):
        run(model(), accelerator, plan, data=spoilt(), keeper=keeper)
    assert keeper.saved == []
    assert keeper.asked == list(range(1, step + 1))

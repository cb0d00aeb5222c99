import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.loop import Plan, Progress, backward, cut, fit
from trainer.optim import group_parameters, make_optimizer
from trainer.runtime import start

SIZES = (4, 4, 3)
PLAN = Plan(
    batch_sizes=SIZES,
    epochs=2,
    start_epoch=0,
    loss_reduction="mean",
    accumulation=1,
    clip_norm=None,
    seed=0,
    points_per_epoch=3,
    lr_factor=lambda step: 1.0,
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
    return start(device="cpu", precision="fp32", threads=1).accelerator


def normalise(images: Tensor) -> Tensor:
    return images.float() / 255


def batches(plan: Plan = PLAN) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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

    def step(self, epoch: int, epoch_step: int) -> None:
        self.steps.append((epoch, epoch_step))

    def point(self, progress: Progress) -> None:
        self.points.append(progress)

    def epoch(self, progress: Progress, evaluations: Any) -> None:
        self.epochs.append(progress)


def run(
    model: nn.Module,
    accelerator: Accelerator,
    plan: Plan = PLAN,
    *,
    data: Iterator[Any] | None = None,
    evaluate: Callable[[nn.Module], dict[str, Evaluation]] = lambda model: {},
    momentum: float = 0.0,
    paths_of: Callable[[int, int], Sequence[str]] = lambda epoch, step: [],
) -> tuple[Told, list[int]]:
    groups = group_parameters(model, ["fc"], lr=0.05, head_lr_scale=2, weight_decay=0.01)
    prepared, optimizer = accelerator.prepare(model, make_optimizer("sgd", groups, momentum=momentum))
    told, saved = Told(), list[int]()
    fit(
        prepared,
        optimizer,
        batches(plan) if data is None else data,
        plan,
        accelerator=accelerator,
        normalise=normalise,
        evaluate=evaluate,
        save=lambda progress, evaluations: saved.append(progress.epoch),
        listener=told,
        paths_of=paths_of,
    )
    return told, saved


def model(seed: int = 0, **settings: float) -> Net:
    torch.manual_seed(seed)
    return Net(**settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_progress_counts_steps_epochs_and_examples(accelerator: Accelerator) -> None:
    told, saved = run(model(), accelerator)
    assert told.steps == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert [(p.epoch, p.epoch_step, p.step, p.figures.seen) for p in told.points] == [
        (1, 1, 1, 4), (1, 2, 2, 8), (1, 3, 3, 11), (2, 1, 4, 4), (2, 2, 5, 8), (2, 3, 6, 11),
    ]  # fmt: skip
    assert [p.figures.seen for p in told.epochs] == [11, 11]
    assert saved == [1, 2]
    figures = told.epochs[0].figures
    assert 0 < figures.compute_seconds <= figures.seconds
    assert figures.rate <= figures.compute_rate


@pytest.mark.parametrize(
    ("points", "steps", "expected"),
    [(5, 16, {4, 7, 10, 13, 16}), (5, 3, {1, 2, 3}), (5, 1, {1}), (1, 7, {7}), (100, 4, {1, 2, 3, 4})],
)
def test_figures_are_read_a_few_times_an_epoch_and_at_its_end(
    points: int, steps: int, expected: set[int]
) -> None:
    plan = replace(PLAN, batch_sizes=(1,) * steps, points_per_epoch=points)
    assert plan.points == expected


def test_the_loss_shown_is_that_of_the_forward_pass_before_each_update(accelerator: Accelerator) -> None:
    net = model()
    first = copy.deepcopy(net)
    told, _ = run(net, accelerator)
    images, labels, _ = next(batches())
    expected = cross_entropy(first(normalise(images)), labels).item()
    assert told.points[0].figures.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_a_cut_batch_gives_the_same_update(
    reduction: Any, accumulation: int, accelerator: Accelerator
) -> None:
    whole, pieces = model(), model()
    plan = replace(PLAN, loss_reduction=reduction)
    run(whole, accelerator, plan)
    run(pieces, accelerator, replace(plan, accumulation=accumulation))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mean_divides_by_the_batchs_real_size_and_sum_does_not(accelerator: Accelerator) -> None:
    images, labels, examples = next(batches())
    gradients = {}
    for name, scale in (("mean", 1 / 4), ("sum", 1.0)):
        net = model()
        loss_sum, correct = backward(
            net, (images, labels, examples), scale, accelerator=accelerator, normalise=normalise
        )
        gradients[name] = net.fc.weight.grad
    logits = model()(normalise(images))
    assert loss_sum.item() == pytest.approx(cross_entropy(logits, labels, reduction="sum").item())
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    torch.testing.assert_close(gradients["sum"], 4 * gradients["mean"])


def test_an_empty_share_gives_a_gradient_of_zero_to_every_parameter(accelerator: Accelerator) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    before = copy.deepcopy(net.state_dict())
    empty = (torch.empty(0, 3, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss_sum, correct = backward(net, empty, 1.0, accelerator=accelerator, normalise=normalise)
    assert (loss_sum.item(), correct.item()) == (0, 0)
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("size", "parts"), [(7, 3), (2, 5), (1, 1), (8, 4)])
def test_a_cut_covers_everything_once(size: int, parts: int) -> None:
    pieces = cut(size, parts)
    assert [i for piece in pieces for i in range(size)[piece]] == list(range(size))
    assert len(pieces) == min(size, parts)
    lengths = [piece.stop - piece.start for piece in pieces]
    assert max(lengths) - min(lengths) <= 1


def test_an_empty_share_is_one_empty_piece() -> None:
    assert cut(0, 3) == [slice(0, 0)]


def test_the_learning_rate_is_that_of_the_step(accelerator: Accelerator) -> None:
    told, _ = run(model(), accelerator, replace(PLAN, lr_factor=lambda step: 1 / (step + 1)))
    assert [p.lr["backbone"] for p in told.points] == pytest.approx([0.05 / (step + 1) for step in range(6)])
    assert [p.lr["head"] for p in told.points] == pytest.approx([0.1 / (step + 1) for step in range(6)])


def test_dropout_masks_belong_to_the_step(accelerator: Accelerator) -> None:
    # The second epoch alone, on what the first has left, draws the masks that it drew in the whole run.
    whole = model(dropout=0.5)
    run(whole, accelerator)
    parts = model(dropout=0.5)
    run(parts, accelerator, replace(PLAN, epochs=1))
    torch.rand(17)  # something else draws in between
    second = iter(list(batches())[3:])
    run(parts, accelerator, replace(PLAN, start_epoch=1), data=second)
    assert same(whole, parts)


def test_clipping_bounds_the_whole_gradient(accelerator: Accelerator) -> None:
    clipped, start_from = model(), model()
    plan = replace(PLAN, batch_sizes=(4,), epochs=1, clip_norm=1e-3, loss_reduction="sum")
    groups = [{"params": list(clipped.parameters()), "lr": 1.0, "peak_lr": 1.0, "name": "head"}]
    prepared, optimizer = accelerator.prepare(clipped, torch.optim.SGD(groups))
    fit(
        prepared, optimizer, batches(plan), plan, accelerator=accelerator, normalise=normalise,
        evaluate=lambda model: {}, save=lambda progress, evaluations: None, listener=Told(),
        paths_of=lambda epoch, step: [],
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

    plan = replace(PLAN, points_per_epoch=1)  # read at the ends of epochs only
    with pytest.raises(UserError) as caught:
        run(
            model(),
            accelerator,
            plan,
            data=spoilt(),
            paths_of=lambda epoch, step: [f"epoch{epoch}-batch{step}.jpg"],
        )
    assert "step 5 (epoch 2, batch 2)" in str(caught.value)
    assert "epoch1-batch1.jpg" in str(caught.value)
    assert "optim.lr" in str(caught.value)


def test_nothing_is_saved_of_a_model_that_diverged_on_its_last_update(accelerator: Accelerator) -> None:
    # Every loss was finite, what the last update left is not.
    diverged = {"test": Evaluation(float("nan"), (0,), (1,), (1,))}
    with pytest.raises(UserError, match="step 3"):
        run(model(), accelerator, evaluate=lambda model: diverged)


def test_the_model_is_trained_in_train_mode_and_evaluated_bare(accelerator: Accelerator) -> None:
    seen: list[bool] = []
    net = model()

    def look(evaluated: nn.Module) -> dict[str, Evaluation]:
        seen.append(evaluated is net and net.training)
        return {}

    run(net.eval(), accelerator, evaluate=look)
    assert seen == [True, True]

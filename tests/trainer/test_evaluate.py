from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.evaluate import Evaluation, Interrupted, evaluate, wilson_interval

Batches = list[tuple[Tensor, Tensor, Tensor]]


class FirstPixels(nn.Module):
    """Its logits are the first pixels of the first row."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :3]


def batches(logits: Tensor, labels: Tensor, sizes: list[int]) -> Batches:
    images = logits.view(-1, 1, 1, 3).expand(-1, 3, 1, 3)
    examples = torch.arange(len(labels))
    parts = [part.split(sizes) for part in (images, labels, examples)]
    return list(zip(*parts, strict=True))


def run(
    data: Batches,
    *,
    expected: int,
    model: nn.Module | None = None,
    rounds: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    others: Tensor | None = None,
) -> Evaluation:
    """Evaluate as one process among several whose sums are `others`."""
    return evaluate(
        FirstPixels().train() if model is None else model,
        data,
        classes=3,
        expected=expected,
        normalize=lambda images: images.float(),
        reduce=lambda sums: sums if others is None else sums + others,
        device=torch.device("cpu"),
        num_batches=len(data) if rounds is None else rounds,
        interrupted=interrupted,
    )


def test_sums_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(11, 3, generator=generator), torch.randint(3, (11,), generator=generator)
    whole, ragged = (run(batches(logits, labels, sizes), expected=11) for sizes in ([11], [4, 4, 3]))
    assert whole.correct == ragged.correct
    assert whole.support == tuple((labels == c).sum().item() for c in range(3))
    assert whole.predicted == tuple((logits.argmax(1) == c).sum().item() for c in range(3))
    assert whole.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert ragged.loss == pytest.approx(cross_entropy(logits, labels).item())


def test_an_example_too_few_is_noticed() -> None:
    data = batches(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), [4])
    with pytest.raises(RuntimeError, match="evaluated 4 examples, expected 5"):
        run(data, expected=5)


def test_the_model_is_evaluated_in_eval_mode_and_left_in_its_own() -> None:
    model = nn.Sequential(FirstPixels(), nn.Dropout(1.0))
    data = batches(torch.eye(3), torch.arange(3), [3])
    found = run(data, expected=3, model=model)
    assert found.accuracy == 1
    assert model.training
    assert model[1].training


def test_all_processes_are_asked_in_every_round_whatever_their_share() -> None:
    # 5 examples in batches of 1 on 2 processes: this one has 2 of them, the other 3; on a third there is none.
    logits, labels = torch.eye(3), torch.arange(3)
    for share in (2, 3, 0):
        asked = 0

        def interrupted() -> bool:
            nonlocal asked
            asked += 1
            return False

        others = torch.zeros(10, dtype=torch.float64)
        others[4] = 5 - share  # right and seen by the others
        others[1] = 5 - share
        data = batches(logits[:share], labels[:share], [1] * share)
        found = run(data, expected=5, rounds=3, interrupted=interrupted, others=others)
        assert asked == 3, (
            "an exchange in each round: a process with fewer batches would leave the others waiting"
        )
        assert (found.seen, found.accuracy) == (5, 1)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_evaluation_that_is_interrupted_leaves_the_model_as_it_was(at: int, mode: bool) -> None:
    seen: list[int] = []

    class Counting(FirstPixels):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().forward(images)

    model = nn.Sequential(Counting(), nn.Dropout(1.0)).train(mode)
    data = batches(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), [2, 2, 2])
    answers = iter([False] * at + [True])
    with pytest.raises(Interrupted):
        run(data, expected=6, model=model, interrupted=lambda: next(answers))
    assert seen == [2] * at, "at once: the batch that was to come is left"
    assert [part.training for part in model.modules()] == [mode] * 3


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I (method 3, score without continuity correction): 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_stays_within_0_and_1() -> None:
    assert wilson_interval(5, 5)[1] == 1
    assert wilson_interval(0, 1)[0] == 0

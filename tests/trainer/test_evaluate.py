import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.evaluate import evaluate, wilson_interval

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


def run(data: Batches, *, expected: int) -> "object":
    return evaluate(
        FirstPixels().train(),
        data,
        classes=3,
        expected=expected,
        normalise=lambda images: images.float(),
        reduce=lambda sums: sums,
        device=torch.device("cpu"),
    )


def test_sums_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(11, 3, generator=generator), torch.randint(3, (11,), generator=generator)
    whole, ragged = (run(batches(logits, labels, sizes), expected=11) for sizes in ([11], [4, 4, 3]))
    assert whole.correct == ragged.correct  # type: ignore[attr-defined]
    assert whole.support == tuple((labels == c).sum().item() for c in range(3))  # type: ignore[attr-defined]
    assert whole.predicted == tuple((logits.argmax(1) == c).sum().item() for c in range(3))  # type: ignore[attr-defined]
    assert whole.accuracy == (logits.argmax(1) == labels).double().mean().item()  # type: ignore[attr-defined]
    assert ragged.loss == pytest.approx(cross_entropy(logits, labels).item())  # type: ignore[attr-defined]


def test_an_example_too_few_is_noticed() -> None:
    data = batches(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), [4])
    with pytest.raises(RuntimeError, match="evaluated 4 examples, expected 5"):
        run(data, expected=5)


def test_the_model_is_evaluated_in_eval_mode_and_left_in_its_own() -> None:
    model = nn.Sequential(FirstPixels(), nn.Dropout(1.0))
    data = batches(torch.eye(3), torch.arange(3), [3])
    found = evaluate(
        model,
        data,
        classes=3,
        expected=3,
        normalise=lambda images: images,
        reduce=lambda sums: sums,
        device=torch.device("cpu"),
    )
    assert found.accuracy == 1
    assert model.training
    assert model[1].training


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

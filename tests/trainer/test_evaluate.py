import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.evaluate import Evaluation, Interrupted, Record, evaluate, wilson_interval

Batches = list[tuple[Tensor, Tensor, Tensor]]


class FirstPixels(nn.Module):
    """A model whose logits are the first three pixels of the first row."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :3]


def batches(logits: Tensor, labels: Tensor, sizes: list[int]) -> Batches:
    images = logits.view(-1, 1, 1, 3).expand(-1, 3, 1, 3)
    examples = torch.arange(len(labels))
    columns = [tensor.split(sizes) for tensor in (images, labels, examples)]
    return list(zip(*columns, strict=True))


def run(
    data: Batches,
    *,
    expected: int,
    model: nn.Module | None = None,
    num_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    record: Record | None = None,
) -> Evaluation:
    return evaluate(
        FirstPixels().train() if model is None else model,
        data,
        classes=3,
        expected=expected,
        normalize=lambda images: images.float(),
        reduce=lambda sums: sums,
        device=torch.device("cpu"),
        num_batches=len(data) if num_batches is None else num_batches,
        interrupted=interrupted,
        record=record,
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


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_of_the_classes_equal_scikit_learns(classes: int) -> None:
    """Of five classes, one has no example and another is never predicted."""
    generator = torch.Generator().manual_seed(classes)
    labels, predicted = (torch.randint(classes, (40,), generator=generator) for _ in range(2))
    if classes == 5:
        labels[labels == 3], predicted[predicted == 1] = 0, 2
    counted = (labels[labels == predicted], labels, predicted)
    evaluation = Evaluation(20.0, *(tuple(torch.bincount(some, minlength=classes).tolist()) for some in counted))
    names = {"labels": range(classes), "zero_division": 0}
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted, **names)
    assert evaluation.precision == pytest.approx(precision)
    assert evaluation.recall == pytest.approx(recall)
    assert evaluation.f1 == pytest.approx(f1)
    assert evaluation.support == tuple(support)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # y_pred contains classes not in y_true
        assert evaluation.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert evaluation.f1_macro == pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    assert evaluation.score("f1_macro") == (evaluation.f1_macro, -0.5)
    assert evaluation.score("log_loss") == (-0.5, -0.5)


def test_a_missing_example_raises() -> None:
    with pytest.raises(RuntimeError, match="evaluated 3 examples, expected 4"):
        run(batches(torch.eye(3), torch.arange(3), [3]), expected=4)


def test_the_model_is_evaluated_in_eval_mode_and_its_mode_is_restored() -> None:
    model = nn.Sequential(FirstPixels(), nn.Dropout(1.0))
    assert run(batches(torch.eye(3), torch.arange(3), [3]), expected=3, model=model).accuracy == 1
    assert [module.training for module in model.modules()] == [True] * 3


@pytest.mark.parametrize("count", [0, 2, 3])
def test_every_process_syncs_before_every_batch_even_if_it_has_fewer(count: int) -> None:
    data, calls = batches(torch.eye(3)[:count], torch.arange(3)[:count], [1] * count), itertools.count(1)
    recorded: list[list[int]] = []

    def record(logits: Tensor, labels: Tensor, examples: Tensor) -> None:
        assert (logits.shape, labels.shape) == ((len(examples), 3), examples.shape)
        recorded.append(examples.tolist())

    evaluation = run(data, expected=count, num_batches=3, interrupted=lambda: next(calls) > 3, record=record)
    assert next(calls) == 4, "a process with fewer batches would leave the others waiting"
    assert evaluation.seen == count
    assert recorded == [[number] for number in range(count)] + [[]] * (3 - count)


@pytest.mark.parametrize(("at", "mode"), [(0, True), (2, False)])
def test_an_interrupted_evaluation_stops_at_once_and_restores_the_models_mode(at: int, mode: bool) -> None:
    seen: list[int] = []
    model = nn.Sequential(FirstPixels(), nn.Dropout(1.0)).train(mode)
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    data = batches(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64), [2, 2, 2])
    flags = iter([False] * at + [True])
    with pytest.raises(Interrupted):
        run(data, expected=6, model=model, interrupted=lambda: next(flags))
    assert seen == [2] * at
    assert [module.training for module in model.modules()] == [mode] * 3


def test_wilson_interval_equals_published_values_and_stays_within_0_and_1() -> None:
    # Newcombe 1998, table I, method 3 (score interval without continuity correction).
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}
    for counts, interval in published.items():
        assert wilson_interval(*counts) == pytest.approx(interval, abs=5e-5)
    assert (wilson_interval(5, 5)[1], wilson_interval(0, 1)[0]) == (1, 0)

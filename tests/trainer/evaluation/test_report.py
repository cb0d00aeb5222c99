"""Metrics of predictions, compared with scikit-learn's and SciPy's."""

import csv
import json
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn import metrics
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from trainer.evaluation import ranking
from trainer.evaluation.calibration import (
    NUM_BINS,
    calibrated_metrics,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from trainer.evaluation.predictions import COLUMNS, Predictions, write_predictions
from trainer.evaluation.report import make_report, to_json

NAMES = ("ant", 'b,"e"\ne', "broken \udcff", "d", "e", "f", "g")


def predictions(examples: int = 60, classes: int = 7, *, seed: int = 3) -> Predictions:
    """Return overconfident predictions, of which about a half are correct. The last class has no example."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (examples,), generator=generator)
    logits = torch.randn(examples, classes, generator=generator) + 1.5 * one_hot(labels, classes)
    return Predictions(3 * logits, labels)


def test_metrics_equal_scikit_learns() -> None:
    made = predictions()
    report = make_report(made, NAMES)
    probabilities, labels = made.logits.double().softmax(1).numpy(), made.labels.numpy()
    assert report.evaluation.accuracy == metrics.accuracy_score(labels, made.predicted)
    assert report.evaluation.loss == pytest.approx(metrics.log_loss(labels, probabilities, labels=range(7)))
    assert report.top5_accuracy == metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(7))
    assert report.confusion == tuple(map(tuple, metrics.confusion_matrix(labels, made.predicted, labels=range(7))))
    assert report.evaluation.support == tuple(torch.bincount(made.labels, minlength=7).tolist())


@pytest.mark.parametrize("levels", [1, 3, 1000], ids="{} levels".format)
def test_ranking_metrics_equal_scikit_learns_with_any_number_of_equal_scores(levels: int) -> None:
    made = predictions(300)
    made = Predictions((made.logits / 9 * levels).round() / levels * 9, made.labels)
    probabilities, truth = made.logits.double().softmax(1).numpy(), one_hot(made.labels, 7).numpy()
    report = make_report(made, NAMES)
    expected = [metrics.roc_auc_score(truth[:, k], made.probability(k)) for k in range(6)]
    assert report.ranking.auroc == (*(pytest.approx(value, abs=1e-12) for value in expected), None)
    expected = [metrics.average_precision_score(truth[:, k], made.probability(k)) for k in range(6)]
    assert report.ranking.average_precision == (*(pytest.approx(value, abs=1e-12) for value in expected), None)
    assert report.average_precision_macro == pytest.approx(sum(expected) / 6)
    assert probabilities == pytest.approx(torch.stack([made.probability(k) for k in range(7)], 1).numpy())


def test_calibration_error_is_the_weighted_difference_of_confidence_and_accuracy() -> None:
    made = predictions(400)
    total = 0.0
    for low in range(NUM_BINS):
        inside = (made.confidence > low / NUM_BINS) & (made.confidence <= (low + 1) / NUM_BINS)
        if inside.any():
            total += abs(made.confidence[inside].sum() - made.correct[inside].sum()).item()
    bins = reliability_bins(made)
    assert expected_calibration_error(bins) == pytest.approx(total / 400)
    assert sum(entry.count for entry in bins) == 400
    assert bins[0].confidence is None, "no confidence is below 1 / 7"
    sure = Predictions(torch.tensor([[0.0, 99.0], [-99.0, 99.0]]), torch.tensor([1, 0]))
    assert [entry.count for entry in reliability_bins(sure)] == [0] * (NUM_BINS - 1) + [2]


def test_the_temperature_minimizes_the_log_loss() -> None:
    made = predictions(200)

    def loss(temperature: float) -> float:
        return cross_entropy(made.logits.double() / temperature, made.labels).item()

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}).x
    assert fit_temperature(made) == pytest.approx(best, rel=1e-5)
    assert best > 1.5, "overconfident"
    calibrated = calibrated_metrics(made, best)
    assert calibrated.log_loss == pytest.approx(loss(best))
    assert calibrated.ece < make_report(made, NAMES).ece
    always_right = Predictions(10.0 * one_hot(made.labels, 7), made.labels)
    assert fit_temperature(always_right) is None, "its log loss has no minimum"
    always_wrong = Predictions(-10.0 * one_hot(made.labels, 7), made.labels)
    assert fit_temperature(always_wrong) == pytest.approx(20)


def test_equal_logits_count_for_the_first_class() -> None:
    ties = Predictions(torch.zeros(3, 7), torch.tensor([0, 4, 5]))
    assert ties.predicted.tolist() == [0, 0, 0]
    assert [ties.num_in_top(count) for count in (1, 4, 5, 6)] == [1, 1, 2, 3]
    assert ties.evaluation().correct == (1, 0, 0, 0, 0, 0, 0)


def test_a_report_is_json_and_leaves_out_what_is_not_defined() -> None:
    made = Predictions(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    report = make_report(made, ("a", "\udcff"))
    fields = report.to_fields()
    assert json.loads(to_json(fields)) == fields
    assert to_json(fields).isascii()
    assert (fields["top5_accuracy"], fields["auroc_macro"]) == (None, None), "two classes; one class has no example"
    assert fields["confusion_matrix"] == [[1, 1], [0, 0]]
    assert fields["accuracy_interval"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
    assert fields["per_class"]["recall"] == [0.5, 0.0]
    assert fields["balanced_accuracy"] == 0.5, "of the class that has examples"


def test_the_table_of_predictions_has_a_row_for_each_example(tmp_path: Path) -> None:
    made = predictions(4)
    paths = ["a.jpg", 'b,"\n.jpg', "c\udcff.jpg", "=d.jpg"]
    write_predictions(tmp_path / "p.csv", {"val": ([], of_none()), "test": (paths, made)}, NAMES)
    with (tmp_path / "p.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert [row[0] for row in rows] == paths
    for row, label, predicted, probabilities in zip(
        rows, made.labels.tolist(), made.predicted.tolist(), made.logits.softmax(1).tolist(), strict=True
    ):
        assert row[1:4] == ["test", NAMES[label], NAMES[predicted]]
        expected = [max(probabilities), probabilities[label]]
        assert list(map(float, row[4:])) == pytest.approx(expected, rel=1e-4)


def of_none() -> Predictions:
    return Predictions(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))


def test_auroc_is_the_share_of_ordered_pairs() -> None:
    def share(higher: Tensor, lower: Tensor) -> float:
        difference = higher[:, None] - lower
        return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()

    higher, lower = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 0.0])
    assert ranking.auroc(higher, lower) == pytest.approx(share(higher, lower)) == pytest.approx(5.5 / 6)

"""Tables of a report: the metrics of a split, the metrics of its classes, and what is confused most often."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.evaluation.calibration import CalibratedMetrics
from trainer.evaluation.report import SplitReport
from trainer.text import shorten

_MAX_CLASSES, _MAX_CONFUSIONS = 20, 5


def metric_table(report: SplitReport, calibrated: CalibratedMetrics | None) -> Table:
    """Return the metrics of a split, and those after calibration."""
    evaluation = report.evaluation
    low, high = evaluation.interval
    table = Table("metric", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("")
    counts = f"{sum(evaluation.correct)} of {evaluation.seen}"
    table.add_row("accuracy", f"{evaluation.accuracy:.4f}", f"{counts}; 95 % interval {low:.4f} to {high:.4f}")
    if report.top5_accuracy is not None:
        table.add_row("top-5 accuracy", f"{report.top5_accuracy:.4f}")
    table.add_row("balanced accuracy", f"{evaluation.balanced_accuracy:.4f}", "mean recall of the classes")
    table.add_row("F1 (macro)", f"{evaluation.f1_macro:.4f}", "mean of the classes")
    table.add_row(
        "log loss", f"{evaluation.loss:.4f}", _calibrated(None if calibrated is None else calibrated.log_loss)
    )
    table.add_row("calibration error", f"{report.ece:.4f}", _calibrated(None if calibrated is None else calibrated.ece))
    if report.auroc_macro is not None:
        table.add_row("AUROC (macro)", f"{report.auroc_macro:.4f}", "each class against all others")
    if report.average_precision_macro is not None:
        table.add_row("average precision", f"{report.average_precision_macro:.4f}", "mean of the classes")
    return table


def _calibrated(value: float | None) -> str:
    return "" if value is None else f"calibrated: {value:.4f}"


def class_table(report: SplitReport) -> Table:
    """Return the metrics of each class; of many classes, those with the lowest F1."""
    evaluation, ranking = report.evaluation, report.ranking
    order = sorted(range(len(report.classes)), key=lambda label: (not evaluation.support[label], evaluation.f1[label]))
    shown = order[:_MAX_CLASSES]
    title = None
    if len(shown) < len(order):
        title = f"the {len(shown)} of {len(order)} classes with the lowest F1; evaluation.json has all"
    table = Table("class", title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("precision", "recall", "F1", "AUROC", "images", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for label in sorted(shown):
        auroc, support = ranking.auroc[label], evaluation.support[label]
        table.add_row(
            shorten(report.classes[label]),
            f"{evaluation.precision[label]:.3f}",
            f"{evaluation.recall[label]:.3f}" if support else "-",
            f"{evaluation.f1[label]:.3f}" if support else "-",
            "-" if auroc is None else f"{auroc:.3f}",
            str(support),
            str(evaluation.predicted[label]),
        )
    return table


def describe_confusions(report: SplitReport) -> list[str]:
    """Return a line for each of the most frequent confusions."""
    names = [shorten(name) for name in report.classes]
    counts = [
        (count, label, predicted)
        for label, row in enumerate(report.confusion or ())
        for predicted, count in enumerate(row)
        if count and label != predicted
    ]
    most = sorted(counts, key=lambda entry: (-entry[0], entry[1:]))[:_MAX_CONFUSIONS]
    return [
        f"{count} of {report.evaluation.support[label]} images of {names[label]} are predicted as {names[predicted]}"
        for count, label, predicted in most
    ]

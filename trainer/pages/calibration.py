"""Calibration of a run: how often predictions of each confidence are right, before and after temperature scaling."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.pages.charts import Bubbles, Column, bubble_chart, column_chart
from trainer.pages.render import percent
from trainer.pages.run_files import number
from trainer.pages.run_record import RunRecord
from trainer.pages.split_result import ReliabilityBin, SplitResult, parse_reliability


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the report says about the probabilities of a model."""

    charts: Sequence[Markup]
    temperature: float | None
    """None if none was fitted."""
    log_loss: tuple[float | None, float | None]
    """Without and with the temperature."""
    ece: tuple[float | None, float | None]
    """Expected calibration error without and with the temperature."""

    @property
    def is_worse(self) -> bool:
        """Return whether the temperature has improved neither log loss nor calibration error."""
        pairs = (self.log_loss, self.ece)
        return all(before is not None and after is not None and after >= before for before, after in pairs)


def describe_calibration(run: RunRecord, result: SplitResult | None) -> Calibration | None:
    """Return the calibration of a split; None if it is not known."""
    if result is None or not any(entry.count for entry in result.reliability):
        return None
    calibrated = run.evaluation.get("calibrated")
    fields = calibrated.get(result.split) if isinstance(calibrated, dict) else None
    fields = fields if isinstance(fields, dict) else {}
    temperature = number(run.evaluation, "temperature")
    try:
        after = parse_reliability(fields.get("reliability", ()))
    except (ValueError, TypeError, LookupError):
        after = []
    groups = [_bubbles("as trained" if after else result.split, result.reliability, tone=2 if after else 1)]
    if after:
        groups.append(_bubbles(f"with the temperature {temperature or 0:.2f}", after, tone=1))
    return Calibration(
        charts=[
            bubble_chart(
                "How often predictions are right",
                groups,
                x_label="confidence: probability of the predicted class",
                description=_describe(result.reliability),
            ),
            *_confidences(result.reliability),
        ],
        temperature=temperature,
        log_loss=(result.metrics.get("log_loss"), number(fields, "log_loss")),
        ece=(result.metrics.get("ece"), number(fields, "ece")),
    )


def _bubbles(name: str, bins: Sequence[ReliabilityBin], *, tone: int) -> Bubbles:
    circles = [
        (
            entry.confidence, entry.accuracy, float(entry.count),
            f"{entry.count} images, confidence {percent(entry.confidence)}, right {percent(entry.accuracy)}",
        )
        for entry in bins
        if entry.confidence is not None and entry.accuracy is not None
    ]  # fmt: skip
    return Bubbles(name=name, circles=circles, tone=tone, is_filled=tone == 1)


def _confidences(bins: Sequence[ReliabilityBin]) -> list[Markup]:
    columns = [
        Column(f"{entry.low:.0%}", entry.count, f"{entry.count} images with {entry.low:.0%} to {entry.high:.0%}", 6)
        for entry in bins
    ]
    chart = column_chart("Number of images of each confidence", columns, x_label="confidence")
    return [] if chart is None else [chart]


def _describe(bins: Sequence[ReliabilityBin]) -> str:
    shown = [entry for entry in bins if entry.count]
    parts = (f"{percent(entry.confidence, 0)}: {percent(entry.accuracy, 0)} of {entry.count}" for entry in shown)
    return f"Accuracy of the predictions of each confidence: {'; '.join(parts)}"

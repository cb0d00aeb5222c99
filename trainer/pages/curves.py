"""The curves of a run: losses, accuracies, learning rates and throughput over the epochs."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from trainer.pages.charts import Series, line_chart
from trainer.pages.run_files import Row, points
from trainer.pages.run_record import RunRecord

TONES = {"train": 1, "test": 2, "val": 3}
_MAX_GROUPS = 6
"""Greatest number of learning rates that are drawn; of more, the first and the last ones."""


def draw_curves(run: RunRecord) -> list[Markup]:
    """Return the charts of a run that have points."""
    evaluations = [*([run.start] if run.start is not None else []), *run.epochs]
    rates = [
        Series(name=name, points=points(run.epochs, key), tone=tone)
        for name, key, tone in (
            ("end to end", "examples_per_sec", 1),
            ("without waiting for images", "examples_per_sec_compute", 2),
        )
    ]
    charts = (
        line_chart("Loss", list(_per_split(run.steps, evaluations, "loss")), x_label="epoch", y_range=(0, None)),
        line_chart(
            "Accuracy", list(_per_split(run.steps, evaluations, "accuracy")), x_label="epoch", y_range=(None, None),
            y_format="{:.0%}".format,
        ),
        line_chart("Learning rate", list(_learning_rates(run.steps)), x_label="epoch", y_log=True),
        line_chart("Training images per second", rates, x_label="epoch", y_range=(0, None)),
    )  # fmt: skip
    return [chart for chart in charts if chart is not None]


def _per_split(steps: Sequence[Row], evaluations: Sequence[Row], quantity: str) -> Iterator[Series]:
    """Yield the curves of a quantity: of training within the epochs, and of each split after them."""
    yield Series(name="train", points=points(steps, f"train_{quantity}"), tone=TONES["train"])
    for split in ("val", "test"):
        yield Series(name=split, points=points(evaluations, f"{split}_{quantity}"), tone=TONES[split])


def learning_rate_groups(steps: Sequence[Row]) -> dict[str, float]:
    """Return the parameter groups with their highest learning rate so far."""
    names = sorted({key for row in steps for key in row if key.startswith("lr_")})
    highest = {name: max((value for _, value in points(steps, name)), default=0.0) for name in names}
    return {name.removeprefix("lr_"): value for name, value in highest.items()}


def _learning_rates(steps: Sequence[Row]) -> Iterator[Series]:
    names = list(learning_rate_groups(steps))
    half = _MAX_GROUPS // 2
    shown = names if len(names) <= _MAX_GROUPS else [*names[:half], *names[-half:]]
    for tone, name in enumerate(shown, start=1):
        yield Series(name=name, points=points(steps, f"lr_{name}"), tone=tone)

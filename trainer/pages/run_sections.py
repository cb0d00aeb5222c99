"""Tables of a run: confusion matrix, confused pairs, classes, blocks of the model, findings of the data check."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.pages.curves import learning_rate_groups
from trainer.pages.render import percent
from trainer.pages.run_record import RunRecord
from trainer.pages.split_result import ClassResult, Confusion, SplitResult

_MAX_MATRIX, _MAX_CLASSES = 16, 1000
_NUM_WEAKEST, _MAX_PAIRS, _PAIRS = 3, 30, 3


def weakest_classes(result: SplitResult | None) -> list[ClassResult]:
    """Return the classes with the lowest recall, for a run whose confusion matrix is not known yet."""
    present = [entry for entry in result.classes if entry.support] if result is not None else []
    return sorted(present, key=lambda entry: entry.recall)[:_NUM_WEAKEST]


@dataclass(frozen=True)
class _Cell:
    count: int
    share: float
    """Fraction of the images of the class, from 0 to 1."""
    is_correct: bool
    title: str


@dataclass(frozen=True)
class _Matrix:
    names: list[str]
    rows: list[tuple[str, list[_Cell]]]
    is_part: bool
    """Whether the matrix shows the most confused classes alone."""


def confusion_matrix(result: SplitResult | None) -> _Matrix | None:
    """Return the confusion matrix; of many classes, that of the ones that are confused most often."""
    if result is None or result.matrix is None:
        return None
    labels = list(range(len(result.classes)))
    if len(labels) > _MAX_MATRIX:
        position = {entry.name: label for label, entry in enumerate(result.classes)}
        chosen: list[int] = []
        for pair in result.confusions():
            chosen += [label for name in (pair.label, pair.predicted) if (label := position[name]) not in chosen]
            if len(chosen) >= _MAX_MATRIX - 1:
                break
        labels = sorted(chosen[:_MAX_MATRIX])
    if not labels:
        return None
    names = [result.classes[label].name for label in labels]
    rows = []
    for label in labels:
        total = max(1, result.classes[label].support)
        cells = []
        for predicted in labels:
            count, name = result.matrix[label][predicted], result.classes[predicted].name
            title = f"{count} of {total} images of {result.classes[label].name} are predicted as {name}"
            cells.append(_Cell(count, min(1.0, count / total), label == predicted, title))
        rows.append((result.classes[label].name, cells))
    return _Matrix(names, rows, len(labels) < len(result.classes))


def describe_errors(result: SplitResult | None) -> str:
    """Return a sentence about the number of errors, and how many of them a few pairs of classes are."""
    pairs = result.confusions() if result is not None else []
    errors, top = (sum(pair.count for pair in part) for part in (pairs, pairs[:_PAIRS]))
    if len(pairs) <= _PAIRS:
        return f"{errors:,} errors in all." if pairs else ""
    return f"{errors:,} errors in all; these {_PAIRS} pairs are {percent(top / errors, 0)} of them."


def pair_rows(pairs: Sequence[Confusion]) -> list[list[Any]]:
    """Return the rows of the table of confused pairs; of many, those that are confused more than once."""
    shown = pairs if len(pairs) <= _MAX_PAIRS else [pair for pair in pairs if pair.count > 1] or pairs
    return [
        [
            pair.label, pair.predicted, (pair.count, pair.count), (percent(pair.fraction), pair.fraction),
            (pair.reverse, pair.reverse),
        ]
        for pair in shown[:_MAX_PAIRS]
    ]  # fmt: skip


def block_rows(run: RunRecord) -> list[list[Any]]:
    """Return the rows of the table of the model's blocks."""
    return [
        [
            row["block"], row["trains"], (row["parameters"], row["parameters"].replace(",", "")), row["peak_lr"],
            row["weight_decay"], row["batch_norm"],
        ]
        for row in run.blocks
    ]  # fmt: skip


def group_rows(run: RunRecord) -> list[list[Any]]:
    """Return the rows of the table of parameter groups, for a run without a table of blocks."""
    return [[group, (f"{rate:.3g}", rate)] for group, rate in learning_rate_groups(run.steps).items()]


def class_rows(result: SplitResult | None) -> list[list[Any]]:
    """Return the rows of the table of classes, the lowest F1 first."""
    classes = sorted(result.classes, key=lambda entry: (not entry.support, entry.f1)) if result is not None else []
    return [
        [
            entry.name,
            (f"{entry.support:,}", entry.support),
            (f"{entry.predicted:,}", entry.predicted),
            (f"{entry.precision:.3f}" if entry.predicted else "–", entry.precision if entry.predicted else -1),
            (f"{entry.recall:.3f}" if entry.support else "–", entry.recall if entry.support else -1),
            (f"{entry.f1:.3f}" if entry.support else "–", entry.f1 if entry.support else -1),
            ("–", -1) if entry.auroc is None else (f"{entry.auroc:.3f}", entry.auroc),
        ]
        for entry in classes[:_MAX_CLASSES]
    ]


def check_findings(run: RunRecord) -> list[tuple[str, str]]:
    """Return severity and message of the findings of `regraft check`."""
    findings = (run.check or {}).get("findings")
    return [
        (str(finding.get("severity", "note")), f"{finding.get('message', '')} {finding.get('remedy', '')}".strip())
        for finding in (findings if isinstance(findings, list) else [])
        if isinstance(finding, dict)
    ]

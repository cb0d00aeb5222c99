"""What a report says first: which classes are confused, the likely reasons, and what to do next.

Each rule states its evidence with numbers from the run folder. A rule without evidence says nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from regraft.contract import CONFIG
from trainer.pages.render import percent
from trainer.pages.run_files import number, points
from trainer.pages.run_record import RunRecord
from trainer.pages.split_result import ClassResult, SplitResult

_MAX_ADVICE = 4
_SURE = 0.9
"""Probability of a wrong prediction from which its label is worth a look."""
_FITTED, _GAP, _WIDE, _IMBALANCE, _RARE = 0.8, 0.1, 0.12, 5.0, 0.7


@dataclass(frozen=True)
class Advice:
    """A likely reason for errors, and what to do."""

    severity: Literal["error", "warning", "note", "good"]
    reason: str
    """What was found, with its numbers."""
    action: str
    """What to do next; may be empty."""
    command: str = ""
    """The command that does it, as typed."""
    section: str = ""
    """Section of the page to look at."""


def make_advice(run: RunRecord) -> list[Advice]:
    """Return what to do next, the most urgent first; the reason of the most frequent confusion is always among it."""
    result = run.reported
    if result is None:
        return []
    why = list(_pairs(run, result))
    rules = (_leakage, _selection, _fit, _labels, _imbalance, _calibration, _interval)
    others = [advice for rule in rules for advice in rule(run, result)]
    order = {"error": 0, "warning": 1, "note": 2, "good": 3}
    others.sort(key=lambda advice: order[advice.severity])
    return sorted([*why, *others[: _MAX_ADVICE - len(why)]], key=lambda advice: order[advice.severity])


def _leakage(run: RunRecord, _: SplitResult) -> Iterator[Advice]:
    """Say what `regraft check` has found in the data."""
    findings = (run.check or {}).get("findings")
    for finding in findings if isinstance(findings, list) else ():
        if isinstance(finding, dict) and finding.get("severity") == "error":
            remedy = str(finding.get("remedy") or "See the data check below.")
            yield Advice("error", str(finding.get("message", "")), remedy)


def _selection(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say whether the epoch was selected on the images that the result is of."""
    if not run.is_evaluated or len(run.epochs) < 2 or number(run.epochs[-1], "val_accuracy") is not None:
        return
    last = number(run.epochs[-1], f"{result.split}_accuracy")
    if last is not None and last < result.accuracy:
        yield Advice(
            "warning",
            f"{percent(result.accuracy)} is optimistic: the best epoch was selected on these {result.split} images. "
            f"The last epoch has {percent(last)}.",
            "Hold out training images for the selection.",
            _train_again(run, "--data.val_fraction 0.1"),
        )


def _fit(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say whether training was too short, too long, or fitted the training images alone."""
    if not run.epochs:
        return
    train, split = number(run.epochs[-1], "train_accuracy"), result.split
    losses = points(run.epochs, f"{split}_loss")
    best = min(losses, key=lambda point: point[1], default=(0.0, 0.0))
    is_pretrained = bool(run.option("model.weights") or run.option("pretrain.root"))
    if train is not None and train >= _FITTED and train - result.accuracy > _GAP:
        yield Advice(
            "warning",
            f"Overfitting: the accuracy is {percent(train)} on training images and {percent(result.accuracy)} on "
            f"{split} images.",
            "Use more images, stronger augmentation, or train fewer layers."
            if is_pretrained
            else "Begin with pretrained weights, or use more images and stronger augmentation.",
            _train_again(run, "--data.augment trivialaugment" if is_pretrained else "--model.weights DEFAULT"),
        )
    elif len(losses) >= 3 and losses[-1][1] > 1.15 * best[1]:
        yield Advice(
            "warning",
            f"The {split} loss has risen since epoch {best[0]:g}: later epochs made the probabilities worse.",
            "Train fewer epochs, or with a smaller learning rate.",
            _train_again(run, "--data.val_fraction 0.1 --regularization.early_stopping 3"),
        )
    elif not run.is_evaluated:  # the run goes on
        return
    elif len(losses) >= 3 and losses[-1][1] < 0.97 * losses[-2][1]:
        yield Advice(
            "note",
            f"The {split} loss was still falling in the last epoch.",
            f"Train longer: {2 * len(losses)} epochs in all. This continues the run.",
            f"regraft train --config {run.words[1]}/{CONFIG} --train.epochs {2 * len(losses)}",
        )
    elif train is not None and train < _FITTED:
        yield Advice(
            "note",
            f"The accuracy on training images is {percent(train)}: the model has not fitted them.",
            "Train longer, find a better learning rate, or train more layers.",
            f"regraft lr-find --config {run.words[1]}/{CONFIG}",
        )


def _pairs(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say in which direction the most frequent pair is confused."""
    pairs = result.confusions()
    if not pairs or pairs[0].count < 2:
        return
    top = pairs[0]
    if top.reverse >= 0.5 * top.count:
        yield Advice(
            "note",
            f"{top.label} and {top.predicted} are confused in both directions ({top.count} and {top.reverse} images): "
            "they look alike to the model, or their labels are mixed up.",
            "Look at the pictures. If the difference is in small details, train with larger images.",
            _train_with_larger_images(run),
            "pictures",
        )
    else:
        supports = {entry.name: entry.support for entry in result.classes}
        is_rare = supports[top.label] < _RARE * supports[top.predicted]
        yield Advice(
            "note",
            f"{top.label} is predicted as {top.predicted} more often ({top.count} images) than the reverse "
            f"({top.reverse}).",
            f"Add images of {top.label} that look like {top.predicted}{', or weigh the classes' if is_rare else ''}.",
            _train_again(run, "--regularization.class_weights balanced") if is_rare else "",
        )


def _labels(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say how many wrong predictions are sure: their labels may be wrong."""
    wrong = [entry for entry in run.predictions if entry.split == result.split and not entry.is_correct]
    sure = sum(entry.probability >= _SURE for entry in wrong)
    if sure:
        yield Advice(
            "warning" if sure >= 0.3 * len(wrong) else "note",
            f"The model was sure (probability of {percent(_SURE, 0)} or more) of {sure} of its {len(wrong)} wrong "
            "predictions.",
            "Look at them: a label may be wrong, or the picture shows several classes.",
            "regraft check {} --model {} --html check.html".format(*run.words),
            "pictures",
        )


def _imbalance(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say whether rare classes are recognized worse than frequent ones."""
    present = sorted((entry for entry in result.classes if entry.support), key=lambda entry: entry.support)
    if len(present) < 2 or present[-1].support < _IMBALANCE * present[0].support:
        return
    half = len(present) // 2
    rare, frequent = (_mean_recall(part) for part in (present[:half], present[-half:]))
    if rare < frequent - 0.05 and run.option("regularization.class_weights") != "balanced":
        yield Advice(
            "warning",
            f"Rare classes are recognized worse: mean recall {percent(rare)} for the rarer half of the classes, "
            f"{percent(frequent)} for the other half.",
            "Show each class equally often, or weigh the loss.",
            _train_again(run, "--data.sampling balanced"),
        )


def _calibration(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say whether the probabilities are too high."""
    ece = result.metrics.get("ece")
    if ece is None or ece < 0.05:
        return
    temperature = run.evaluation.get("temperature")
    yield Advice(
        "note",
        f"The probabilities differ from the accuracy by {percent(ece)} on average.",
        "Calibrated probabilities are in the model file." if temperature else "Hold out images to calibrate them.",
        f"regraft predict {run.words[1]} FOLDER --calibrated"
        if temperature
        else _train_again(run, "--data.val_fraction 0.1"),
        "calibration",
    )


def _interval(run: RunRecord, result: SplitResult) -> Iterator[Advice]:
    """Say whether the result is uncertain, because there are few images."""
    low, high = result.interval
    if high - low > _WIDE:
        yield Advice(
            "note",
            f"The result is uncertain: with {result.examples} images, the true accuracy may be between {percent(low)} "
            f"and {percent(high)}.",
            "Evaluate on more images before two runs are compared by a few percent.",
            f"regraft evaluate {run.words[1]} FOLDER",
        )


def _train_again(run: RunRecord, options: str) -> str:
    """Return the command of a new run, like this one but for some options."""
    folder = run.words[1]
    return f"regraft train --config {folder}/{CONFIG} --run.dir {folder}-2 {options}"


def _train_with_larger_images(run: RunRecord) -> str:
    size = run.option("data.image_size")
    return _train_again(run, f"--data.image_size {size * 4 // 3 // 32 * 32}") if isinstance(size, int) else ""


def _mean_recall(classes: Sequence[ClassResult]) -> float:
    return sum(entry.recall for entry in classes) / max(1, len(classes))

"""What a checkpoint says beside its tensors: where the run stands, and what it belongs to. JSON, validated.

There is no state of a random generator: the order of the examples follows from (seed, epoch), a crop from
(seed, epoch, example), the masks of dropout from (seed, step, process). `order` proves that it does.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from trainer.errors import UserError
from trainer.metrics import MetricState
from trainer.text import escape_unprintable, join_truncated

FORMAT = 1
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """The best epoch so far."""

    epoch: int
    step: int
    accuracy: float
    loss: float

    @property
    def score(self) -> tuple[float, float]:
        """Return what epochs are compared by: the accuracy, of equals the lower loss."""
        return self.accuracy, -self.loss


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run trains: another subject's checkpoint is of no use to it."""

    architecture: str
    classes: tuple[str, ...]
    examples: tuple[int, ...]
    """Training examples of each class."""
    data: str
    """Fingerprint of the examples: the order is drawn over those of training, the best epoch chosen on others."""

    def check_same(self, other: "RunIdentity", where: str) -> None:
        """Raise a UserError that says how a checkpoint's subject (`self`) differs from this run's."""
        if self == other:
            return
        lines = []
        if self.architecture != other.architecture:
            lines.append(f"model: {escape_unprintable(self.architecture)} there, {other.architecture} now")
        gone = [name for name in self.classes if name not in other.classes]
        new = [name for name in other.classes if name not in self.classes]
        if gone or new:
            lines.append(f"classes: {_named(gone)} only there, {_named(new)} only now")
        elif self.classes != other.classes:
            lines.append("classes: in another order")
        then, now = (dict(zip(s.classes, s.examples, strict=True)) for s in (self, other))
        counts = [
            f"{escape_unprintable(name)} {then[name]} there, {now[name]} now"
            for name in then
            if name in now and then[name] != now[name]
        ]
        if counts:
            lines.append(f"training images: {join_truncated(counts, limit=5)}")
        if not lines:
            lines.append(
                "images: as many to train on in each class, but not the same, or others to evaluate (names or split)"
            )
        shown = "".join(f"\n  {line}" for line in lines)
        raise UserError(
            f"{where}: a checkpoint of something else:{shown}\nBring back what it was trained on, choose another "
            "run.dir, or --run.resume never, which moves that run aside"
        )


def _named(names: list[str]) -> str:
    return join_truncated([escape_unprintable(name) for name in names], limit=5) if names else "none"


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Where a run stands, and what it needs to go on as if nothing had happened."""

    epoch: int
    """Whole epochs made: trained and evaluated."""
    step: int
    """Updates made; those beyond `epoch` whole epochs are of the epoch in progress."""
    sums: MetricState | None
    """Of the epoch in progress; None between two epochs."""
    best: BestEpoch | None
    subject: RunIdentity
    seed: int
    order: str
    """SHA-256 of the order of the examples in the epoch in progress: drawn again, it must be the same."""
    steps_per_epoch: int
    schedule: Mapping[str, Any]
    """kind, warmup_steps, total_steps, and the next update's share of the peak learning rate: for readers."""
    scaler: Mapping[str, Any]
    """State of fp16's loss scaling; empty without it."""
    chosen: Mapping[str, Any]
    """What was chosen for this machine: precision, channels_last. For readers: config.yaml keeps it."""
    world_size: int
    """Processes that wrote it."""
    threads: int
    attempt: int
    versions: Mapping[str, str]
    """Package -> version."""
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the state as JSON: in ASCII, since a folder's name may hold bytes that no Unicode text has."""
        return (json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the state that `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: it is none.
            UserError: a later version wrote it.

        """
        fields = json.loads(text)
        if type(fields["format"]) is int and fields["format"] > FORMAT:
            raise UserError(
                f"a checkpoint of format {fields['format']}, by a later regraft than this one, which reads {FORMAT}: "
                "go on with the version that wrote it, or choose another run.dir"
            )
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
        subject, sums, best = fields["subject"], fields["sums"], fields["best"]
        for name in ("classes", "examples"):
            subject[name] = tuple(subject[name])
        fields["subject"] = RunIdentity(**subject)
        if sums is not None:
            fields["sums"] = MetricState(**{**sums, "rows": tuple(map(tuple, sums["rows"]))})
        if best is not None:
            fields["best"] = BestEpoch(**best)
        state = cls(**fields)
        state._check()
        return state

    def _check(self) -> None:
        _require(all(map(_is_count, (self.epoch, self.step, self.seed, self.attempt))), "its counters")
        _require(all(map(_is_count, (self.world_size, self.threads, self.steps_per_epoch))), "its counters")
        _require(self.world_size > 0 and self.steps_per_epoch > 0, "its counters")
        begun = self.step - self.epoch * self.steps_per_epoch
        _require(0 <= begun <= self.steps_per_epoch, f"step {self.step} with {self.epoch} whole epochs")
        _require((self.sums is not None) == (begun > 0), "the sums of the epoch in progress")
        if self.sums is not None:
            rows = self.sums.rows
            _require(
                len(rows) == self.world_size
                and all(len(row) == 3 and _is_number(row[0]) and all(map(_is_count, row[1:])) for row in rows)
                and _is_number(self.sums.seconds)
                and _is_number(self.sums.compute_seconds),
                "the sums of the epoch in progress",
            )
        if self.best is not None:
            _require(
                all(map(_is_count, (self.best.epoch, self.best.step)))
                and all(map(_is_number, (self.best.accuracy, self.best.loss))),
                "the best epoch",
            )
        subject = self.subject
        _require(
            all(isinstance(text, str) for text in (subject.architecture, subject.data, *subject.classes))
            and all(map(_is_count, subject.examples))
            and len(subject.classes) == len(subject.examples) > 0,
            "what it is of",
        )
        _require(isinstance(self.order, str), "the order")
        mappings = (self.schedule, self.scaler, self.chosen, self.versions)
        _require(all(isinstance(value, dict) for value in mappings), "its entries")
        _require(
            not self.scaler
            or (set(self.scaler) == _SCALER_KEYS and all(map(_is_number, self.scaler.values()))),
            "the loss scaling",
        )
        _require(all(isinstance(text, str) for text in self.versions.values()), "its versions")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"its state does not make sense: {what}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    # An integer may be too large to be told whether it is finite.
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < 2**63

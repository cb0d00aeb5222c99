"""`state.json` of a checkpoint: the position and the identity of the run, as JSON that is validated when it is read.

No state of a random generator is saved. The order of the examples depends on (seed, epoch), a crop on (seed, epoch,
example), and dropout masks on (seed, step, rank). `order_digest` proves that the same order is drawn again.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState
from trainer.text import escape_unprintable, join_truncated

FORMAT = 3
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class CheckpointId(NamedTuple):
    """Position of a checkpoint in a run; checkpoints are ordered by it."""

    step: int
    """Updates completed."""
    epoch: int
    """Whole epochs completed: trained and evaluated."""

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return f"step-{self.step:08}-epoch-{self.epoch:04}"

    @classmethod
    def of(cls, name: str) -> Self | None:
        """Return the id in a folder's name, or None if it is not the name of a checkpoint."""
        match = re.fullmatch(r"step-([0-9]{8,15})-epoch-([0-9]{4,15})", name, flags=re.ASCII)
        checkpoint = cls(int(match[1]), int(match[2])) if match else None
        return checkpoint if checkpoint and checkpoint.name == name else None


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """The model and the data of a run. A run cannot resume from a checkpoint with another identity."""

    architecture: str
    classes: tuple[str, ...]
    examples: tuple[int, ...]
    """Number of training examples of each class."""
    data: str
    """Fingerprint of the examples of all splits, in order."""

    def check_same(self, other: "RunIdentity", where: str) -> None:
        """Raise a UserError that says how this identity, a checkpoint's, differs from `other`, the run's."""
        if self == other:
            return
        lines = []
        if self.architecture != other.architecture:
            lines.append(f"model: {escape_unprintable(self.architecture)} there, {other.architecture} now")
        removed = [name for name in self.classes if name not in other.classes]
        added = [name for name in other.classes if name not in self.classes]
        if removed or added:
            lines.append(f"classes: {_names(removed)} only there, {_names(added)} only now")
        elif self.classes != other.classes:
            lines.append("classes: in another order")
        there, now = (dict(zip(one.classes, one.examples, strict=True)) for one in (self, other))
        counts = [
            f"{escape_unprintable(name)} {there[name]} there, {now[name]} now"
            for name in there
            if name in now and there[name] != now[name]
        ]
        if counts:
            lines.append(f"training images: {join_truncated(counts, limit=5)}")
        if not lines:
            lines.append("images: the same number of each class, but other files or another split")
        differences = "".join(f"\n  {line}" for line in lines)
        raise UserError(
            f"{where}: a checkpoint of another run:{differences}\nRestore the data that it was trained on, choose "
            "another run.dir, or --run.resume never, which archives the run"
        )


def _names(names: list[str]) -> str:
    return join_truncated([escape_unprintable(name) for name in names], limit=5) if names else "none"


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """What every checkpoint of one start of the trainer says about the run."""

    identity: RunIdentity
    seed: int
    steps_per_epoch: int
    schedule: Mapping[str, Any]
    """For readers: kind, warmup_steps, total_steps."""
    auto_resolved: Mapping[str, Any]
    """For readers: the choices made for this machine, precision and channels_last. config.yaml has them too."""
    world_size: int
    """Number of processes."""
    threads: int
    """CPU threads of each process."""
    attempt: int
    """Number of the start."""
    versions: Mapping[str, str]
    """Package -> version."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """All of a checkpoint but its tensors and its metrics file."""

    epoch: int
    """Whole epochs completed: trained and evaluated."""
    step: int
    """Updates completed, those of the epoch in progress included."""
    metrics: MetricState | None
    """Metric sums of the epoch in progress; None between two epochs."""
    best: BestEpoch | None
    scaler: Mapping[str, Any]
    """State of fp16's loss scaling; empty without it."""
    order_digest: str
    """SHA-256 of the order of the examples in the epoch in progress. The same seed must draw it again."""
    run: RunMetadata
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the state as JSON in ASCII: class names may hold bytes that are not valid Unicode."""
        return (json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the state in a text that `to_json` has written.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: not a valid state.
            UserError: a later version wrote it.

        """
        fields = json.loads(text)
        if type(fields["format"]) is int and fields["format"] > FORMAT:
            raise UserError(
                f"a checkpoint of format {fields['format']}, written by a later version of regraft; this version reads "
                f"{FORMAT}: resume with the version that wrote it, or choose another run.dir"
            )
        if fields["format"] == 2:  # the accuracy was the only metric that selected the best epoch
            fields["format"], best = FORMAT, fields["best"]
            fields["best"] = best and {"value" if key == "accuracy" else key: best[key] for key in best}
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
        run, metrics, best = fields["run"], fields["metrics"], fields["best"]
        identity = run["identity"]
        for name in ("classes", "examples"):
            identity[name] = tuple(identity[name])
        fields["run"] = RunMetadata(**{**run, "identity": RunIdentity(**identity)})
        if metrics is not None:
            fields["metrics"] = MetricState(**{**metrics, "rows": tuple(map(tuple, metrics["rows"]))})
        if best is not None:
            fields["best"] = BestEpoch(**best)
        state = cls(**fields)
        state._check()
        return state

    def _check(self) -> None:
        run = self.run
        counters = (self.epoch, self.step, run.seed, run.attempt, run.world_size, run.threads, run.steps_per_epoch)
        _require(all(map(_is_count, counters)), "its counters")
        _require(run.world_size > 0 and run.steps_per_epoch > 0, "its counters")
        epoch_step = self.step - self.epoch * run.steps_per_epoch
        _require(0 <= epoch_step <= run.steps_per_epoch, f"step {self.step} with {self.epoch} whole epochs")
        _require((self.metrics is not None) == (epoch_step > 0), "the metric sums of the epoch in progress")
        if self.metrics is not None:
            rows = self.metrics.rows
            _require(
                len(rows) == run.world_size
                and all(len(row) == 3 and _is_number(row[0]) and all(map(_is_count, row[1:])) for row in rows)
                and _is_number(self.metrics.seconds)
                and _is_number(self.metrics.compute_seconds),
                "the metric sums of the epoch in progress",
            )
        if self.best is not None:
            _require(
                all(map(_is_count, (self.best.epoch, self.best.step)))
                and all(map(_is_number, (self.best.value, self.best.loss))),
                "the best epoch",
            )
        identity = run.identity
        _require(
            all(isinstance(text, str) for text in (identity.architecture, identity.data, *identity.classes))
            and all(map(_is_count, identity.examples))
            and len(identity.classes) == len(identity.examples) > 0,
            "the identity of its run",
        )
        _require(isinstance(self.order_digest, str), "the order of the examples")
        mappings = (run.schedule, self.scaler, run.auto_resolved, run.versions)
        _require(all(isinstance(value, dict) for value in mappings), "its entries")
        _require(
            not self.scaler or (set(self.scaler) == _SCALER_KEYS and all(map(_is_number, self.scaler.values()))),
            "the loss scaling",
        )
        _require(all(isinstance(text, str) for text in run.versions.values()), "its versions")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"its state is not valid: {what}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    # math.isfinite raises for an integer that is too large for a float.
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < 2**63

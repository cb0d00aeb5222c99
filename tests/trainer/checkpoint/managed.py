"""A run whose weights a test sets, and its checkpoint manager."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from regraft.contract import CHECKPOINTS, MODEL, read_attempt
from trainer.checkpoint import store
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import CheckpointId
from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.loop import StepDecision
from trainer.metrics import MetricState
from trainer.model.metadata import read_metadata
from trainer.run.session import OpenRun
from trainer.state import TrainState

STEPS = 2
"""Updates of an epoch."""
SUMS = MetricState(rows=((0.5, 2, 4),), seconds=2.0, compute_seconds=1.0)
AVERAGE = 77.0  # weights of the moving average, which no test updates
NEVER = RetentionPolicy(every_steps=None, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)
EVERY_EPOCH = dataclasses.replace(NEVER, every_steps=STEPS, keep_best=True)


@dataclass
class Log:
    """The metrics of a run."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    failure: UserError | None = None

    @property
    def text(self) -> str:
        return "".join(f"{json.dumps(row)}\n" for row in self.epochs)


@dataclass
class Training:
    """A run whose weights a test sets, and its checkpoint manager."""

    run: OpenRun
    state: TrainState
    log: Log
    saver: CheckpointSaver
    manager: CheckpointManager

    def set_weights(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.state.model.parameters():
                parameter.fill_(value)

    def sync(self, step: int) -> StepDecision:
        self.state.step = step
        return self.manager.sync_flags()

    def save(self, epoch: int, step: int) -> None:
        """Save within an epoch."""
        self.state.epoch, self.state.step, self.state.metrics = epoch, step, SUMS
        self.manager.save()

    def end_epoch(self, epoch: int, accuracy: float, *, loss: float = 1.0, split: str = "test") -> str | None:
        """End an epoch with the weights at its number; return the reason to stop."""
        self.set_weights(epoch)
        self.state.epoch, self.state.step, self.state.metrics = epoch, STEPS * epoch, None
        row = {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
        self.log.epochs.append({"kind": "epoch", "epoch": epoch, "step": STEPS * epoch, **row})
        correct = round(10 * accuracy)
        evaluation = Evaluation(loss_sum=10 * loss, correct=(correct, 0), support=(10, 0), predicted=(10, 0))
        return self.manager.end_epoch({split: evaluation})

    @property
    def checkpoints(self) -> list[tuple[int, int]]:
        """Return (step, epoch) of each checkpoint, newest first."""
        return [tuple(checkpoint) for checkpoint in store.list_checkpoints(self.run.folder / CHECKPOINTS)]

    def path(self, step: int, epoch: int) -> Path:
        return self.run.folder / CHECKPOINTS / CheckpointId(step, epoch).name

    def model_metrics(self) -> Any:
        """Return the metrics in the header of the model file."""
        metadata = read_metadata(self.run.folder / MODEL)
        assert metadata is not None
        return metadata.metrics

    def model_file(self) -> tuple[float, Any]:
        """Return a weight of the model file, and the epoch in its header."""
        return load_file(self.run.folder / MODEL)["0.weight"].flatten()[0].item(), self.model_metrics()["epoch"]

    def recorded_position(self) -> tuple[int, int, int, int]:
        """Return step, steps, epoch and epochs of the attempt's record."""
        assert self.saver.wait()
        record = read_attempt(self.run.root / "attempts" / f"{self.run.attempt:04}.json")
        assert record is not None
        return record.step, record.steps, record.epoch, record.epochs


Make = Callable[..., Training]

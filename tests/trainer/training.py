"""A small network, its batches, and what `fit` needs to train it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext
from trainer.evaluate import Evaluations
from trainer.loop import Checkpoints, NullCheckpoints, StepDecision, fit
from trainer.metrics import Progress
from trainer.optim.ema import ModelEma
from trainer.optim.loss import CROSS_ENTROPY
from trainer.optim.mixup import Mixup
from trainer.optim.param_groups import create_optimizer, group_parameters
from trainer.optim.schedule import TrainSchedule
from trainer.optim.train_step import LocalBatch, TrainStep
from trainer.state import TrainState
from trainer.transfer.l2_sp import L2SP

SCHEDULE = TrainSchedule(batch_sizes=(4, 4, 3), epochs=2, logs_per_epoch=3, lr_multiplier=lambda step: 1.0)
CONTINUE = StepDecision(save=False, stop=None)


class SmallNet(nn.Module):
    """A network for images [B, 3, 8, 8] of three classes; by default without BatchNorm and dropout."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        logits: Tensor = self.fc(self.dropout(features))
        return logits


def make_net(seed: int = 0, **options: Any) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet(**options)


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def normalize(images: Tensor) -> Tensor:
    return images.float() / 255


class Batches:
    """The batches of a run from a step on; the same for every call."""

    def __init__(
        self,
        schedule: TrainSchedule = SCHEDULE,
        start_step: int = 0,
        *,
        change: Callable[[int, LocalBatch], LocalBatch] = lambda step, batch: batch,
    ) -> None:
        self._schedule, self._step, self._change = schedule, start_step, change

    def __next__(self) -> LocalBatch:
        step, sizes = self._step, self._schedule.batch_sizes
        self._step += 1
        generator = torch.Generator().manual_seed(step)
        size = sizes[step % len(sizes)]
        images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
        labels = torch.randint(3, (size,), generator=generator)
        return self._change(step, (images, labels, torch.arange(size)))

    def paths(self, epoch: int, step: int) -> Sequence[str]:
        return [f"epoch{epoch}-batch{step}.jpg"]


def make_state(
    model: nn.Module,
    ctx: DistributedContext,
    *,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.0,
    ema: float | None = None,
) -> TrainState:
    groups = group_parameters(model, ["fc"], lr=0.05, head_lr_scale=2, weight_decay=0.01)
    prepared, prepared_optimizer = ctx.prepare(model, create_optimizer(optimizer, groups, momentum=momentum))
    model = ctx.unwrap(prepared)
    return TrainState(model=model, optimizer=prepared_optimizer, ema=ModelEma(model, ema))


def make_train_step(ctx: DistributedContext, *, mixup: tuple[float, float] = (0, 0), **options: Any) -> TrainStep:
    """Return an update with cross-entropy alone; `mixup` holds the alphas of mixup and CutMix."""
    step = TrainStep(
        ctx=ctx,
        normalize=normalize,
        criterion=CROSS_ENTROPY,
        mixup=Mixup(
            mixup_alpha=mixup[0], cutmix_alpha=mixup[1], seed=0,
            rank=ctx.rank, world_size=ctx.world_size, gather=ctx.accelerator.gather,
        ),
        l2_sp=L2SP([], 0.0, decoupled=False),
        loss_reduction="mean",
        grad_accum_steps=1,
        max_grad_norm=None,
        seed=0,
    )  # fmt: skip
    return replace(step, **options)


class RecordingLogger:
    """Records what the loop reports."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int]] = []
        self.steps: list[Progress] = []
        self.epochs: list[Progress] = []
        self.evaluations: list[Evaluations] = []
        self.drawn_epochs: list[int] = []

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        self.progress.append((epoch, epoch_step))

    def log_step(self, progress: Progress) -> None:
        self.steps.append(progress)

    def draw_curves(self) -> None:
        self.drawn_epochs.append(len(self.epochs))

    def log_epoch(self, progress: Progress, evaluations: Evaluations, evaluation_seconds: float) -> None:
        self.epochs.append(progress)
        self.evaluations.append(evaluations)


class RecordingCheckpoints:
    """Records the states that it is asked to save; decides what a test has planned for a step."""

    def __init__(
        self,
        state: TrainState,
        decisions: Mapping[int, StepDecision] | None = None,
        *,
        stop_after_epoch: int | None = None,
        stop_early_after_epoch: int | None = None,
    ) -> None:
        self._state, self._decisions = state, decisions or {}
        self._stop_after_epoch, self._stop_early_after_epoch = stop_after_epoch, stop_early_after_epoch
        self.synced: list[int] = []
        self.epochs: list[int] = []
        self.saved: list[dict[str, Any]] = []

    @property
    def stopped_early(self) -> bool:
        return self._state.epoch == self._stop_early_after_epoch

    def sync_flags(self) -> StepDecision:
        self.synced.append(self._state.step)
        return self._decisions.get(self._state.step, CONTINUE)

    def save(self) -> None:
        self.saved.append(self._state.state_dict())

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        self.epochs.append(self._state.epoch)
        if self._state.epoch != self._stop_after_epoch:
            return None
        self.save()
        return "SIGTERM"


Evaluate = Callable[[nn.Module, Callable[[], bool]], Evaluations]


def skip_evaluation(model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
    return {}


def run_fit(
    state: TrainState,
    train_step: TrainStep,
    schedule: TrainSchedule = SCHEDULE,
    *,
    batches: Batches | None = None,
    evaluate: Evaluate = skip_evaluation,
    checkpoints: Checkpoints | None = None,
    logger: RecordingLogger | None = None,
) -> RecordingLogger:
    """Train from the state's position on in a single process, and return what was reported."""
    logger = logger or RecordingLogger()
    fit(
        state,
        batches or Batches(schedule, state.step),
        schedule,
        train_step,
        start_epoch=lambda epoch, interrupted: state.model,
        evaluate=evaluate,
        checkpoints=checkpoints or NullCheckpoints(),
        logger=logger,
    )
    return logger

"""From a config to the training itself: schedule, update, checkpoint policy, and what checkpoints say about the run."""

from functools import partial

from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import RunIdentity, RunMetadata
from trainer.config.build_data import RunData
from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.data.sampler import EpochOrder
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.schedule import (
    Interval,
    TrainSchedule,
    get_lr_multiplier,
    parse_duration,
    parse_interval,
    to_steps,
)
from trainer.optim.train_step import TrainStep
from trainer.run.session import OpenRun
from trainer.run.versions import versions
from trainer.transfer.l2_sp import L2SP


def make_schedule(config: ResolvedConfig, order: EpochOrder) -> TrainSchedule:
    """Return the updates of the run; durations become steps here.

    Raises:
        UserError: the warm-up is longer than the run.

    """
    total = order.steps_per_epoch * config.train.epochs
    warmup = _warmup_steps(config, order)
    if warmup > total:
        raise UserError(
            f"optim.warmup is {config.optim.warmup!r}, {warmup} steps, but the run has {total}: the peak learning rate "
            "would not be reached"
        )
    return TrainSchedule(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        logs_per_epoch=config.train.logs_per_epoch,
        lr_multiplier=partial(
            get_lr_multiplier, total_steps=total, warmup_steps=warmup, kind=config.optim.schedule
        ),
    )


def _warmup_steps(config: ResolvedConfig, order: EpochOrder) -> int:
    duration = parse_duration("optim.warmup", config.optim.warmup)
    steps = order.steps_per_epoch
    return to_steps(duration, steps_per_epoch=steps, total_steps=steps * config.train.epochs)


def make_train_step(
    config: ResolvedConfig, data: RunData, ctx: DistributedContext, l2_sp: L2SP
) -> TrainStep:
    """Return the update; class weights come from the examples that are trained on."""
    regularization = config.regularization
    weights = None
    if regularization.class_weights == "balanced":
        weights = balanced_weights(data.examples_per_class).to(ctx.device)
    return TrainStep(
        ctx=ctx,
        normalize=Normalize(config.data.preprocessing, ctx.device),
        criterion=Criterion(label_smoothing=regularization.label_smoothing, class_weights=weights),
        mixup=Mixup(
            mixup_alpha=regularization.mixup,
            cutmix_alpha=regularization.cutmix,
            seed=config.run.seed,
            rank=ctx.rank,
            world_size=ctx.world_size,
            gather=ctx.accelerator.gather,
        ),
        l2_sp=l2_sp,
        loss_reduction=config.optim.loss_reduction,
        grad_accum_steps=config.train.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.run.seed,
    )


def make_retention_policy(config: ResolvedConfig, order: EpochOrder) -> RetentionPolicy:
    """Return when checkpoints are saved and which are kept; durations become steps here, at least one."""
    steps = order.steps_per_epoch

    def in_steps(interval: Interval | None) -> int | None:
        if interval is None or interval.training is None:
            return None
        total = steps * config.train.epochs
        return max(1, to_steps(interval.training, steps_per_epoch=steps, total_steps=total))

    def interval(key: str) -> Interval | None:
        text = getattr(config.checkpoint, key)
        return None if text is None else parse_interval(f"checkpoint.{key}", text)

    every = interval("every")
    return RetentionPolicy(
        every_steps=in_steps(every),
        every_seconds=every.seconds if every else None,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        keep_every=in_steps(interval("keep_every")),
    )


def make_early_stopping(config: ResolvedConfig, data: RunData) -> EarlyStopping:
    """Return the rule that ends a run early; by default it never does."""
    return EarlyStopping(split=data.index.val_split, patience=config.regularization.early_stopping)


def make_run_metadata(config: ResolvedConfig, data: RunData, run: OpenRun) -> RunMetadata:
    """Return what every checkpoint of this start says about the run."""
    ctx, order = run.ctx, data.order
    return RunMetadata(
        identity=RunIdentity(
            architecture=config.model.name,
            classes=data.index.classes,
            examples=data.examples_per_class,
            data=data.prepared.fingerprint,
        ),
        seed=config.run.seed,
        steps_per_epoch=order.steps_per_epoch,
        schedule={
            "kind": config.optim.schedule,
            "warmup_steps": _warmup_steps(config, order),
            "total_steps": order.steps_per_epoch * config.train.epochs,
        },
        auto_resolved={"precision": ctx.precision, "channels_last": config.train.channels_last},
        world_size=ctx.world_size,
        threads=ctx.threads,
        attempt=run.attempt,
        versions=versions(),
    )

"""From a config to what is saved: when checkpoints are written, which are kept, and what they say about the run."""

from dataclasses import replace

from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.manager import CheckpointManager, MetricsLog
from trainer.checkpoint.resume import ResumePoint
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import RunIdentity, RunMetadata
from trainer.config.dump import dump
from trainer.config.resolve import ResolvedConfig
from trainer.config.run_data import RunData
from trainer.model.built import BuiltModel
from trainer.model.metadata import ModelMetadata
from trainer.optim.schedule import Interval, parse_interval, to_steps, warmup_steps
from trainer.run.session import OpenRun
from trainer.run.versions import own_version, versions
from trainer.state import TrainState


def make_retention_policy(config: ResolvedConfig, steps_per_epoch: int) -> RetentionPolicy:
    """Return when checkpoints are saved and which are kept; durations become steps here, at least one."""

    def interval(key: str) -> Interval | None:
        text = getattr(config.checkpoint, key)
        return None if text is None else parse_interval(f"checkpoint.{key}", text)

    def in_steps(interval: Interval | None) -> int | None:
        if interval is None or interval.training is None:
            return None
        total = steps_per_epoch * config.train.epochs
        return max(1, to_steps(interval.training, steps_per_epoch=steps_per_epoch, total_steps=total))

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
    return EarlyStopping(
        split=data.index.val_split, patience=config.regularization.early_stopping, select_by=config.checkpoint.select_by
    )


def make_run_metadata(config: ResolvedConfig, data: RunData, run: OpenRun) -> RunMetadata:
    """Return what every checkpoint of this start says about the run."""
    steps = data.order.steps_per_epoch
    total = steps * config.train.epochs
    return RunMetadata(
        identity=RunIdentity(
            architecture=config.model.name,
            classes=data.index.classes,
            examples=data.examples_per_class,
            data=data.prepared.fingerprint,
        ),
        seed=config.run.seed,
        steps_per_epoch=steps,
        schedule={
            "kind": config.optim.schedule,
            "warmup_steps": warmup_steps(config.optim.warmup, steps_per_epoch=steps, total_steps=total),
            "total_steps": total,
        },
        auto_resolved={"precision": run.ctx.precision, "channels_last": config.train.uses_channels_last},
        world_size=run.ctx.world_size,
        threads=run.ctx.threads,
        attempt=run.attempt,
        versions=versions(),
    )


def find_resume_point(config: ResolvedConfig, data: RunData, run: OpenRun) -> ResumePoint:
    """Return the newest checkpoint of the run, if there is one. Every process must call it.

    Raises:
        UserError: see `ResumePoint`.

    """
    return ResumePoint(
        run,
        data.schedule,
        metadata=make_run_metadata(config, data, run),
        early_stopping=make_early_stopping(config, data),
        config=dump(replace(config, run=replace(config.run, resume="auto"))),
        order_digest=data.order.digest,
    )


def make_checkpoint_manager(
    config: ResolvedConfig,
    data: RunData,
    run: OpenRun,
    state: TrainState,
    *,
    model_metadata: ModelMetadata,
    logger: MetricsLog,
) -> CheckpointManager:
    """Return what saves and stops the run, from the state's position on."""
    retention = make_retention_policy(config, data.schedule.steps_per_epoch)
    early_stopping = make_early_stopping(config, data)
    saver = CheckpointSaver(
        run,
        retention=retention,
        metadata=make_run_metadata(config, data, run),
        model_metadata=model_metadata,
        selected_on=early_stopping.selected_on,
        order_digest=data.order.digest,
    )
    return CheckpointManager(
        run, state, data.schedule, saver=saver, retention=retention, early_stopping=early_stopping, logger=logger
    )


def make_model_metadata(config: ResolvedConfig, data: RunData, run: OpenRun, built: BuiltModel) -> ModelMetadata:
    """Return the header of the model file; its metrics are filled in when it is written."""
    return ModelMetadata(
        version=own_version(),
        architecture=config.model.name,
        classes=data.index.classes,
        preprocessing=config.data.preprocessing,
        source=built.source,
        metrics={},
        execution=run.ctx.execution(channels_last=config.train.uses_channels_last),
    )

"""From a config to what is saved: when checkpoints are written, which are kept, and what they say about the run."""

from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import RunIdentity, RunMetadata
from trainer.config.build_data import RunData
from trainer.config.resolve import ResolvedConfig
from trainer.model.create import BuiltModel
from trainer.model.file import ModelMetadata
from trainer.optim.schedule import Interval, parse_interval, to_steps, warmup_steps
from trainer.run.session import OpenRun
from trainer.run.versions import own_version, versions


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
    return EarlyStopping(split=data.index.val_split, patience=config.regularization.early_stopping)


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
        auto_resolved={"precision": run.ctx.precision, "channels_last": config.train.channels_last},
        world_size=run.ctx.world_size,
        threads=run.ctx.threads,
        attempt=run.attempt,
        versions=versions(),
    )


def make_model_metadata(config: ResolvedConfig, data: RunData, built: BuiltModel) -> ModelMetadata:
    """Return the header of the model file; its metrics are filled in when it is written."""
    return ModelMetadata(
        version=own_version(),
        architecture=config.model.name,
        classes=data.index.classes,
        preprocessing=config.data.preprocessing,
        source=built.source,
        metrics={},
    )

"""What can be said of a run before any of its long work: an error that comes here costs nobody an hour, or a queue."""

from dataclasses import replace

from trainer.config.builders import make_epoch_order, make_schedule
from trainer.config.model_builder import make_model, make_param_groups
from trainer.config.schema import BaselineConfig, Config
from trainer.data.index import DatasetIndex
from trainer.data.loader import EpochOrder
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.source_classes import check_targets
from trainer.text import escape_unprintable
from trainer.transfer.linear_probe import require_linear


def preflight(config: Config, index: DatasetIndex, ctx: DistributedContext | None = None) -> None:
    """Raise a UserError for what the run would end with before its first step, whatever its source model will be.

    Args:
        config: the whole of it, resolved.
        index: the images to fine-tune on.
        machine: what the run runs on; None: it will run elsewhere, and what depends on that is left.

    """
    order = make_epoch_order(config, index)
    if ctx is not None:
        require_sync_batch_norm(config, order, ctx)
    require_val_split(config, index)
    make_schedule(config, order)
    if config.model.head_init == "source-labels":
        check_targets(config.model.aliases, index.classes)
    created = make_model(without_weights(config), index.classes, None, on_progress=lambda _: None)
    if config.model.head_init == "linear-probe":
        require_linear(created.model, created.heads[0], config.data.image_size)  # type: ignore[arg-type]
    make_param_groups(created, config)


def without_weights(config: Config) -> Config:
    """Return a config whose model is of the same design, with drawn weights: nothing has to be fetched for it."""
    return replace(
        config,
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=replace(config.transfer, l2_sp=0.0, wise_ft=False),
        baseline=BaselineConfig(),
    )


def require_sync_batch_norm(config: Config, order: EpochOrder, ctx: DistributedContext) -> None:
    """Raise a UserError where BatchNorm cannot use the statistics of the global batch, though it is to.

    torch's SyncBatchNorm refuses CPU tensors, and takes part in every forward of every process: none may have an
    empty share, nor go through its share in another number of parts.
    """
    if config.transfer.batch_norm != "sync":
        return
    asked = "transfer.batch_norm is sync"
    if config.train.grad_accum_steps > 1:
        raise UserError(
            f"{asked}, but train.grad_accum_steps {config.train.grad_accum_steps} shows the layers one part of "
            "the batch at a "
            "time: set it to 1, or batch_norm to frozen"
        )
    if ctx.world_size == 1:
        return  # its share is the global batch
    if ctx.accelerator.device.type != "cuda":
        raise UserError(
            f"{asked}, which needs GPUs: torch has no such layer for CPUs. Choose frozen, which is equal on any number "
            "of processes, or run one process"
        )
    if min(order.batch_sizes) < ctx.world_size:
        raise UserError(
            f"{asked}, but the last of {order.examples} examples make a batch of {min(order.batch_sizes)}, fewer than "
            f"the {ctx.world_size} processes: choose another train.batch_size"
        )


def require_val_split(config: Config, index: DatasetIndex) -> None:
    """Raise a UserError where something is to be selected, and there are no images to select on."""
    asked = {
        f"regularization.early_stopping {config.regularization.early_stopping}": config.regularization.early_stopping,
        "transfer.wise_ft": config.transfer.wise_ft,
    }
    wanted = [option for option, value in asked.items() if value]
    if wanted and index.val_split is None:
        raise UserError(
            f"{' and '.join(wanted)} choose{'s' * (len(wanted) == 1)} by an accuracy, and "
            f"{escape_unprintable(str(index.root))} "
            "has no images to select on beside those reported, which must not be what was selected on: set "
            "data.val_fraction 0.1, which cuts them out of the training images"
        )

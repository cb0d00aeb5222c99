"""Checks before the long work: what can be known to fail is reported before images are decoded or a job is queued."""

from trainer.config.build_data import RunData, make_schedule
from trainer.config.build_model import make_model, make_param_groups
from trainer.config.resolve import ResolvedConfig, without_weights
from trainer.data.index import DatasetIndex
from trainer.data.sampler import EpochOrder
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.source_classes import check_targets
from trainer.text import escape_unprintable
from trainer.transfer.linear_probe import require_linear


def preflight(config: ResolvedConfig, data: RunData, ctx: DistributedContext | None = None) -> None:
    """Raise a UserError for what the run would fail with before its first step, whatever its pretrained weights are.

    Args:
        config: the run's.
        data: the images to fine-tune on.
        ctx: the processes; None if the run will start elsewhere, which leaves out what depends on them.

    """
    check_run_data(config, data, ctx)
    make_schedule(config, data.order)
    index = data.index
    if config.model.head_init == "source-labels":
        check_targets(config.model.aliases, index.classes)
    built = make_model(without_weights(config), index.classes, None, on_progress=lambda _: None)
    if config.model.head_init == "linear-probe":
        require_linear(built.model, built.heads[0], config.data.image_size)
    make_param_groups(built, config)


def check_run_data(config: ResolvedConfig, data: RunData, ctx: DistributedContext | None) -> None:
    """Raise a UserError for options that these examples, or this number of processes, do not allow."""
    if ctx is not None:
        _check_sync_batch_norm(config, data.order, ctx)
    _check_val_split(config, data.index)


def _check_sync_batch_norm(config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext) -> None:
    """Raise a UserError if transfer.batch_norm is sync where it cannot work.

    torch's SyncBatchNorm refuses CPU tensors, and takes part in every forward of every process: no local batch may be
    empty, or be split into another number of micro-batches.
    """
    if config.transfer.batch_norm != "sync":
        return
    option = "transfer.batch_norm is sync"
    if config.train.grad_accum_steps > 1:
        raise UserError(
            f"{option}, but train.grad_accum_steps {config.train.grad_accum_steps} shows the layers one part of the "
            "batch at a time: set it to 1, or batch_norm to frozen"
        )
    if ctx.world_size == 1:
        return  # the local batch is the global batch
    if ctx.device.type != "cuda":
        raise UserError(
            f"{option}, which needs GPUs: torch has no such layer for CPUs. Choose frozen, which gives equal results "
            "on any number of processes, or run one process"
        )
    if min(order.batch_sizes) < ctx.world_size:
        raise UserError(
            f"{option}, but the last of {order.examples} examples make a batch of {min(order.batch_sizes)}, fewer than "
            f"the {ctx.world_size} processes: choose another train.batch_size"
        )


def _check_val_split(config: ResolvedConfig, index: DatasetIndex) -> None:
    """Raise a UserError for options that select by accuracy, if there is no split to select on."""
    options = {
        f"regularization.early_stopping {config.regularization.early_stopping}": config.regularization.early_stopping,
        "transfer.wise_ft": config.transfer.wise_ft,
    }
    on = [option for option, value in options.items() if value]
    if on and index.val_split is None:
        raise UserError(
            f"{' and '.join(on)} select{'s' * (len(on) == 1)} by an accuracy, and "
            f"{escape_unprintable(str(index.root))} has no images to select on besides those reported, which must "
            "not be selected on: set data.val_fraction 0.1, which takes some of the training images for that"
        )

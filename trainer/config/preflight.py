"""Checks before the long work: report errors before images are decoded or a job is queued."""

from pathlib import Path

from trainer.config.build_loaders import eval_batch_size, num_loader_workers
from trainer.config.build_model import make_model, make_param_groups
from trainer.config.dump import dump
from trainer.config.resolve import ResolvedConfig, without_weights
from trainer.config.run_data import RunData, make_schedule
from trainer.data.index import DatasetIndex
from trainer.data.sampler import EpochOrder
from trainer.data.workers import check_shared_memory
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.source_classes import check_targets
from trainer.run.folder import check_resumable
from trainer.text import escape_unprintable
from trainer.transfer.linear_probe import require_linear


def check_run_folder(config: ResolvedConfig) -> None:
    """Raise a UserError if the run folder contains a run with other options, before any long work."""
    check_resumable(Path(config.run.dir), dump(config), resume=config.run.resume)


def preflight(config: ResolvedConfig, data: RunData, ctx: DistributedContext | None = None) -> None:
    """Raise a UserError for an error that would end the run before its first step. Pretrained weights are not read.

    Args:
        config: config of the run.
        data: examples of the fine-tuning phase.
        ctx: the processes; None if the run starts elsewhere, which skips the checks that depend on them.

    """
    check_run_data(config, data, ctx)
    make_schedule(config, data.order)  # `regraft compare` takes the data of another strategy
    index = data.index
    if config.model.head_init == "source-labels":
        check_targets(config.model.aliases, index.classes)
    built = make_model(without_weights(config), index.classes, None, on_progress=lambda _: None)
    if config.model.head_init == "linear-probe":
        require_linear(built.model, built.heads[0], config.data.image_size)
    make_param_groups(built, config)


def check_run_data(config: ResolvedConfig, data: RunData, ctx: DistributedContext | None) -> None:
    """Raise a UserError for options that do not fit the examples, the device or the number of processes."""
    if ctx is not None:
        _check_image_cache(config, ctx)
        _check_sync_batch_norm(config, data.order, ctx)
        _check_loader_memory(config, data.order, ctx)
    _check_val_split(config, data.index)


def _check_image_cache(config: ResolvedConfig, ctx: DistributedContext) -> None:
    if config.data.cache_images == "device" and ctx.device.type == "cpu":
        raise UserError(
            "data.cache_images is device, but the run trains on the CPU, which crops images one by one faster than in "
            "batches: set it to auto or ram"
        )


def _check_sync_batch_norm(config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext) -> None:
    """Raise a UserError if transfer.batch_norm is sync and SyncBatchNorm cannot work.

    PyTorch's SyncBatchNorm does not support CPU tensors. Its collectives need the same number of forward passes on
    every process, so no local batch may be empty.
    """
    if config.transfer.batch_norm != "sync":
        return
    option = "transfer.batch_norm is sync"
    if config.train.grad_accum_steps > 1:
        raise UserError(
            f"{option}, but train.grad_accum_steps {config.train.grad_accum_steps} splits the batch, so that the "
            "layers do not see all of it at once: set it to 1, or batch_norm to frozen"
        )
    if config.train.micro_batch_size is not None:
        raise UserError(
            f"{option}, but train.micro_batch_size {config.train.micro_batch_size} may split the batch, so that the "
            "layers do not see all of it at once: set it to null, or batch_norm to frozen"
        )
    if ctx.world_size == 1:
        return  # the local batch is the global batch
    if ctx.device.type != "cuda":
        raise UserError(
            f"{option}, which needs GPUs: PyTorch has no SyncBatchNorm for CPUs. Choose frozen, which gives equal "
            "results on any number of processes, or run one process"
        )
    if min(order.batch_sizes) < ctx.world_size:
        raise UserError(
            f"{option}, but {order.examples} examples leave a batch of {min(order.batch_sizes)}, fewer than "
            f"the {ctx.world_size} processes: choose another train.batch_size"
        )


def _check_loader_memory(config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext) -> None:
    """Check that the batches of the loaders fit into shared memory. Every process must call it.

    Raises:
        UserError: see `check_shared_memory`.

    """
    if config.data.cache_images == "device":
        return
    images = -(-max(order.batch_sizes) // ctx.world_size) + eval_batch_size(config, ctx)
    error = None
    try:
        check_shared_memory(
            num_workers=num_loader_workers(config.data.num_workers, ctx),
            processes=ctx.local_world_size,
            batch_bytes=images * 3 * config.data.image_size**2,
        )
    except UserError as caught:
        error = caught
    ctx.raise_on_all_ranks(error)


def _check_val_split(config: ResolvedConfig, index: DatasetIndex) -> None:
    """Raise a UserError for options that need a validation split, if there is none."""
    options = {
        f"regularization.early_stopping {config.regularization.early_stopping}": config.regularization.early_stopping,
        "transfer.wise_ft": config.transfer.wise_ft,
    }
    on = [option for option, value in options.items() if value]
    if on and index.val_split is None:
        raise UserError(
            f"{' and '.join(on)} need{'s' * (len(on) == 1)} a validation split, which "
            f"{escape_unprintable(str(index.root))} does not have: set data.val_fraction 0.1 to hold out some of the "
            "training images"
        )

"""From a config to what trains in each stage, and on what: images, or features of frozen layers."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer.config.build_loaders import (
    Evaluator,
    eval_batch_size,
    make_batches,
    make_dataset,
    make_eval_loader,
    make_loader,
    make_train_sampler,
    make_train_transform,
)
from trainer.config.resolve import ResolvedConfig
from trainer.config.run_data import RunData
from trainer.data.augment import Normalize
from trainer.data.dataset import Batch, ImageDataset
from trainer.data.loader import TrainBatches
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.distributed.context import DistributedContext
from trainer.model.built import UnfreezeStage
from trainer.run.audit import with_audit
from trainer.run.session import OpenRun
from trainer.transfer.eval_features import EvalFeatures
from trainer.transfer.feature_store import FrozenLayers
from trainer.transfer.frozen_features import FixedViews, FrozenFeatures, NoFeatures, StageFeatures


def make_frozen_layers(config: ResolvedConfig, ctx: DistributedContext, console: Console) -> FrozenLayers:
    """Return what computes the features of frozen layers."""
    size = config.data.image_size
    blank = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=ctx.device).permute(0, 3, 1, 2)
    return FrozenLayers(
        ctx=ctx,
        normalize=Normalize(config.data.preprocessing, ctx.device),
        blank=blank if config.train.uses_channels_last else blank.contiguous(),
        # Micro-batches that were made as large as possible leave a margin of 5 % on a GPU.
        memory_share=0.05 if config.train.micro_batch_size == "auto" else 0.3,
        log=console.print,
    )


def make_stage_features(config: ResolvedConfig, data: RunData, model: nn.Module, layers: FrozenLayers) -> StageFeatures:
    """Return what trains in each stage. It is the whole model if training images are not the same in every epoch.

    Args:
        config: the run's.
        data: the images.
        model: unwrapped, on its device.
        layers: computes the features.

    """
    views = config.data.views if config.data.has_random_transform else 1
    mixes = config.regularization.mixup > 0 or config.regularization.cutmix > 0
    if config.train.cache_features == "off" or views is None or mixes:
        return NoFeatures(model, layers.normalize)
    ctx, examples = layers.ctx, len(data.index.train)
    dataset = make_dataset(data.index.train, make_train_transform(config.data), config, ctx, data.images)
    batch_size = eval_batch_size(config, ctx)

    def batches(view: int) -> Iterator[Batch]:
        sampler = EvalBatchSampler(examples, batch_size=batch_size, rank=ctx.rank, world_size=ctx.world_size, view=view)
        return iter(make_loader(dataset, sampler, config, ctx))

    train = FixedViews(
        views=views,
        images=examples,
        batches=batches,
        num_batches=-(-examples // (ctx.world_size * batch_size)),
        batch_size=batch_size,
        epochs=config.train.epochs,
    )
    return FrozenFeatures(model, layers, train)


def make_evaluator(config: ResolvedConfig, data: RunData, layers: FrozenLayers, model: nn.Module | None) -> Evaluator:
    """Return the evaluation of each split; with a model, it keeps features of the model's frozen layers."""
    features = None
    if model is not None and config.train.cache_features != "off":
        world_size = layers.ctx.world_size
        num_images = sum(-(-len(examples) // world_size) for examples in data.index.eval_splits.values())
        features = EvalFeatures(model, layers, num_images=num_images)
    return Evaluator(data.index, config, layers.ctx, data.images, features=features)


def make_probe_loader(config: ResolvedConfig, data: RunData, ctx: DistributedContext) -> Iterable[Batch]:
    """Return this process's batches of one pass over the training images, as they are evaluated."""
    return make_eval_loader(data.index.train, config, ctx, data.images)


def make_train_batches(
    config: ResolvedConfig,
    data: RunData,
    run: OpenRun,
    stages: Sequence[UnfreezeStage],
    features: StageFeatures,
    *,
    start_step: int,
) -> TrainBatches:
    """Return the local batches from `start_step` to the end of the run, recorded in `audit/` if run.audit is on.

    They hold images, or in stages that train on features, these; no image is decoded then.
    """
    ctx, index, order, schedule = run.ctx, data.index, data.order, data.schedule
    if isinstance(features, NoFeatures):
        batches = make_batches(
            config, index, order, ctx, epochs=schedule.epochs, start_step=start_step, images=data.images
        )
    else:
        dataset = make_dataset(index.train, make_train_transform(config.data), config, ctx, data.images)
        batches = TrainBatches(_by_stage(config, dataset, order, ctx, stages, features, start_step), dataset, order)
    if not config.run.audit:
        return batches
    record = partial(
        with_audit,
        folder=run.folder,
        start_step=start_step,
        steps_per_epoch=schedule.steps_per_epoch,
        rank=ctx.rank,
        world_size=ctx.world_size,
        attempt=run.attempt,
        lr_multiplier=schedule.lr_multiplier,
    )
    return batches.through(record)


def _by_stage(  # noqa: PLR0917 (each is another object)
    config: ResolvedConfig,
    dataset: ImageDataset,
    order: EpochOrder,
    ctx: DistributedContext,
    stages: Sequence[UnfreezeStage],
    features: StageFeatures,
    start_step: int,
) -> Iterator[Batch]:
    """Yield the batches of each stage. The loop starts a stage before it asks for the stage's first batch."""
    labels = torch.from_numpy(dataset.labels).to(ctx.device)
    step, epochs = start_step, config.train.epochs
    for end in (*(stage.start_epoch for stage in stages[1:]), epochs):
        end_epoch = min(end, epochs)
        if step >= end_epoch * order.steps_per_epoch:
            continue  # the run resumes in a later stage
        sampler = make_train_sampler(config, order, ctx, epochs=end_epoch, start_step=step)
        if features.is_active:
            yield from _feature_batches(sampler, labels, features)
        else:
            yield from make_loader(dataset, sampler, config, ctx)
        step = end_epoch * order.steps_per_epoch


def _feature_batches(sampler: DistributedBatchSampler, labels: Tensor, features: StageFeatures) -> Iterator[Batch]:
    """Yield the features of the samples, on the device."""
    for step, samples in enumerate(sampler, start=sampler.start_step):
        local = torch.tensor([sample.example for sample in samples], dtype=torch.int64)
        examples = local.to(labels.device, non_blocking=True)  # features may be in RAM: indices there need no transfer
        epoch = step // sampler.order.steps_per_epoch
        yield Batch(features.lookup(epoch, local), labels[examples], examples)

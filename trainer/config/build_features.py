"""From a config to what trains in each stage, and on what: images, or features of frozen layers."""

from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer.config.build_loaders import (
    eval_batch_size,
    eval_splits,
    make_batches,
    make_dataset,
    make_loader,
    make_train_sampler,
    make_train_transform,
)
from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.data.index import DatasetIndex
from trainer.data.loader import Batch, TrainBatches
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.distributed.context import DistributedContext
from trainer.model.built import UnfreezeStage
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
        blank=blank if config.train.channels_last else blank.contiguous(),
        log=console.print,
    )


def has_fixed_images(config: ResolvedConfig) -> bool:
    """Return whether training images are the same in every epoch, since they are not augmented."""
    return config.data.augment == "none" and not config.data.random_erasing


def make_stage_features(
    config: ResolvedConfig, index: DatasetIndex, model: nn.Module, layers: FrozenLayers
) -> StageFeatures:
    """Return what trains in each stage. It is the whole model if training images are not the same in every epoch.

    Args:
        config: the run's.
        index: the images.
        model: unwrapped, on its device.
        layers: computes the features.

    """
    views = 1 if has_fixed_images(config) else config.data.views
    mixes = config.regularization.mixup > 0 or config.regularization.cutmix > 0
    if config.train.cache_features == "off" or views is None or mixes:
        return NoFeatures(model, layers.normalize)
    ctx, examples = layers.ctx, len(index.train)
    dataset = make_dataset(index.train, make_train_transform(config.data), config, ctx)
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


def make_eval_features(
    config: ResolvedConfig, index: DatasetIndex, model: nn.Module, layers: FrozenLayers
) -> EvalFeatures | None:
    """Return what evaluates on features of frozen layers; None if train.cache_features is off."""
    if config.train.cache_features == "off":
        return None
    num_images = sum(-(-len(examples) // layers.ctx.world_size) for examples in eval_splits(index).values())
    return EvalFeatures(model, layers, num_images=num_images)


def make_stage_batches(  # noqa: PLR0917 (each is another object)
    config: ResolvedConfig,
    index: DatasetIndex,
    order: EpochOrder,
    ctx: DistributedContext,
    stages: Sequence[UnfreezeStage],
    features: StageFeatures,
    *,
    start_step: int,
) -> TrainBatches:
    """Return the local batches from `start_step` to the end of the run: of images, or in some stages of features.

    A stage that trains on features decodes no images.
    """
    epochs = config.train.epochs
    if isinstance(features, NoFeatures):
        return make_batches(config, index, order, ctx, epochs=epochs, start_step=start_step)
    labels = torch.tensor([example.label for example in index.train], device=ctx.device)
    dataset = make_dataset(index.train, make_train_transform(config.data), config, ctx)

    def batches() -> Iterator[Batch]:
        step = start_step
        for end in (*(stage.start_epoch for stage in stages[1:]), epochs):
            end_step = min(end, epochs) * order.steps_per_epoch
            if step < end_step:  # the stage is not over yet; the loop has started it
                sampler = make_train_sampler(config, order, ctx, epochs=min(end, epochs), start_step=step)
                is_active = features.is_active
                yield from (
                    _feature_batches(sampler, labels, features)
                    if is_active
                    else make_loader(dataset, sampler, config, ctx)
                )
                step = end_step

    return TrainBatches(batches(), dataset, order)


def _feature_batches(sampler: DistributedBatchSampler, labels: Tensor, features: StageFeatures) -> Iterator[Batch]:
    """Yield the features of the samples, on the device."""
    for step, samples in enumerate(sampler, start=sampler.start_step):
        examples = torch.tensor([sample.example for sample in samples], dtype=torch.int64).to(labels.device)
        epoch = step // sampler.order.steps_per_epoch
        yield Batch(features.lookup(epoch, examples), labels[examples], examples)

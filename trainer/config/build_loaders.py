"""From a config to loaders: datasets under a transform, batches of the updates, and the evaluation of each split."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from trainer.config.resolve import ResolvedConfig, ResolvedDataConfig
from trainer.data.augment import EvalTransform, Normalize, ResizeShorter, TrainTransform, Transform
from trainer.data.dataset import Batch, ComparingReader, FileReader, ImageDataset
from trainer.data.device_loader import make_device_loader
from trainer.data.image_cache.cached import NOT_CACHED, CachedImages, TransformedReader, unchanged
from trainer.data.index import DatasetIndex, Example, Examples
from trainer.data.loader import TrainBatches, make_dataloader
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations, Record, choose_eval_batch_size, evaluate
from trainer.evaluation.gather import PredictionGatherer
from trainer.transfer.eval_features import EvalFeatures, EvalInputs


def make_train_transform(data: ResolvedDataConfig) -> Transform:
    """Return the transform of a training image."""
    if not data.has_random_transform:
        return EvalTransform(data.preprocessing)
    return TrainTransform(data.preprocessing, data.augment, data.crop_scale, random_erasing=data.random_erasing)


def make_dataset(
    examples: Sequence[Example],
    transform: Transform,
    config: ResolvedConfig,
    ctx: DistributedContext,
    images: CachedImages = NOT_CACHED,
) -> ImageDataset:
    """Return the images of a split under a transform."""
    paths, size = Examples.of(examples).paths, config.data.cache_resize
    decode = FileReader(paths)
    if isinstance(transform, EvalTransform):
        originals = images.reader(paths, decode) if size is None else decode
        reader, transform = images.output_reader(paths, originals, transform), unchanged
    else:
        reader = images.reader(paths, decode if size is None else TransformedReader(decode, ResizeShorter(size)))
    if (checks := images.deferred_checks(paths)) is not None:
        reader = ComparingReader(reader, paths, checks)
    threads = decoding_threads(config.data.num_workers, ctx)
    return ImageDataset(examples, transform, seed=config.run.seed, threads=threads, reader=reader)


def make_loader(
    dataset: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    config: ResolvedConfig,
    ctx: DistributedContext,
) -> Iterable[Batch]:
    """Return the loader of this process's batches.

    Raises:
        UserError: data.cache_images is device, and the images do not fit into its free memory.

    """
    num_workers = num_loader_workers(config.data.num_workers, ctx)
    if config.data.cache_images == "device":
        return make_device_loader(
            dataset,
            sampler,
            device=ctx.device,
            channels_last=config.train.uses_channels_last,
            num_workers=min(1, num_workers),
            threads=max(num_workers, dataset.threads),
        )
    return make_dataloader(
        dataset,
        sampler,
        image_size=config.data.image_size,
        channels_last=config.train.uses_channels_last,
        num_workers=num_workers,
        accelerator=ctx.accelerator,
    )


def make_eval_loader(
    examples: Sequence[Example], config: ResolvedConfig, ctx: DistributedContext, images: CachedImages = NOT_CACHED
) -> Iterable[Batch]:
    """Return this process's batches of one pass over examples, as they are evaluated."""
    dataset = make_dataset(examples, EvalTransform(config.data.preprocessing), config, ctx, images)
    sampler = EvalBatchSampler(
        len(examples), batch_size=eval_batch_size(config, ctx), rank=ctx.rank, world_size=ctx.world_size
    )
    return make_loader(dataset, sampler, config, ctx)


def make_batches(
    config: ResolvedConfig,
    index: DatasetIndex,
    order: EpochOrder,
    ctx: DistributedContext,
    *,
    epochs: int,
    start_step: int = 0,
    images: CachedImages = NOT_CACHED,
) -> TrainBatches:
    """Return this process's local batches of the updates from `start_step` (counted from 0 over the run) on."""
    dataset = make_dataset(index.train, make_train_transform(config.data), config, ctx, images)
    sampler = make_train_sampler(config, order, ctx, epochs=epochs, start_step=start_step)
    return TrainBatches(iter(make_loader(dataset, sampler, config, ctx)), dataset, order)


def make_train_sampler(
    config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext, *, epochs: int, start_step: int
) -> DistributedBatchSampler:
    """Return the samples of this process's local batches from `start_step` to the end of epoch `epochs`."""
    return DistributedBatchSampler(
        order, epochs=epochs, start_step=start_step, rank=ctx.rank, world_size=ctx.world_size, views=config.data.views
    )


def num_loader_workers(option: int | None, ctx: DistributedContext) -> int:
    """Return how many worker processes decode for this process; `option` is data.num_workers.

    On a CPU they share the cores with training, which is by far the slower of the two: one worker for every four
    cores keeps ahead of it. With fewer than four cores there is none, since it would only compete with training's own
    threads: these decode between two updates instead. A GPU is fed by all cores but the main process's own.
    """
    if option is not None:
        return option
    if ctx.device.type == "cpu":
        return ctx.cores // 4
    return min(16, max(1, ctx.cores - 1))


def decoding_threads(option: int | None, ctx: DistributedContext) -> int:
    """Return how many images this process decodes at once; a worker process decodes one."""
    return 1 if num_loader_workers(option, ctx) else ctx.threads


def eval_batch_size(config: ResolvedConfig, ctx: DistributedContext) -> int:
    """Return how many images a process evaluates at once.

    On a GPU as many as it trains on, and with train.micro_batch_size auto, which is found later, at most 128.
    """
    train = config.train
    local = -(-train.batch_size // (ctx.world_size * train.grad_accum_steps))
    limit = 128 if train.micro_batch_size == "auto" else train.micro_batch_size
    largest = local if limit is None else min(local, limit)
    return choose_eval_batch_size(ctx.device, threads=ctx.threads, largest=largest)


class Evaluator:
    """Evaluates the splits of a data set. Its worker processes stay alive between epochs."""

    def __init__(
        self,
        index: DatasetIndex,
        config: ResolvedConfig,
        ctx: DistributedContext,
        images: CachedImages = NOT_CACHED,
        *,
        features: EvalFeatures | None = None,
    ) -> None:
        """Make the loaders. With `features`, what frozen layers compute from an image is computed once."""
        self._ctx, self._features = ctx, features
        self._classes = len(index.classes)
        self._normalize = Normalize(config.data.preprocessing, ctx.device)
        self._batch_size = eval_batch_size(config, ctx)
        self._splits = {
            name: (len(examples), make_eval_loader(examples, config, ctx, images))
            for name, examples in index.eval_splits.items()
        }

    def __call__(
        self,
        model: nn.Module,
        interrupted: Callable[[], bool],
        splits: Iterable[str] | None = None,
        record: Mapping[str, Record] | None = None,
    ) -> Evaluations:
        """Return the evaluation of each split over all processes. Every process must call it.

        Args:
            model: unwrapped.
            interrupted: asked between batches, by all processes together, whether to stop.
            splits: those to evaluate; None: all.
            record: split -> receiver of its logits.

        Raises:
            Interrupted: `interrupted` returned True.

        """
        accelerator = self._ctx.accelerator
        evaluations: Evaluations = {}
        for name, (expected, images) in self._splits.items():
            if splits is not None and name not in splits:
                continue
            evaluated, batches, normalize = self._inputs(model, name, images)
            evaluations[name] = evaluate(
                evaluated,
                batches,
                classes=self._classes,
                expected=expected,
                normalize=normalize,
                reduce=partial(accelerator.reduce, reduction="sum"),
                device=accelerator.device,
                num_batches=-(-expected // (self._ctx.world_size * self._batch_size)),
                interrupted=interrupted,
                record=None if record is None else record[name],
            )
        return evaluations

    @property
    def num_logits(self) -> int:
        """Return the number of logits of all splits."""
        return self._classes * sum(examples for examples, _ in self._splits.values())

    def make_gatherers(self) -> dict[str, PredictionGatherer]:
        """Return what gathers the logits of each split on rank 0, as the argument `record`."""
        return {
            name: PredictionGatherer(self._ctx, examples=examples, classes=self._classes, batch_size=self._batch_size)
            for name, (examples, _) in self._splits.items()
        }

    def _inputs(self, model: nn.Module, name: str, images: Iterable[Batch]) -> EvalInputs:
        """Return what evaluates a split: a model, batches of its inputs, and their normalization."""
        if self._features is None:
            return model, images, self._normalize
        count = len(range(self._ctx.rank, self._splits[name][0], self._ctx.world_size))
        return self._features.inputs(model, name, images, count)

    def evaluate_initial(self, model: nn.Module, heartbeat: Heartbeat) -> Evaluations:
        """Return the evaluation of each split before the first step. A signal ends the run here: nothing is lost.

        Raises:
            UserError: the model's output is not finite.

        """

        def interrupted() -> bool:
            heartbeat.tick(0)
            return False

        evaluations = self(model, interrupted)
        if not all(math.isfinite(evaluation.loss_sum) for evaluation in evaluations.values()):
            raise UserError(
                "the loss of the model before the first step is not finite: see model.weights, data.mean and data.std, "
                "or try train.precision fp32"
            )
        return evaluations

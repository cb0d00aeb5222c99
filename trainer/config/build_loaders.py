"""From a config to loaders: datasets under a transform, batches of the updates, and the evaluation of each split."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import nn
from torch.utils.data import DataLoader

from trainer.config.resolve import ResolvedConfig, ResolvedDataConfig
from trainer.data.augment import Normalize, Transform, eval_transform, train_transform
from trainer.data.dataset import ImageDataset
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import Batch, TrainBatches, make_dataloader
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.data.workers import check_shared_memory
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations, evaluate
from trainer.optim.schedule import TrainSchedule
from trainer.run.audit import with_audit
from trainer.run.session import OpenRun
from trainer.transfer.eval_features import EvalFeatures, EvalInputs


def make_train_transform(data: ResolvedDataConfig) -> Transform:
    """Return the random transform of a training image."""
    return train_transform(data.preprocessing, data.augment, data.crop_scale, random_erasing=data.random_erasing)


def make_dataset(
    examples: Sequence[Example], transform: Transform, config: ResolvedConfig, ctx: DistributedContext
) -> ImageDataset:
    """Return the images of a split under a transform."""
    threads = decoding_threads(config.data.num_workers, ctx)
    return ImageDataset(examples, transform, seed=config.run.seed, threads=threads)


def make_loader(
    dataset: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    config: ResolvedConfig,
    ctx: DistributedContext,
) -> DataLoader[Batch]:
    """Return the loader of this process's batches."""
    return make_dataloader(
        dataset,
        sampler,
        image_size=config.data.image_size,
        channels_last=config.train.channels_last,
        num_workers=num_loader_workers(config.data.num_workers, ctx),
        accelerator=ctx.accelerator,
    )


def make_eval_loader(examples: Sequence[Example], config: ResolvedConfig, ctx: DistributedContext) -> DataLoader[Batch]:
    """Return this process's batches of one pass over examples, as they are evaluated."""
    dataset = make_dataset(examples, eval_transform(config.data.preprocessing), config, ctx)
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
) -> TrainBatches:
    """Return this process's local batches of the updates from `start_step` (counted from 0 over the run) on."""
    dataset = make_dataset(index.train, make_train_transform(config.data), config, ctx)
    sampler = make_train_sampler(config, order, ctx, epochs=epochs, start_step=start_step)
    return TrainBatches(iter(make_loader(dataset, sampler, config, ctx)), dataset, order)


def make_train_sampler(
    config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext, *, epochs: int, start_step: int
) -> DistributedBatchSampler:
    """Return the samples of this process's local batches from `start_step` to the end of epoch `epochs`."""
    return DistributedBatchSampler(
        order, epochs=epochs, start_step=start_step, rank=ctx.rank, world_size=ctx.world_size, views=config.data.views
    )


def with_records(
    batches: TrainBatches, config: ResolvedConfig, run: OpenRun, schedule: TrainSchedule, *, start_step: int
) -> TrainBatches:
    """Return the local batches from `start_step` on, recorded in `audit/` if run.audit is on."""
    if not config.run.audit:
        return batches
    record = partial(
        with_audit,
        folder=run.folder,
        start_step=start_step,
        steps_per_epoch=schedule.steps_per_epoch,
        rank=run.ctx.rank,
        world_size=run.ctx.world_size,
        attempt=run.attempt,
        lr_multiplier=schedule.lr_multiplier,
    )
    return batches.through(record)


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

    On a CPU a few per thread, so that activations stay in its caches (SqueezeNet at 224 px on two threads: batches of
    8 take 0.6 of the time of batches of 128). On a GPU as many as it trains on.
    """
    if ctx.device.type == "cpu":
        return max(8, 4 * ctx.threads)
    local = -(-config.train.batch_size // (ctx.world_size * config.train.grad_accum_steps))
    return max(8, local)


def check_loader_memory(config: ResolvedConfig, order: EpochOrder, ctx: DistributedContext) -> None:
    """Check that the batches of the loaders fit into shared memory. Every process must call it.

    Raises:
        UserError: see `check_shared_memory`.

    """
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


def eval_splits(index: DatasetIndex) -> dict[str, tuple[Example, ...]]:
    """Return the splits that are evaluated: `test` is reported, `val` (if there is one) selects the best epoch."""
    return {"val": index.val, "test": index.test} if index.val else {"test": index.test}


class Evaluator:
    """Evaluates the splits of a data set. Its worker processes stay alive between epochs."""

    def __init__(
        self, index: DatasetIndex, config: ResolvedConfig, ctx: DistributedContext, features: EvalFeatures | None = None
    ) -> None:
        """Make the loaders. With `features`, what frozen layers compute from an image is computed once."""
        self._ctx, self._features = ctx, features
        self._classes = len(index.classes)
        self._normalize = Normalize(config.data.preprocessing, ctx.device)
        self._batch_size = eval_batch_size(config, ctx)
        self._splits = {
            name: (len(examples), make_eval_loader(examples, config, ctx))
            for name, examples in eval_splits(index).items()
        }

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], splits: Iterable[str] | None = None
    ) -> Evaluations:
        """Return the evaluation of each split over all processes. Every process must call it.

        Args:
            model: unwrapped.
            interrupted: asked between batches, by all processes together, whether to stop.
            splits: those to evaluate; None: all.

        Raises:
            Interrupted: `interrupted` returned True.

        """
        accelerator = self._ctx.accelerator
        evaluations: Evaluations = {}
        for name in self._splits if splits is None else splits:
            expected, images = self._splits[name]
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
            )
        return evaluations

    def _inputs(self, model: nn.Module, name: str, images: DataLoader[Batch]) -> EvalInputs:
        """Return what evaluates a split: a model, batches of its inputs, and their normalization."""
        if self._features is None:
            return model, images, self._normalize
        return self._features.inputs(model, name, images)

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

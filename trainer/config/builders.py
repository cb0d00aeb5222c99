"""Sections of the config -> the parts of a run. Only here, and in the verbs, is the whole config known."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint.retention import RetentionPolicy
from trainer.config.schema import Config, DataConfig
from trainer.data.augment import Normalize, Preprocessing, Transform, eval_transform, train_transform
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import (
    Batch,
    DistributedBatchSampler,
    EpochOrder,
    EvalBatchSampler,
    ImageDataset,
    make_dataloader,
)
from trainer.data.prepare import Prepared, ProgressHooks, prepare
from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.loop import Evaluations, ResumePoint, TrainSchedule
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.schedule import Interval, lr_multiplier, parse_duration, parse_interval, to_steps
from trainer.report.console import checking, downloading
from trainer.run.audit import with_audit
from trainer.text import escape_unprintable, join_truncated


def load_dataset(data: DataConfig, ctx: DistributedContext, console: Console) -> Prepared:
    """Return the checked examples; one process of each machine draws, downloads and checks, the others find."""
    displays = displays_on(console)
    return context.main_process_first(
        ctx.accelerator, lambda: prepare(data, workers=ctx.cores, displays=displays), local=True
    )


def displays_on(console: Console) -> ProgressHooks:
    """Return what shows the preparation of the data on this console."""
    return ProgressHooks(downloading=partial(downloading, console), checking=partial(checking, console))


def eval_splits(index: DatasetIndex) -> dict[str, tuple[Example, ...]]:
    """Return name -> examples of what is evaluated: `test` is what is reported, `val` what is selected on."""
    return {"val": index.val, "test": index.test} if index.val else {"test": index.test}


def dataset_summary(prepared: Prepared) -> str:
    """Return what the data is, in a few lines."""
    index = prepared.index
    counts = [f"{len(index.train)} images to train on"]
    if index.val:
        counts.append(f"{len(index.val)} to select the best epoch on")
    counts.append(f"{len(index.test)} to report on ({index.reported})")
    named = join_truncated(index.classes, limit=8)
    head = (
        f"{escape_unprintable(str(index.root))}: {len(index.classes)} classes ({named}); {', '.join(counts)}"
    )
    return "\n".join([head, *prepared.notes])


def make_preprocessing(data: DataConfig) -> Preprocessing:
    """Return the preprocessing of a resolved config."""
    return Preprocessing(
        image_size=data.image_size,  # type: ignore[arg-type]
        resize_size=data.resize_size,  # type: ignore[arg-type]
        resize=data.resize,  # type: ignore[arg-type]
        interpolation=data.interpolation,  # type: ignore[arg-type]
        mean=data.mean,  # type: ignore[arg-type]
        std=data.std,  # type: ignore[arg-type]
    )


def training_transform(data: DataConfig, preprocessing: Preprocessing) -> Transform:
    """Return what becomes of a training picture."""
    return train_transform(preprocessing, data.augment, data.crop_scale, random_erasing=data.random_erasing)


def make_epoch_order(config: Config, index: DatasetIndex) -> EpochOrder:
    """Return the order of the training examples."""
    balances = config.data.sampling == "balanced"
    return EpochOrder(
        examples=len(index.train),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        labels=tuple(example.label for example in index.train) if balances else None,
    )


def make_criterion(config: Config, index: DatasetIndex, device: torch.device) -> Criterion:
    """Return the loss; class weights come from the examples that are trained on."""
    weights = None
    if config.regularization.class_weights == "balanced":
        counts = Counter(example.label for example in index.train)
        weights = balanced_weights([counts[label] for label in range(len(index.classes))]).to(device)
    return Criterion(label_smoothing=config.regularization.label_smoothing, class_weights=weights)


def make_mixup(config: Config, ctx: DistributedContext) -> Mixup | None:
    """Return what mixes the pictures of a batch; None: nothing does."""
    mixup, cutmix = config.regularization.mixup, config.regularization.cutmix
    if not (mixup or cutmix):
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        seed=config.run.seed,
        rank=ctx.rank,
        world_size=ctx.world_size,
        gather=ctx.accelerator.gather,
    )


def training_images(
    index: DatasetIndex, preprocessing: Preprocessing, config: Config, ctx: DistributedContext
) -> ImageDataset:
    """Return the training images under the config's augmentation."""
    transform = training_transform(config.data, preprocessing)
    return ImageDataset(
        index.train, transform, seed=config.run.seed, threads=decoding_threads(config.data.num_workers, ctx)
    )


def make_loader(
    images: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    config: Config,
    ctx: DistributedContext,
) -> DataLoader[Batch]:
    """Return the loader of this process's batches."""
    return make_dataloader(
        images,
        sampler,
        image_size=config.data.image_size,  # type: ignore[arg-type]
        channels_last=config.train.channels_last,
        workers=num_loader_workers(config.data.num_workers, ctx),
        accelerator=ctx.accelerator,
    )


def make_batches(
    images: ImageDataset,
    order: EpochOrder,
    start: ResumePoint,
    plan: TrainSchedule,
    *,
    config: Config,
    ctx: DistributedContext,
    attempt: int,
) -> Iterator[Batch]:
    """Return this process's shares of the updates from `start` to the end of the run, written down where asked."""
    shares = DistributedBatchSampler(
        order, epochs=plan.epochs, start_step=start.step, rank=ctx.rank, world_size=ctx.world_size
    )
    batches: Iterator[Batch] = iter(make_loader(images, shares, config, ctx))
    if not config.run.audit:
        return batches
    return with_audit(
        batches,
        Path(config.run.dir),
        start_step=start.step,
        steps_per_epoch=order.steps_per_epoch,
        rank=ctx.rank,
        world_size=ctx.world_size,
        attempt=attempt,
        lr_multiplier=plan.lr_multiplier,
    )


def num_loader_workers(asked: int | None, ctx: DistributedContext) -> int:
    """Return how many processes decode for this one.

    On a CPU they share the cores with the training, which is by far the slower: one for every four cores is
    ahead of it. With fewer cores than that none is, since it would take turns with the training's own threads;
    these decode instead, between two updates. A GPU is fed by all cores but the trainer's own.
    """
    if asked is not None:
        return asked
    if ctx.accelerator.device.type == "cpu":
        return ctx.cores // 4
    return min(16, max(1, ctx.cores - 1))


def decoding_threads(asked_workers: int | None, ctx: DistributedContext) -> int:
    """Return how many images this process decodes at a time; a worker decodes one."""
    return 1 if num_loader_workers(asked_workers, ctx) else ctx.threads


def eval_batch_size(config: Config, ctx: DistributedContext) -> int:
    """Return how many images a process evaluates at a time.

    On a CPU a few for each thread: what passes from layer to layer then stays in its caches (SqueezeNet at 224 px on
    two threads: 8 at a time take 0.6 of the time of 128). On a GPU as many as it trains on.
    """
    if ctx.accelerator.device.type == "cpu":
        return max(8, 4 * ctx.threads)
    share = -(-config.train.batch_size // (ctx.world_size * config.train.grad_accum_steps))
    return max(8, share)


class Evaluator:
    """Evaluates each part of the data; its workers stay between epochs."""

    def __init__(
        self, index: DatasetIndex, preprocessing: Preprocessing, config: Config, ctx: DistributedContext
    ) -> None:
        self._machine = ctx
        self._classes = len(index.classes)
        self._normalize = Normalize(preprocessing, ctx.accelerator.device)
        self._size = eval_batch_size(config, ctx)
        self._parts: dict[str, tuple[int, Iterable[Batch]]] = {}
        for name, part in eval_splits(index).items():
            images = ImageDataset(
                part,
                eval_transform(preprocessing),
                seed=config.run.seed,
                threads=decoding_threads(config.data.num_workers, ctx),
            )
            slices = EvalBatchSampler(
                len(part), batch_size=self._size, rank=ctx.rank, world_size=ctx.world_size
            )
            self._parts[name] = (len(part), make_loader(images, slices, config, ctx))

    def __call__(
        self, model: nn.Module, interrupted: Callable[[], bool], parts: Iterable[str] | None = None
    ) -> Evaluations:
        """Return part -> evaluation, over all processes, which ask together whether to end before it is done.

        `parts` are those asked for, of those that there are; None: all.

        Raises:
            Interrupted: `interrupted` said so.

        """
        accelerator = self._machine.accelerator
        return {
            name: evaluate(
                model,
                batches,
                classes=self._classes,
                expected=expected,
                normalize=self._normalize,
                reduce=partial(accelerator.reduce, reduction="sum"),
                device=accelerator.device,
                num_batches=-(-expected // (self._machine.world_size * self._size)),
                interrupted=interrupted,
            )
            for name, (expected, batches) in self._parts.items()
            if parts is None or name in parts
        }


def make_schedule(config: Config, order: EpochOrder) -> TrainSchedule:
    """Return the updates of the run; durations become steps here.

    Raises:
        UserError: a warm-up longer than the run.

    """
    total = order.steps_per_epoch * config.train.epochs
    warmup = warmup_steps(config, order)
    if warmup > total:
        raise UserError(
            f"optim.warmup is {config.optim.warmup!r}, {warmup} steps, but the run has {total}: the peak learning rate "
            "would not be reached"
        )
    return TrainSchedule(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        loss_reduction=config.optim.loss_reduction,
        grad_accum_steps=config.train.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.run.seed,
        logs_per_epoch=config.train.logs_per_epoch,
        lr_multiplier=partial(
            lr_multiplier,
            total_steps=total,
            warmup_steps=warmup,
            kind=config.optim.schedule,
        ),
    )


def warmup_steps(config: Config, order: EpochOrder) -> int:
    """Return the length of the warm-up."""
    duration = parse_duration("optim.warmup", config.optim.warmup)
    steps = order.steps_per_epoch
    return to_steps(duration, steps_per_epoch=steps, total_steps=steps * config.train.epochs)


def make_retention_policy(config: Config, order: EpochOrder) -> RetentionPolicy:
    """Return when checkpoints are written and which are kept; durations become steps here, of at least one."""
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


def batch_paths(images: ImageDataset, order: EpochOrder, epoch: int, step: int) -> list[str]:
    """Return the files of a global batch, fit to be shown; epoch and step count from 0."""
    return [escape_unprintable(images.paths[example]) for example in order.batch(epoch, step)]

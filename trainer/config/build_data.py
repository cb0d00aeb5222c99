"""From a config to its data: the examples, the order of the updates, loaders, and the evaluation of each split."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from regraft.contract import SPLIT
from trainer.config.resolve import ResolvedConfig, ResolvedDataConfig
from trainer.data.augment import Normalize, Transform, eval_transform, train_transform
from trainer.data.dataset import ImageDataset
from trainer.data.index import DatasetIndex, Example, write_split
from trainer.data.loader import Batch, TrainBatches, make_dataloader
from trainer.data.prepare import Prepared, ProgressHooks, prepare
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations, evaluate
from trainer.optim.schedule import TrainSchedule
from trainer.report.console import checking, downloading
from trainer.run.audit import with_audit
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun
from trainer.text import escape_unprintable, join_truncated


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The examples of a run, and the order in which it trains on them."""

    prepared: Prepared
    order: EpochOrder

    @property
    def index(self) -> DatasetIndex:
        """Return the examples of each split."""
        return self.prepared.index

    @cached_property
    def examples_per_class(self) -> tuple[int, ...]:
        """Return the number of training examples of each class."""
        counts = Counter(label for _, label in self.index.train)
        return tuple(counts[label] for label in range(len(self.index.classes)))


def load_run_data(config: ResolvedConfig, ctx: DistributedContext, console: Console) -> RunData:
    """Return the checked examples. One process of each machine downloads and checks them; the others find them.

    Every process must call it.

    Raises:
        UserError: see `data.prepare`; or the machines see different images.

    """
    hooks = progress_hooks(console)
    prepared = ctx.main_process_first(
        lambda: prepare(config.data, workers=ctx.cores, displays=hooks), local=True
    )
    console.print(dataset_summary(prepared))
    ctx.check_equal_across_ranks(prepared.fingerprint, "the images")
    return RunData(prepared=prepared, order=make_epoch_order(config, prepared.index))


def progress_hooks(console: Console) -> ProgressHooks:
    """Return progress displays of downloads and checks on this console."""
    return ProgressHooks(downloading=partial(downloading, console), checking=partial(checking, console))


def eval_splits(index: DatasetIndex) -> dict[str, tuple[Example, ...]]:
    """Return the splits that are evaluated: `test` is reported, `val` (if there is one) selects the best epoch."""
    return {"val": index.val, "test": index.test} if index.val else {"test": index.test}


def dataset_summary(prepared: Prepared) -> str:
    """Return a few lines about the data: classes, counts of the splits, and what was skipped."""
    index = prepared.index
    counts = [f"{len(index.train)} images to train on"]
    if index.val:
        counts.append(f"{len(index.val)} to select the best epoch on")
    counts.append(f"{len(index.test)} to report on ({index.reported})")
    names = join_truncated(index.classes, limit=8)
    head = (
        f"{escape_unprintable(str(index.root))}: {len(index.classes)} classes ({names}); {', '.join(counts)}"
    )
    return "\n".join([head, *prepared.notes])


def make_train_transform(data: ResolvedDataConfig) -> Transform:
    """Return the random transform of a training image."""
    return train_transform(
        data.preprocessing, data.augment, data.crop_scale, random_erasing=data.random_erasing
    )


def make_epoch_order(config: ResolvedConfig, index: DatasetIndex) -> EpochOrder:
    """Return the order of the training examples."""
    is_balanced = config.data.sampling == "balanced"
    return EpochOrder(
        examples=len(index.train),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        labels=tuple(example.label for example in index.train) if is_balanced else None,
    )


def make_dataset(
    examples: tuple[Example, ...], transform: Transform, config: ResolvedConfig, ctx: DistributedContext
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


def make_batches(
    config: ResolvedConfig, data: RunData, ctx: DistributedContext, *, epochs: int, start_step: int = 0
) -> TrainBatches:
    """Return this process's local batches of the updates from `start_step` (counted from 0 over the run) on."""
    dataset = make_dataset(data.index.train, make_train_transform(config.data), config, ctx)
    sampler = DistributedBatchSampler(
        data.order, epochs=epochs, start_step=start_step, rank=ctx.rank, world_size=ctx.world_size
    )
    return TrainBatches(iter(make_loader(dataset, sampler, config, ctx)), dataset, data.order)


def make_train_batches(
    config: ResolvedConfig, data: RunData, run: OpenRun, schedule: TrainSchedule, *, start_step: int
) -> TrainBatches:
    """Return the local batches from `start_step` to the end of the run, recorded in `audit/` if run.audit is on."""
    batches = make_batches(config, data, run.ctx, epochs=schedule.epochs, start_step=start_step)
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


def write_split_file(data: RunData, run: OpenRun) -> None:
    """Write `split.csv` into the run folder, if the split was made here. Every process must call it."""

    def write() -> None:
        if run.is_writer and data.index.split_made:
            with saving_to(run.folder / SPLIT):
                write_split(data.index, run.folder / SPLIT)

    run.ctx.main_process_first(write)


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


class Evaluator:
    """Evaluates the splits of a data set. Its worker processes stay alive between epochs."""

    def __init__(self, index: DatasetIndex, config: ResolvedConfig, ctx: DistributedContext) -> None:
        self._ctx = ctx
        self._classes = len(index.classes)
        self._normalize = Normalize(config.data.preprocessing, ctx.device)
        self._batch_size = eval_batch_size(config, ctx)
        self._splits: dict[str, tuple[int, Iterable[Batch]]] = {}
        transform = eval_transform(config.data.preprocessing)
        for name, examples in eval_splits(index).items():
            dataset = make_dataset(examples, transform, config, ctx)
            sampler = EvalBatchSampler(
                len(examples), batch_size=self._batch_size, rank=ctx.rank, world_size=ctx.world_size
            )
            self._splits[name] = (len(examples), make_loader(dataset, sampler, config, ctx))

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
        return {
            name: evaluate(
                model,
                batches,
                classes=self._classes,
                expected=expected,
                normalize=self._normalize,
                reduce=partial(accelerator.reduce, reduction="sum"),
                device=accelerator.device,
                num_batches=-(-expected // (self._ctx.world_size * self._batch_size)),
                interrupted=interrupted,
            )
            for name, (expected, batches) in self._splits.items()
            if splits is None or name in splits
        }

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

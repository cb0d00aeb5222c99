"""Sections of the config -> the parts of a run. Only here, and in the verbs, is the whole config known."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint.retention import Policy
from trainer.config.schema import Config, DataConfig
from trainer.data.augment import Normalise, Preprocessing, Transform, eval_transform, train_transform
from trainer.data.index import Example, ImageIndex
from trainer.data.loader import Batch, Images, Order, Shares, Slices, make_loader
from trainer.data.prepare import Displays, Prepared, prepare
from trainer.distributed import context
from trainer.distributed.context import Runtime
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.loop import Evaluations, Plan, Start
from trainer.optim.loss import Objective, balanced_weights
from trainer.optim.mixup import Mixing
from trainer.optim.schedule import Interval, lr_factor, parse_duration, parse_interval, to_steps
from trainer.report.console import checking, downloading
from trainer.run.audit import audited
from trainer.text import listed, printable


def load_examples(data: DataConfig, machine: Runtime, console: Console) -> Prepared:
    """Return the checked examples; one process of each machine draws, downloads and checks, the others find."""
    displays = displays_on(console)
    return context.in_turn(
        machine.accelerator, lambda: prepare(data, workers=machine.cores, displays=displays), local=True
    )


def displays_on(console: Console) -> Displays:
    """Return what shows the preparation of the data on this console."""
    return Displays(downloading=partial(downloading, console), checking=partial(checking, console))


def evaluated(index: ImageIndex) -> dict[str, tuple[Example, ...]]:
    """Return name -> examples of what is evaluated: `test` is what is reported, `val` what is selected on."""
    return {"val": index.val, "test": index.test} if index.val else {"test": index.test}


def describe(prepared: Prepared) -> str:
    """Return what the data is, in a few lines."""
    index = prepared.index
    counts = [f"{len(index.train)} images to train on"]
    if index.val:
        counts.append(f"{len(index.val)} to select the best epoch on")
    counts.append(f"{len(index.test)} to report on ({index.reported})")
    named = listed(index.classes, limit=8)
    head = f"{printable(str(index.root))}: {len(index.classes)} classes ({named}); {', '.join(counts)}"
    return "\n".join([head, *prepared.notes])


def preprocessing_of(data: DataConfig) -> Preprocessing:
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


def make_order(config: Config, index: ImageIndex) -> Order:
    """Return the order of the training examples."""
    balances = config.data.sampling == "balanced"
    return Order(
        examples=len(index.train),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        labels=tuple(example.label for example in index.train) if balances else None,
    )


def make_objective(config: Config, index: ImageIndex, device: torch.device) -> Objective:
    """Return the loss; class weights come from the examples that are trained on."""
    weights = None
    if config.regularise.class_weights == "balanced":
        counts = Counter(example.label for example in index.train)
        weights = balanced_weights([counts[label] for label in range(len(index.classes))]).to(device)
    return Objective(label_smoothing=config.regularise.label_smoothing, class_weights=weights)


def make_mixing(config: Config, machine: Runtime) -> Mixing | None:
    """Return what mixes the pictures of a batch; None: nothing does."""
    mixup, cutmix = config.regularise.mixup, config.regularise.cutmix
    if not (mixup or cutmix):
        return None
    return Mixing(
        mixup=mixup,
        cutmix=cutmix,
        seed=config.run.seed,
        rank=machine.rank,
        world=machine.world,
        gather=machine.accelerator.gather,
    )


def training_images(
    index: ImageIndex, preprocessing: Preprocessing, config: Config, machine: Runtime
) -> Images:
    """Return the training images under the config's augmentation."""
    transform = training_transform(config.data, preprocessing)
    return Images(
        index.train, transform, seed=config.run.seed, threads=decoding_threads(config.data.workers, machine)
    )


def loader_of(
    images: Images, sampler: Shares | Slices, config: Config, machine: Runtime
) -> DataLoader[Batch]:
    """Return the loader of this process's batches."""
    return make_loader(
        images,
        sampler,
        image_size=config.data.image_size,  # type: ignore[arg-type]
        channels_last=config.train.channels_last,
        workers=input_workers(config.data.workers, machine),
        accelerator=machine.accelerator,
    )


def make_batches(
    images: Images,
    order: Order,
    start: Start,
    plan: Plan,
    *,
    config: Config,
    machine: Runtime,
    attempt: int,
) -> Iterator[Batch]:
    """Return this process's shares of the updates from `start` to the end of the run, written down where asked."""
    shares = Shares(order, epochs=plan.epochs, start_step=start.step, rank=machine.rank, world=machine.world)
    batches: Iterator[Batch] = iter(loader_of(images, shares, config, machine))
    if not config.run.audit:
        return batches
    return audited(
        batches,
        Path(config.run.dir),
        start_step=start.step,
        steps_per_epoch=order.steps_per_epoch,
        rank=machine.rank,
        world=machine.world,
        attempt=attempt,
        lr_factor=plan.lr_factor,
    )


def input_workers(asked: int | None, machine: Runtime) -> int:
    """Return how many processes decode for this one.

    On a CPU they share the cores with the training, which is by far the slower: one for every four cores is
    ahead of it. With fewer cores than that none is, since it would take turns with the training's own threads;
    these decode instead, between two updates. A GPU is fed by all cores but the trainer's own.
    """
    if asked is not None:
        return asked
    if machine.accelerator.device.type == "cpu":
        return machine.cores // 4
    return min(16, max(1, machine.cores - 1))


def decoding_threads(asked_workers: int | None, machine: Runtime) -> int:
    """Return how many images this process decodes at a time; a worker decodes one."""
    return 1 if input_workers(asked_workers, machine) else machine.threads


def images_at_a_time(config: Config, machine: Runtime) -> int:
    """Return how many images a process evaluates at a time.

    On a CPU a few for each thread: what passes from layer to layer then stays in its caches (SqueezeNet at 224 px on
    two threads: 8 at a time take 0.6 of the time of 128). On a GPU as many as it trains on.
    """
    if machine.accelerator.device.type == "cpu":
        return max(8, 4 * machine.threads)
    share = -(-config.train.batch_size // (machine.world * config.train.accumulation))
    return max(8, share)


class Evaluator:
    """Evaluates each part of the data; its workers stay between epochs."""

    def __init__(
        self, index: ImageIndex, preprocessing: Preprocessing, config: Config, machine: Runtime
    ) -> None:
        self._machine = machine
        self._classes = len(index.classes)
        self._normalise = Normalise(preprocessing, machine.accelerator.device)
        self._size = images_at_a_time(config, machine)
        self._parts: dict[str, tuple[int, Iterable[Batch]]] = {}
        for name, part in evaluated(index).items():
            images = Images(
                part,
                eval_transform(preprocessing),
                seed=config.run.seed,
                threads=decoding_threads(config.data.workers, machine),
            )
            slices = Slices(len(part), batch_size=self._size, rank=machine.rank, world=machine.world)
            self._parts[name] = (len(part), loader_of(images, slices, config, machine))

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
                normalise=self._normalise,
                reduce=partial(accelerator.reduce, reduction="sum"),
                device=accelerator.device,
                rounds=-(-expected // (self._machine.world * self._size)),
                interrupted=interrupted,
            )
            for name, (expected, batches) in self._parts.items()
            if parts is None or name in parts
        }


def make_plan(config: Config, order: Order) -> Plan:
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
    return Plan(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        loss_reduction=config.optim.loss_reduction,
        accumulation=config.train.accumulation,
        clip_norm=config.optim.clip_norm,
        seed=config.run.seed,
        points_per_epoch=config.train.points_per_epoch,
        lr_factor=partial(
            lr_factor,
            total_steps=total,
            warmup_steps=warmup,
            kind=config.optim.schedule,
        ),
    )


def warmup_steps(config: Config, order: Order) -> int:
    """Return the length of the warm-up."""
    duration = parse_duration("optim.warmup", config.optim.warmup)
    steps = order.steps_per_epoch
    return to_steps(duration, steps_per_epoch=steps, total_steps=steps * config.train.epochs)


def make_policy(config: Config, order: Order) -> Policy:
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
    return Policy(
        every_steps=in_steps(every),
        every_seconds=every.seconds if every else None,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        keep_every=in_steps(interval("keep_every")),
    )


def paths_of(images: Images, order: Order, epoch: int, step: int) -> list[str]:
    """Return the files of a global batch, fit to be shown; epoch and step count from 0."""
    return [printable(images.paths[example]) for example in order.batch(epoch, step)]

"""From a config to its data: the checked examples, the order in which a run trains on them, and its schedule."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial

from rich.console import Console

from regraft.contract import EXCLUDED, IMAGES, SPLIT
from trainer.config.build_image_cache import ImageCache
from trainer.config.resolve import ResolvedConfig
from trainer.data.digests import read_digests, write_digests
from trainer.data.image_cache.cached import NOT_CACHED, CachedImages
from trainer.data.index import DatasetIndex, write_excluded, write_split
from trainer.data.prepare import Prepared, list_examples, validate_examples
from trainer.data.sampler import EpochOrder
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.optim.schedule import TrainSchedule, get_lr_multiplier, warmup_steps
from trainer.report.progress import progress_hooks
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun
from trainer.text import escape_unprintable, join_truncated


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The examples of a run, their cached images, and the order in which it trains on them."""

    prepared: Prepared
    order: EpochOrder
    images: CachedImages = NOT_CACHED

    @property
    def index(self) -> DatasetIndex:
        """Return the examples of each split."""
        return self.prepared.index

    @property
    def train_groups(self) -> tuple[str | None, ...]:
        """Return the group of each training example, or nothing if there are no groups."""
        groups = self.index.groups
        return tuple(groups.get(path) for path, _ in self.index.train) if groups else ()

    @cached_property
    def examples_per_class(self) -> tuple[int, ...]:
        """Return the number of training examples of each class."""
        counts = Counter(label for _, label in self.index.train)
        return tuple(counts[label] for label in range(len(self.index.classes)))


def load_run_data(config: ResolvedConfig, ctx: DistributedContext, console: Console, *, check: bool = True) -> RunData:
    """Return the checked examples and their cached images.

    One process of each machine downloads, checks and caches them; the others find them. Every process must call it.
    `check` decodes every image once, unless an earlier start did; without it, no image is cached.

    Raises:
        UserError: see `data.prepare`; or the machines see different images.

    """
    hooks = progress_hooks(console)
    cache = ImageCache(config.data) if check and config.data.cache_images != "off" else None

    def load() -> Prepared:
        index = list_examples(config.data, displays=hooks)
        if not check:
            return Prepared(index, index.notes)
        validate = partial(validate_examples, index, config.data, workers=ctx.cores, displays=hooks)
        if cache is None or not ctx.accelerator.is_local_main_process:
            return validate()
        with cache.building(index) as builder:
            prepared = validate(on_decoded=builder.add_decoded)
            images = cache.by_form(prepared.index, prepared.digests)
            builder.add_missing(images, workers=ctx.cores, display=hooks.caching)
        return prepared

    prepared = ctx.main_process_first(load, local=True)
    console.print(dataset_summary(prepared))
    ctx.check_equal_across_ranks((prepared.fingerprint, prepared.content_digest), "the images")
    images = NOT_CACHED
    if cache is not None:
        images, messages = cache.open(prepared.index, prepared.digests, ctx)
        console.print("\n".join(messages))
    return RunData(prepared=prepared, order=make_epoch_order(config, prepared.index), images=images)


def dataset_summary(prepared: Prepared) -> str:
    """Return a few lines about the data: classes, counts of the splits, and what was skipped."""
    index = prepared.index
    counts = [f"{len(index.train)} images to train on"]
    if index.val:
        counts.append(f"{len(index.val)} to select the best epoch on")
    counts.append(f"{len(index.test)} to report on ({index.reported})")
    names = join_truncated(index.classes, limit=8)
    head = f"{escape_unprintable(str(index.root))}: {len(index.classes)} classes ({names}); {', '.join(counts)}"
    return "\n".join([head, *prepared.notes])


def make_epoch_order(config: ResolvedConfig, index: DatasetIndex) -> EpochOrder:
    """Return the order of the training examples."""
    is_balanced = config.data.sampling == "balanced"
    return EpochOrder(
        examples=len(index.train),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        labels=tuple(example.label for example in index.train) if is_balanced else None,
    )


def make_schedule(config: ResolvedConfig, order: EpochOrder) -> TrainSchedule:
    """Return the updates of the run; durations become steps here.

    Raises:
        UserError: the warm-up is longer than the run.

    """
    steps = order.steps_per_epoch
    total = steps * config.train.epochs
    warmup = warmup_steps(config.optim.warmup, steps_per_epoch=steps, total_steps=total)
    if warmup > total:
        raise UserError(
            f"optim.warmup is {config.optim.warmup!r}, {warmup} steps, but the run has {total}: the peak learning rate "
            "would not be reached"
        )
    return TrainSchedule(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        logs_per_epoch=config.train.logs_per_epoch,
        lr_multiplier=partial(get_lr_multiplier, total_steps=total, warmup_steps=warmup, kind=config.optim.schedule),
    )


def check_images_unchanged(config: ResolvedConfig, data: RunData, run: OpenRun, *, resumed: bool) -> None:
    """Compare the images with those that the run began with, and record them. Every process must call it.

    Raises:
        UserError: the run resumes, an image has changed since, and data.on_changed is stop; or the record is damaged.

    """
    path, prepared = run.folder / IMAGES, data.prepared

    def check() -> None:
        if not run.is_writer:
            return
        saved = read_digests(path, count=len(prepared.digests)) if resumed else None
        if saved == prepared.digests:
            return
        if saved is not None:
            changed = [
                escape_unprintable(example.path)
                for example, before, now in zip(prepared.examples, saved, prepared.digests, strict=True)
                if before != now
            ]
            message = (
                f"{len(changed)} of {len(saved)} images have another content than when this run began: "
                f"{join_truncated(changed, limit=5)}"
            )
            if config.data.on_changed == "stop":
                raise UserError(
                    f"{message}. Restore them; or train on with the new ones by --data.on_changed continue; or start "
                    "anew by --run.resume never, which archives the run"
                )
            run.console.print(message)
        with saving_to(path):
            write_digests(path, prepared.digests)

    run.ctx.main_process_first(check)


def write_split_files(data: RunData, run: OpenRun) -> None:
    """Write `split.csv` into the run folder if the split was made here, and `excluded.csv` if images were left out.

    Every process must call it.
    """

    def write() -> None:
        for name, write_file, is_needed in (
            (SPLIT, write_split, data.index.split_made),
            (EXCLUDED, write_excluded, bool(data.index.excluded)),
        ):
            if run.is_writer and is_needed:
                with saving_to(run.folder / name):
                    write_file(data.index, run.folder / name)

    run.ctx.main_process_first(write)

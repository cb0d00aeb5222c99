"""From a config to its data: load and check the images, and record them in the run folder."""

from dataclasses import replace
from functools import partial

import numpy as np
from rich.console import Console

from regraft.contract import EXCLUDED, IMAGES, SPLIT
from trainer.config.build_image_cache import ImageCache
from trainer.config.resolve import ResolvedConfig
from trainer.config.run_data import RunData, make_run_data
from trainer.data.digests import read_digests, write_digests
from trainer.data.image_cache.cached import NOT_CACHED
from trainer.data.index import write_excluded, write_split
from trainer.data.prepare import Prepared, list_examples, validate_examples
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.report.progress import progress_hooks
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun
from trainer.text import escape_unprintable, join_truncated


def load_run_data(config: ResolvedConfig, ctx: DistributedContext, console: Console, *, check: bool = True) -> RunData:
    """Return the checked examples and their cached images.

    One process of each machine downloads, checks and caches them; the others find them. Every process must call it.
    `check` decodes every image once, unless an earlier start did; without it, no image is cached.

    Raises:
        UserError: see `data.prepare` and `make_run_data`; or the machines see different images.

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
    try:
        ctx.check_equal_across_ranks((prepared.fingerprint, prepared.content_digest), "the images")
    except UserError as error:
        if prepared.deferred is not None:
            prepared.deferred.compare_all_at_next_start()
            error.add_note("This start has not compared all of them, the next one does: start the same command again")
        raise
    images = NOT_CACHED
    if cache is not None:
        images, messages = cache.open(prepared.index, prepared.digests, ctx)
        console.print("\n".join(messages))
    splits = (prepared.index.train, prepared.index.val, prepared.index.test)
    images = replace(images, paths=tuple(split.paths for split in splits), deferred=prepared.deferred)
    return make_run_data(config, prepared, images)


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
        if saved is not None and (saved == prepared.digests).all():
            return
        if saved is not None:
            rows = np.flatnonzero(saved != prepared.digests).tolist()
            changed = [escape_unprintable(prepared.examples[row].path) for row in rows]
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

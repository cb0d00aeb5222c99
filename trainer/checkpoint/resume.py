"""Where a run goes on: the newest checkpoint that is whole and its own, and everything put back to it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import should_stop_early
from trainer.checkpoint.state import CheckpointState, RunIdentity
from trainer.checkpoint.store import LoadedCheckpoint
from trainer.checkpoint.tensors import load_batch_norm_statistics, restore, restore_ema
from trainer.config.builders import warmup_steps
from trainer.config.parse import dump
from trainer.config.schema import Config
from trainer.data.index import write_split
from trainer.data.loader import EpochOrder
from trainer.data.prepare import Prepared
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.batch_norm import restore_batch_norm_statistics
from trainer.optim.ema import ModelEma
from trainer.report.metrics import epoch_rows, parse_rows
from trainer.run.atomic import remove_leftovers
from trainer.run.folder import (
    CHECKPOINTS,
    MODEL,
    OURS,
    SPLIT,
    archive_results,
    check_resumable,
    check_seen,
    write_config,
)
from trainer.run.lock import ATTEMPTS
from trainer.run.versions import versions
from trainer.text import escape_unprintable


def run_identity(config: Config, prepared: Prepared) -> RunIdentity:
    """Return what the run trains, to be compared with a checkpoint's."""
    labels = Counter(label for _, label in prepared.index.train)
    classes = prepared.index.classes
    return RunIdentity(
        architecture=config.model.name,
        classes=classes,
        examples=tuple(labels[label] for label in range(len(classes))),
        data=prepared.fingerprint,
    )


def run_metadata(config: Config, order: EpochOrder, ctx: DistributedContext) -> dict[str, Any]:
    """Return what every checkpoint of this start says of it."""
    return {
        "seed": config.run.seed,
        "schedule": {
            "kind": config.optim.schedule,
            "warmup_steps": warmup_steps(config, order),
            "total_steps": order.steps_per_epoch * config.train.epochs,
        },
        "chosen": {"precision": ctx.precision, "channels_last": config.train.channels_last},
        "threads": ctx.threads,
        "versions": versions(),
    }


def load_latest_checkpoint(
    config: Config,
    prepared: Prepared,
    subject: RunIdentity,
    order: EpochOrder,
    *,
    log: Callable[[str], object],
    writes: bool,
) -> LoadedCheckpoint | None:
    """Open the run folder, and return the checkpoint that the run in it goes on from; None where it begins."""
    folder = Path(config.run.dir)
    if not writes:
        check_seen(folder)
        return None  # rank 0's choice is everyone's
    text = dump(replace(config, run=replace(config.run, resume="auto")))  # for whoever runs it again
    check_resumable(folder, text, resume="auto")
    try:
        store.clean_up(folder / CHECKPOINTS)
        for name in OURS:
            remove_leftovers(folder, name)
        remove_leftovers(folder / ATTEMPTS, "*")
        found = store.load_latest(folder / CHECKPOINTS, log=log)
        if found is not None:
            _require_own(found, config, subject, order)
            _require_model(found, config, prepared.index.val_split)
        elif (aside := archive_results(folder)) is not None:
            log(aside)
        # Only now: a start that is refused leaves the config as it was.
        write_config(folder, text)
        if prepared.index.split_made:
            write_split(prepared.index, folder / SPLIT)
    except OSError as error:
        raise UserError(
            f"{folder / CHECKPOINTS}: cannot be read and put in order ({error}); mend that, or choose another run.dir"
        ) from None
    return found


def _require_own(found: LoadedCheckpoint, config: Config, subject: RunIdentity, order: EpochOrder) -> None:
    """Raise a UserError for the checkpoint of another run than this."""
    state = found.state
    state.subject.check_same(subject, str(found.path))
    if state.seed != config.run.seed or state.order != order.digest(state.epoch):
        raise UserError(
            f"{found.path}: the examples are drawn in another order here than where it was written, by torch "
            f"{escape_unprintable(state.versions.get('torch', '?'))}: go on with that version, or start anew with "
            "--run.resume never, which moves the run aside"
        )
    if state.epoch > config.train.epochs or state.steps_per_epoch != order.steps_per_epoch:
        raise UserError(
            f"{found.path}: after {state.epoch} epochs of {state.steps_per_epoch} steps, but this run is to have "
            f"{config.train.epochs} of {order.steps_per_epoch}: choose another run.dir, or --run.resume never"
        )


def is_finished(found: LoadedCheckpoint, config: Config, selection: str | None) -> bool:
    """Return whether there is nothing to train after a checkpoint: it is of the last epoch, or training ended early.

    Raises:
        UserError: its metrics are damaged.

    """
    state, patience = found.state, config.regularization.early_stopping
    if state.epoch == config.train.epochs:
        return True
    if patience is None or selection is None or state.sums is not None:
        return False
    rows = epoch_rows(parse_rows(found.metrics, str(found.path)))
    return should_stop_early(rows, part=selection, patience=patience)


def _require_model(found: LoadedCheckpoint, config: Config, selection: str | None) -> None:
    """Raise a UserError for a finished run without its model file: nothing would be trained to make it again."""
    model = Path(config.run.dir) / MODEL
    if not model.exists() and is_finished(found, config, selection):
        raise UserError(
            f"{model} is gone, and the run is finished. Restore that file, or --run.resume never, which moves the run "
            "aside"
        )


def restore_checkpoint(
    found: LoadedCheckpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    *,
    ctx: DistributedContext,
    ema: ModelEma | None = None,
) -> UserError | None:
    """Put everything back to where the checkpoint stands, or return why that cannot be."""
    state = found.state
    both = model if ema is None else ema.and_model()
    try:
        restore_ema(found.path, ema.model if ema else None)
        # Fp16's loss scaling skips updates until it has settled: the first ones may leave no moments.
        restore(found.path, model, optimizer, updated=state.step > 0 and not state.scaler)
        restore_batch_norm_statistics(
            both, load_batch_norm_statistics(found.path), rank=ctx.rank, world_size=ctx.world_size
        )
    except UserError as error:
        return error
    if scaler is not None and state.scaler:  # none where the run began without fp16
        scaler.load_state_dict(dict(state.scaler))
    return None


def describe_resume(
    state: CheckpointState, config: Config, order: EpochOrder, ctx: DistributedContext
) -> list[str]:
    """Return where the run goes on, and what is no longer as it was when it was saved."""
    steps = order.steps_per_epoch
    begun = state.step - state.epoch * steps
    within = f", in epoch {state.epoch + 1} after {begun} of its {steps} steps" if begun else ""
    lines = [f"going on after epoch {state.epoch} of {config.train.epochs} (step {state.step}){within}"]
    if state.world_size != ctx.world_size:
        is_own = config.transfer.batch_norm in ("train", "frozen-with-weights")
        batch_norm = ", and BatchNorm, whose statistics belong to each process" if is_own else ""
        lines.append(
            f"  on {ctx.world_size} processes instead of {state.world_size}: the same examples, crops and "
            "learning rates; "
            f"equal but for the order of sums, and the masks of dropout{batch_norm}"
        )
    total = state.schedule.get("total_steps")
    if total != steps * config.train.epochs:
        lines.append(
            f"  for {steps * config.train.epochs} steps instead of {escape_unprintable(str(total))}: from "
            "here on, the learning "
            "rate is that of the longer run"
        )
    now = versions()
    changed = [
        f"{name} {escape_unprintable(then)} then, {now[name]} now"
        for name, then in state.versions.items()
        if name in now and now[name] != then
    ]
    if changed:
        lines.append(f"  with other versions, so equal but for what they changed: {', '.join(changed)}")
    return lines

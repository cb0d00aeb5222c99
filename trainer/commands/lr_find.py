"""Find a learning rate: `regraft lr-find --config F [--from A --to B --steps N]` (or through torchrun).

A learning-rate range test (Smith 2017): the run's own model, groups and batches, each update at a higher rate than
the one before. Writes lr-find.png and lr-find.json into the run folder, and nothing else: it is no run.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # Run by path, as main.py may be too.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from rich.console import Console

from trainer.commands.lr_range import Suggestion, has_diverged, rates, smoothed, suggest
from trainer.config.builders import (
    load_dataset,
    make_criterion,
    make_epoch_order,
    make_loader,
    make_mixup,
    make_preprocessing,
    training_images,
)
from trainer.config.model_builder import fit_linear_probe, make_l2_sp, make_model, make_param_groups
from trainer.config.parse import parse
from trainer.config.preflight import require_sync_batch_norm
from trainer.config.schema import Config
from trainer.data.augment import Normalize
from trainer.data.loader import DistributedBatchSampler
from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.loop import update
from trainer.main import exit_after, run_cli
from trainer.model.freeze import apply_stage
from trainer.optim.param_groups import make_optimizer, set_lr
from trainer.pipeline import resolve, with_pretrained
from trainer.report.block_table import block_table
from trainer.report.console import make_console
from trainer.report.lr_range import draw_range, range_table, testing
from trainer.run.atomic import write_text_atomically
from trainer.run.folder import MODEL, PRETRAIN
from trainer.seeds import derive_seed

NAME = "lr-find"
STEPS = 100
_SPAN = 1e4
_FEWEST = 10


@dataclass(frozen=True)
class Found:
    """What a range test has seen."""

    rates: tuple[float, ...]
    """Of each update that counts, in the units of `optim.lr`; every group's own is in proportion."""
    losses: tuple[float, ...]
    """Mean loss of each global batch before its update; all finite."""
    diverged: bool
    """Whether it ended before its time."""
    suggestion: Suggestion


def find(
    config: Config, ctx: DistributedContext, console: Console, signals: StopSignals, tried: Sequence[float]
) -> Found:
    """Make one update at each of these rates until the loss diverges; all processes end with the same one.

    Args:
        config: the whole of it, resolved; the weights to start from stand in it.
        machine: what it runs on.
        console: rank 0's speaks.
        signals: what asks it to stop.
        tried: rising, in the units of `optim.lr`.

    Raises:
        UserError: whatever the user can mend.
        Stopped: it was asked to stop.

    """
    accelerator = ctx.accelerator
    prepared = load_dataset(config.data, ctx, console)
    index, preprocessing = prepared.index, make_preprocessing(config.data)
    order = make_epoch_order(config, index)
    require_sync_batch_norm(config, order, ctx)
    context.check_equal_across_ranks(accelerator, prepared.fingerprint, "the images")
    created = context.main_process_first(
        accelerator,
        lambda: make_model(
            config,
            index.classes,
            config.model.weights,
            world_size=ctx.world_size,
            on_progress=console.print,
        ),
        local=True,
    )
    console.print("\n".join(created.summary))
    created.model.to(accelerator.device)
    l2_sp = make_l2_sp(created, config)
    if config.model.head_init == "linear-probe":
        fit_linear_probe(created, index, preprocessing, config, ctx, watch=nullcontext, log=console.print)
    if len(created.unfreeze_stages) > 1:
        console.print(
            "transfer.trainable has stages: the last one is tested, in which all trains that ever does"
        )
        apply_stage(created.model, created.unfreeze_stages[-1], config.transfer.batch_norm)
    groups = make_param_groups(created, config)
    console.print(block_table(created, groups))
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
    model, optimizer = context.prepare(accelerator, created.model, optimizer)

    training = training_images(index, preprocessing, config, ctx)
    criterion, mixup = make_criterion(config, index, accelerator.device), make_mixup(config, ctx)
    epochs = -(-len(tried) // order.steps_per_epoch)
    shares = DistributedBatchSampler(order, epochs=epochs, rank=ctx.rank, world_size=ctx.world_size)
    normalize = Normalize(preprocessing, accelerator.device)
    sizes = order.batch_sizes
    losses: list[float] = []
    diverged = False
    model.train()
    with signals.deferred(), testing(console, len(tried)) as show:
        for step, (rate, share) in enumerate(
            zip(tried, make_loader(training, shares, config, ctx), strict=False)
        ):
            (asked,) = ctx.all_reduce_max([signals.received or 0])
            if asked:
                raise Stopped(signal.Signals(asked).name)
            set_lr(optimizer, rate / config.optim.lr)
            torch.manual_seed(derive_seed("masks", config.run.seed, step, ctx.rank))
            size = sizes[step % len(sizes)]
            images, labels, examples = share
            blend = None
            if mixup is not None:
                images, labels, blend = mixup(images, labels, step, size)
            loss_sum, _ = update(
                model,
                optimizer,
                (images, labels, examples),
                ctx.world_size / size if config.optim.loss_reduction == "mean" else float(ctx.world_size),
                accelerator=accelerator,
                normalize=normalize,
                parts=config.train.grad_accum_steps,
                max_grad_norm=config.optim.max_grad_norm,
                criterion=criterion,
                blend=blend,
                l2_sp=l2_sp,
            )
            # Gathered and added up in one order, so that all come to the same number and end together.
            losses.append(float(accelerator.gather(loss_sum.view(1)).sum()) / size)
            show(rate, losses[-1])
            if has_diverged(losses):
                diverged = True
                break
    finite = losses[:-1] if diverged else losses
    used = tuple(tried[: len(finite)])
    return Found(used, tuple(finite), diverged, suggest(used, finite))


def lr_find(argv: Sequence[str], signals: StopSignals) -> Found:
    """Do what the command line asks for: test, write, print.

    Raises:
        UserError: as a run of the same config would; a range or a number of steps that is none.
        Stopped: it was asked to stop; nothing was written.

    """
    own, rest = _parser().parse_known_args(argv)
    config = with_source(resolve(parse(rest)))
    lowest = config.optim.lr / _SPAN if own.lowest is None else own.lowest
    highest = config.optim.lr * _SPAN if own.highest is None else own.highest
    if not 0 < lowest < highest < float("inf"):
        raise UserError(
            f"--from {lowest:g}, --to {highest:g}: expected two learning rates, the first above 0 and below the second"
        )
    if own.steps < _FEWEST:
        raise UserError(f"--steps {own.steps}: expected {_FEWEST} or more")

    ctx = context.start(
        device=config.run.device, precision=config.train.precision, threads=config.run.threads
    )
    console = make_console(speaks=ctx.is_main_process)
    for note in ctx.notes:
        console.print(note)
    found = find(config, ctx, console, signals, rates(lowest, highest, own.steps))
    folder = Path(config.run.dir)
    context.main_process_first(
        ctx.accelerator, lambda: _write(folder, found, config, ctx) if ctx.is_main_process else None
    )
    table = range_table(
        found.rates, found.losses, found.suggestion, configured=config.optim.lr, ended=found.diverged
    )
    console.print(table)
    console.print(_conclusion(found, config, rest))
    console.print(f"{folder / NAME}.png, {folder / NAME}.json")
    context.shut_down()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft lr-find",
        allow_abbrev=False,
        description="Learning-rate range test: rising rates until the loss diverges, and the rate that they suggest.",
        epilog="All other options are those of trainer/main.py: --config FILE, --section.key VALUE.",
    )
    parser.add_argument(
        "--from",
        dest="lowest",
        type=float,
        metavar="LR",
        help=f"first learning rate, in the units of optim.lr (default: optim.lr / {_SPAN:g})",
    )
    parser.add_argument(
        "--to", dest="highest", type=float, metavar="LR", help=f"last one (default: optim.lr x {_SPAN:g})"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="updates at most (default: %(default)s)"
    )
    return parser


def with_source(config: Config) -> Config:
    """Return the config with the weights that its fine-tuning starts from: of a source model trained before.

    Raises:
        UserError: it has a stage that trains one, which was not run yet.

    """
    if config.debug:
        raise UserError("--debug is a run of its own: leave it out here")
    if not config.pretrain.root:
        return config
    model = Path(config.run.dir) / PRETRAIN / MODEL
    if not model.is_file():
        raise UserError(
            f"this run trains a source model first, and {model} is not there yet: train it (regraft train with the "
            "same options), or name the weights to start from: --pretrain.root null --model.weights FILE"
        )
    return with_pretrained(config, model)


def _write(folder: Path, found: Found, config: Config, ctx: DistributedContext) -> None:
    content: dict[str, Any] = {
        "optim.lr": found.suggestion.lr,
        "suggestion": asdict(found.suggestion),
        "configured": config.optim.lr,
        "loss_reduction": config.optim.loss_reduction,
        "batch_size": config.train.batch_size,
        "seed": config.run.seed,
        "precision": ctx.precision,
        "processes": ctx.world_size,
        "diverged": found.diverged,
        "lr": list(found.rates),
        "loss": list(found.losses),
        "smoothed": smoothed(found.losses),
    }
    of = "the batch's summed loss" if config.optim.loss_reduction == "sum" else "the mean loss"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{NAME}.json", json.dumps(content, indent=1) + "\n")
        draw_range(
            found.rates,
            found.losses,
            found.suggestion,
            folder / f"{NAME}.png",
            title=f"{config.model.name}, {config.optim.name}, batches of {config.train.batch_size}; rates for {of}",
        )
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from None


def _conclusion(found: Found, config: Config, options: Sequence[str]) -> str:
    suggestion = found.suggestion
    if suggestion.lr is None:
        return f"no suggestion: {suggestion.why}"
    unit = (
        f"of the summed loss, as optim.loss_reduction sum has it: {suggestion.lr * config.train.batch_size:.2g} of a "
        f"mean over {config.train.batch_size}"
        if config.optim.loss_reduction == "sum"
        else "of the mean loss"
    )
    command = shlex.join(["regraft", "train", *options, "--optim.lr", f"{suggestion.lr:.2g}"])
    return f"suggested: optim.lr {suggestion.lr:.2g} ({unit}): {suggestion.why}\n\n  {command}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda signals: lr_find(words, signals), goes_on="The same command begins anew")


if __name__ == "__main__":
    exit_after(main)

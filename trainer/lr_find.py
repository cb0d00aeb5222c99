"""Find a learning rate: `python -m trainer.lr_find --config F [--from A --to B --steps N]` (or through torchrun).

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
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console

from trainer import runtime
from trainer.assemble import (
    load_examples,
    loader_of,
    make_mixing,
    make_objective,
    make_order,
    preprocessing_of,
    training_images,
)
from trainer.config import Config
from trainer.data.augment import Normalise
from trainer.data.loader import Shares
from trainer.errors import UserError
from trainer.files import write_text_atomically
from trainer.loop import update
from trainer.lr_range import Suggestion, has_diverged, rates, smoothed, suggest
from trainer.main import answer, leave_after
from trainer.model.freeze import enter
from trainer.optim import make_optimizer, set_lr
from trainer.parse import parse
from trainer.preflight import require_synchronisable
from trainer.report.blocks import block_table
from trainer.report.console import make_console
from trainer.report.lr_range import draw_range, lr_range_progress, range_table
from trainer.run_folder import MODEL
from trainer.runtime import Runtime
from trainer.seeds import derive_seed
from trainer.signals import Stopped, StopSignals
from trainer.stages import resolve, with_weights
from trainer.target import make_groups, make_model, make_pull, probe_head

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
    config: Config, machine: Runtime, console: Console, signals: StopSignals, tried: Sequence[float]
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
    accelerator = machine.accelerator
    prepared = load_examples(config.data, machine, console)
    index, preprocessing = prepared.index, preprocessing_of(config.data)
    order = make_order(config, index)
    require_synchronisable(config, order, machine)
    runtime.require_equal(accelerator, prepared.fingerprint, "the images")
    created = runtime.in_turn(
        accelerator,
        lambda: make_model(
            config,
            index.classes,
            config.model.weights,
            world=machine.world,
            on_progress=console.print,
        ),
        local=True,
    )
    console.print("\n".join(created.lines))
    created.model.to(accelerator.device)
    pull = make_pull(created, config)
    if config.model.head_init == "linear-probe":
        probe_head(created, index, preprocessing, config, machine, watch=nullcontext, say=console.print)
    if len(created.stages) > 1:
        console.print("transfer.train has stages: the last one is tested, in which all trains that ever does")
        enter(created.model, created.stages[-1], config.transfer.batch_norm)
    groups = make_groups(created, config)
    console.print(block_table(created, groups))
    optimizer = make_optimizer(config.optim.name, groups, momentum=config.optim.momentum)
    model, optimizer = runtime.prepare(accelerator, created.model, optimizer)

    training = training_images(index, preprocessing, config, machine)
    objective, mixing = make_objective(config, index, accelerator.device), make_mixing(config, machine)
    epochs = -(-len(tried) // order.steps_per_epoch)
    shares = Shares(order, epochs=epochs, rank=machine.rank, world=machine.world)
    normalise = Normalise(preprocessing, accelerator.device)
    sizes = order.batch_sizes
    losses: list[float] = []
    diverged = False
    model.train()
    with signals.as_flags(), lr_range_progress(console, len(tried)) as show:
        for step, (rate, share) in enumerate(
            zip(tried, loader_of(training, shares, config, machine), strict=False)
        ):
            (asked,) = machine.agree([signals.asked or 0])
            if asked:
                raise Stopped(signal.Signals(asked).name)
            set_lr(optimizer, rate / config.optim.lr)
            torch.manual_seed(derive_seed("masks", config.run.seed, step, machine.rank))
            size = sizes[step % len(sizes)]
            images, labels, examples = share
            blend = None
            if mixing is not None:
                images, labels, blend = mixing(images, labels, step, size)
            loss_sum, _ = update(
                model,
                optimizer,
                (images, labels, examples),
                machine.world / size if config.optim.loss_reduction == "mean" else float(machine.world),
                accelerator=accelerator,
                normalise=normalise,
                parts=config.train.accumulation,
                clip_norm=config.optim.clip_norm,
                objective=objective,
                blend=blend,
                pull=pull,
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

    machine = runtime.start(
        device=config.run.device, precision=config.train.precision, threads=config.run.threads
    )
    console = make_console(speaks=machine.is_main)
    for note in machine.notes:
        console.print(note)
    found = find(config, machine, console, signals, rates(lowest, highest, own.steps))
    folder = Path(config.run.dir)
    runtime.in_turn(
        machine.accelerator, lambda: _write(folder, found, config, machine) if machine.is_main else None
    )
    table = range_table(
        found.rates, found.losses, found.suggestion, configured=config.optim.lr, diverged=found.diverged
    )
    console.print(table)
    console.print(_conclusion(found, config, rest))
    console.print(f"{folder / NAME}.png, {folder / NAME}.json")
    runtime.shut_down()
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
    if not config.source.root:
        return config
    model = Path(config.run.dir) / "source" / MODEL
    if not model.is_file():
        raise UserError(
            f"this run trains a source model first, and {model} is not there yet: train it (regraft train with the "
            "same options), or name the weights to start from: --source.root null --model.weights FILE"
        )
    return with_weights(config, model)


def _write(folder: Path, found: Found, config: Config, machine: Runtime) -> None:
    content: dict[str, Any] = {
        "optim.lr": found.suggestion.lr,
        "suggestion": asdict(found.suggestion),
        "configured": config.optim.lr,
        "loss_reduction": config.optim.loss_reduction,
        "batch_size": config.train.batch_size,
        "seed": config.run.seed,
        "precision": machine.precision,
        "processes": machine.world,
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
    return answer(lambda signals: lr_find(words, signals), goes_on="The same command begins anew")


if __name__ == "__main__":
    leave_after(main)

"""Find a learning rate: `regraft lr-find --config FILE [--from LR --to LR --steps N]`, or through torchrun.

A learning-rate range test (Smith 2017) trains with the model, parameter groups and batches of the run, and raises the
learning rate at each update. It writes lr-find.png and lr-find.json into the run folder, and does not start a run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from regraft.contract import MODEL, PRETRAIN, create_output_folder
from trainer.cli import exit_after, run_cli
from trainer.commands.lr_range import rates, smoothed
from trainer.commands.range_test import RangeTest, run_range_test
from trainer.config.parse import parse, split_command
from trainer.config.resolve import ResolvedConfig, with_pretrained
from trainer.config.start import start
from trainer.distributed.context import DistributedContext, shut_down
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.report.figures import try_write_figure
from trainer.report.lr_range import draw_range, range_table
from trainer.run.atomic import write_text_atomically

NAME = "lr-find"
STEPS = 100
_MIN_STEPS = 10
_SPAN = 1e4
"""The default range is from optim.lr / _SPAN to optim.lr * _SPAN."""


def lr_find(argv: Sequence[str], signals: StopSignals) -> RangeTest:
    """Run a range test, write its files and print the suggested learning rate.

    Raises:
        UserError: an error of the config, of the range, or of the number of steps.
        Stopped: the test was asked to stop; nothing is written.

    """
    own, rest = split_command(_parser(), argv)
    parsed = parse(rest)
    lowest = parsed.optim.lr / _SPAN if own.lowest is None else own.lowest
    highest = parsed.optim.lr * _SPAN if own.highest is None else own.highest
    if not 0 < lowest < highest < float("inf"):
        raise UserError(
            f"--from {lowest:g}, --to {highest:g}: expected two learning rates above 0, the first below the second"
        )
    if own.steps < _MIN_STEPS:
        raise UserError(f"--steps {own.steps}: expected {_MIN_STEPS} or more")
    if parsed.debug:
        raise UserError("--debug cannot be combined with lr-find; leave it out")
    config, ctx, console = start(parsed)
    config = with_pretrained_weights(config)
    result = run_range_test(config, ctx, console, signals, rates(lowest, highest, own.steps))
    folder = Path(config.run.dir)
    ctx.main_process_first(lambda: _write(folder, result, config, ctx) if ctx.is_main_process else None)
    if ctx.is_main_process:
        loss = "summed loss" if config.optim.loss_reduction == "sum" else "mean loss"
        title = f"{config.model.name}, {config.optim.name}, batches of {config.train.batch_size}; rates for the {loss}"
        draw = partial(draw_range, result.rates, result.losses, result.suggestion, title=title)
        try_write_figure(folder / f"{NAME}.png", draw, size=(7.0, 4.4), warn=console.print)
    console.print(
        range_table(
            result.rates, result.losses, result.suggestion, configured=config.optim.lr, diverged=result.diverged
        )
    )
    console.print(_conclusion(result, config, rest))
    console.print(f"{folder / NAME}.png, {folder / NAME}.json")
    shut_down()
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft lr-find",
        usage="regraft lr-find [FOLDER] [--from LR] [--to LR] [--steps N]\n"
        "                       [--config FILE] [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description="Learning-rate range test: raise the learning rate until the loss diverges, and suggest one.",
        epilog="All other options are those of regraft train: --config FILE, --SECTION.KEY VALUE.",
    )
    parser.add_argument(
        "--from",
        dest="lowest",
        type=float,
        metavar="LR",
        help=f"first learning rate, as optim.lr (default: optim.lr / {_SPAN:g})",
    )
    parser.add_argument(
        "--to",
        dest="highest",
        type=float,
        metavar="LR",
        help=f"last learning rate, as optim.lr (default: optim.lr x {_SPAN:g})",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="maximum number of updates (default: %(default)s)"
    )
    return parser


def with_pretrained_weights(config: ResolvedConfig) -> ResolvedConfig:
    """Return the config with the weights of its pretraining phase, if it has one.

    Raises:
        UserError: the pretraining phase is not finished.

    """
    if not config.pretrain.root:
        return config
    model = Path(config.run.dir) / PRETRAIN / MODEL
    if not model.is_file():
        raise UserError(
            f"this run starts from a pretraining phase, but {model} does not exist yet: run regraft train with the "
            "same options, or set other weights: --pretrain.root null --model.weights FILE"
        )
    return with_pretrained(config, model)


def _write(folder: Path, result: RangeTest, config: ResolvedConfig, ctx: DistributedContext) -> None:
    content: dict[str, Any] = {
        "optim.lr": result.suggestion.lr,
        "suggestion": asdict(result.suggestion),
        "configured": config.optim.lr,
        "loss_reduction": config.optim.loss_reduction,
        "batch_size": config.train.batch_size,
        "seed": config.run.seed,
        "precision": result.precision,
        "processes": ctx.world_size,
        "diverged": result.diverged,
        "lr": list(result.rates),
        "loss": list(result.losses),
        "smoothed": smoothed(result.losses),
    }
    try:
        create_output_folder(folder)
        write_text_atomically(folder / f"{NAME}.json", json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder") from None


def _conclusion(result: RangeTest, config: ResolvedConfig, options: Sequence[str]) -> str:
    suggestion = result.suggestion
    if suggestion.lr is None:
        return f"no suggestion: {suggestion.reason}"
    unit = (
        f"for the summed loss of optim.loss_reduction sum; {suggestion.lr * config.train.batch_size:.2g} for the mean "
        f"loss of {config.train.batch_size} examples"
        if config.optim.loss_reduction == "sum"
        else "for the mean loss"
    )
    command = shlex.join(["regraft", "train", *options, "--optim.lr", f"{suggestion.lr:.2g}"])
    return f"suggested: optim.lr {suggestion.lr:.2g} ({unit}): {suggestion.reason}\n\n  {command}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda signals: lr_find(words, signals), on_restart="The same command starts over")


if __name__ == "__main__":
    exit_after(main)

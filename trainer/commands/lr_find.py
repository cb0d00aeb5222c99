"""Find a learning rate: `regraft lr-find --config F [--from A --to B --steps N]` (or through torchrun).

A learning-rate range test (Smith 2017): the run's own model, groups and batches, each update at a higher rate than
the one before. Writes lr-find.png and lr-find.json into the run folder, and nothing else: it is no run.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    # Run by path, as main.py may be too.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from regraft.contract import MODEL, PRETRAIN
from trainer.cli import exit_after, run_cli
from trainer.commands.lr_range import rates, smoothed
from trainer.commands.range_test import RangeTest, run_range_test
from trainer.config.parse import parse
from trainer.config.resolve import ResolvedConfig, with_pretrained
from trainer.config.start import start
from trainer.distributed.context import DistributedContext, shut_down
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.report.lr_range import draw_range, range_table
from trainer.run.atomic import write_text_atomically

NAME = "lr-find"
STEPS = 100
_SPAN = 1e4
_FEWEST = 10


def lr_find(argv: Sequence[str], signals: StopSignals) -> RangeTest:
    """Run the range test that the command line asks for, write its files and print the suggestion.

    Raises:
        UserError: an error of the config, of the range, or of the number of steps.
        Stopped: it was asked to stop; nothing was written.

    """
    own, rest = _parser().parse_known_args(argv)
    parsed = parse(rest)
    lowest = parsed.optim.lr / _SPAN if own.lowest is None else own.lowest
    highest = parsed.optim.lr * _SPAN if own.highest is None else own.highest
    if not 0 < lowest < highest < float("inf"):
        raise UserError(
            f"--from {lowest:g}, --to {highest:g}: expected two learning rates, the first above 0 and below the second"
        )
    if own.steps < _FEWEST:
        raise UserError(f"--steps {own.steps}: expected {_FEWEST} or more")
    if parsed.debug:
        raise UserError("--debug is a command of its own: leave it out here")
    config, ctx, console = start(parsed)
    config = with_pretrained_weights(config)
    result = run_range_test(config, ctx, console, signals, rates(lowest, highest, own.steps))
    folder = Path(config.run.dir)
    ctx.main_process_first(lambda: _write(folder, result, config, ctx) if ctx.is_main_process else None)
    console.print(
        range_table(
            result.rates,
            result.losses,
            result.suggestion,
            configured=config.optim.lr,
            diverged=result.diverged,
        )
    )
    console.print(_conclusion(result, config, rest))
    console.print(f"{folder / NAME}.png, {folder / NAME}.json")
    shut_down()
    return result


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


def with_pretrained_weights(config: ResolvedConfig) -> ResolvedConfig:
    """Return the config with the weights that its fine-tuning starts from: those of a pretraining phase done before.

    Raises:
        UserError: the config has such a phase, and it was not run yet.

    """
    if not config.pretrain.root:
        return config
    model = Path(config.run.dir) / PRETRAIN / MODEL
    if not model.is_file():
        raise UserError(
            f"this run pretrains a model first, and {model} does not exist yet: train it (regraft train with the same "
            "options), or name the weights to start from: --pretrain.root null --model.weights FILE"
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
        "precision": ctx.precision,
        "processes": ctx.world_size,
        "diverged": result.diverged,
        "lr": list(result.rates),
        "loss": list(result.losses),
        "smoothed": smoothed(result.losses),
    }
    of = "the batch's summed loss" if config.optim.loss_reduction == "sum" else "the mean loss"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{NAME}.json", json.dumps(content, indent=1) + "\n")
        draw_range(
            result.rates,
            result.losses,
            result.suggestion,
            folder / f"{NAME}.png",
            title=f"{config.model.name}, {config.optim.name}, batches of {config.train.batch_size}; rates for {of}",
        )
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from None


def _conclusion(result: RangeTest, config: ResolvedConfig, options: Sequence[str]) -> str:
    suggestion = result.suggestion
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
    return run_cli(lambda signals: lr_find(words, signals), on_restart="The same command starts anew")


if __name__ == "__main__":
    exit_after(main)

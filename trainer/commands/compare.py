"""Compare strategies: `regraft compare --config F --strategies d2l,lp-ft --seeds 3` (or through torchrun).

Each strategy is run with each seed on the same data and budget, in RUN/STRATEGY/seed-K. A run that is finished is not
run again. The result is a table, and compare.md, compare.json and compare.png in RUN.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

if not __package__:
    # Run by path, as main.py may be too.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console

from regraft.contract import METRICS, MODEL
from trainer.cli import exit_after, run_cli
from trainer.commands.variants import PRETRAINED, folder_name, plan, variants
from trainer.config.build_data import dataset_summary, load_run_data
from trainer.config.parse import dump
from trainer.config.preflight import preflight
from trainer.config.resolve import ResolvedConfig, pretrain_config, resolve, with_pretrained
from trainer.config.schema import Config
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.pipeline import run, start
from trainer.report.comparison import (
    Summary,
    Trial,
    draw_comparison,
    markdown,
    notes,
    summarize,
    table,
    trial_of,
)
from trainer.report.metrics import parse_rows
from trainer.run.atomic import write_text_atomically
from trainer.run.folder import check_resumable, saved_precision
from trainer.run.versions import versions
from trainer.transfer.wise_ft import read_test_accuracy

NAME = "compare"
_MOST_SEEDS = 100


def compare(argv: Sequence[str], signals: StopSignals) -> tuple[Summary, ...] | None:
    """Run the comparison that the command line asks for; return it on rank 0, None on other ranks.

    Raises:
        UserError: something that the user can fix. A run that fails with one is a row of the table, unless all fail.
        Stopped: a run was asked to stop, and its state is saved.

    """
    own, rest = _parser().parse_known_args(argv)
    if not 1 <= own.seeds <= _MOST_SEEDS:
        raise UserError(f"--seeds {own.seeds}: expected 1 to {_MOST_SEEDS}")
    plain, configs, messages = plan(rest, variants(own.strategies))
    base, ctx, console = start(next(iter(configs.values())))
    folder = Path(base.run.dir)
    data = load_run_data(base, ctx, console)  # an error here would be every run's
    for message in messages:
        console.print(message)
    for text, config in configs.items():
        try:
            preflight(resolve(config), data, ctx)
        except UserError as error:
            raise UserError(f"strategy {text}: {error}") from None
    configs = _with_pretraining(configs, plain, folder, console, signals)
    seeds = [base.run.seed + k for k in range(own.seeds)]
    todo = {
        (text, seed): _run_config(configs[text], text, seed, folder) for seed in seeds for text in configs
    }
    _, ctx, _ = start(base)  # pretraining has left the process group
    ctx.main_process_first(lambda: _check_folders(todo, ctx) if ctx.is_main_process else None)
    trials, failures = _run_all(todo, console, signals, is_main_process=ctx.is_main_process)
    if not ctx.is_main_process:
        return None
    summaries = summarize(trials, failures)
    seeds_text = f"{own.seeds} seed{'s' * (own.seeds > 1)} from {base.run.seed}"
    title = (
        f"{base.model.name}, {base.train.epochs} epochs in batches of {base.train.batch_size}, {seeds_text}"
    )
    facts = [*dataset_summary(data.prepared).split("\n"), title, *ctx.notes, _versions()]
    command = shlex.join(["regraft", NAME, *argv])
    _write(folder, summaries, command=command, facts=facts, title=title)
    console.rule("comparison", align="left")
    console.print(table(summaries))
    console.print("\n".join(notes(summaries)))
    console.print(", ".join(str(folder / f"{NAME}.{kind}") for kind in ("md", "png", "json")))
    return summaries


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _run_config(config: Config, text: str, seed: int, folder: Path) -> ResolvedConfig:
    run_dir = str(folder / folder_name(text) / f"seed-{seed}")
    return resolve(replace(config, run=replace(config.run, seed=seed, dir=run_dir)))


def _run_all(
    todo: dict[tuple[str, int], ResolvedConfig],
    console: Console,
    signals: StopSignals,
    *,
    is_main_process: bool,
) -> tuple[dict[str, list[Trial]], dict[str, dict[int, str]]]:
    """Return the trials of each strategy, and the errors of its runs that failed, by seed.

    Raises:
        UserError: all runs have failed.

    """
    trials: dict[str, list[Trial]] = {text: [] for text, _ in todo}
    failures: dict[str, dict[int, str]] = {text: {} for text, _ in todo}
    for number, ((text, seed), config) in enumerate(todo.items(), start=1):
        console.rule(f"{text}, seed {seed} ({number} of {len(todo)})", align="left")
        try:
            trial = _run_trial(config, signals, is_main_process=is_main_process)
        except UserError as error:
            if (
                type(error) is not UserError
            ):  # one process alone has met it: the others are not at the next run
                raise
            failures[text][seed] = str(error)
            console.print(f"failed: {error}")
        else:
            if trial is not None:
                trials[text].append(trial)
    if len(todo) == sum(map(len, failures.values())):
        first = next(iter(failures[next(iter(todo))[0]].values()))
        raise UserError(f"all {len(todo)} runs have failed; the first: {first}")
    return trials, failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft compare",
        allow_abbrev=False,
        description="Run strategies under one budget, with several seeds; the same command goes on where it stopped.",
        epilog="All other options are those of trainer/main.py: --config FILE, --section.key VALUE. They are common "
        "to all; what a strategy sets wins over them here, and what stands behind its @ over that.",
    )
    parser.add_argument(
        "--strategies",
        required=True,
        metavar="NAME[@key=value...],...",
        help="what is compared, as in d2l@optim.lr=5e-6,lp-ft,from-scratch; the first is what the others are "
        "measured by",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="runs of each, with run.seed, run.seed + 1, ... (default: %(default)s)",
    )
    return parser


def _with_pretraining(
    configs: dict[str, Config], plain: Config, folder: Path, console: Console, signals: StopSignals
) -> dict[str, Config]:
    """Run the pretraining phase once for all strategies that start from it, if the config has one.

    `plain` is the config without a strategy: no strategy influences the pretraining.
    """
    if not any(config.pretrain.root for config in configs.values()):
        return configs
    console.rule("pretraining", align="left")
    config = pretrain_config(resolve(plain))
    run(replace(config, run=replace(config.run, dir=str(folder / PRETRAINED))), signals)
    file = folder / PRETRAINED / MODEL
    return {
        text: with_pretrained(config, file) if config.pretrain.root else config
        for text, config in configs.items()
    }


def _check_folders(todo: dict[tuple[str, int], ResolvedConfig], ctx: DistributedContext) -> None:
    """Raise a UserError, before the long work, for a folder that holds a run of other options."""
    for config in todo.values():
        folder = Path(config.run.dir)
        precision = saved_precision(folder) or ctx.precision
        resumed = dump(replace(config, train=replace(config.train, precision=precision)))
        check_resumable(folder, resumed, resume=config.run.resume)


def _run_trial(config: ResolvedConfig, signals: StopSignals, *, is_main_process: bool) -> Trial | None:
    """Run, or find the run finished, and return its result; None on ranks that do not have its metrics."""
    result = run(config, signals)
    if result is None or not is_main_process:
        return None
    path = result.folder / METRICS
    rows = parse_rows(path.read_text(encoding="utf-8"), str(path))
    trial = trial_of(rows, seed=config.run.seed, selection=result.val_split)
    if (
        result.alpha < 1
    ):  # the rows are of the fine-tuned weights, the model file of those that WiSE-FT selected
        trial = replace(trial, accuracy=read_test_accuracy(result.folder))
    return trial


def _write(
    folder: Path, summaries: Sequence[Summary], *, command: str, facts: Sequence[str], title: str
) -> None:
    content = {"command": command, "facts": list(facts), "strategies": [asdict(s) for s in summaries]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{NAME}.md", markdown(summaries, command=command, facts=facts))
        write_text_atomically(
            folder / f"{NAME}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        draw_comparison(summaries, folder / f"{NAME}.png", title=title)
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be written to ({error.strerror}). Make room: the runs are finished, and the "
            "same command writes their comparison"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(
        lambda signals: compare(words, signals),
        on_restart="The same command (without --run.resume never) resumes the comparison from there",
    )


if __name__ == "__main__":
    exit_after(main)

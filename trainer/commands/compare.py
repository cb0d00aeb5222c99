"""Compare strategies: `regraft compare --config FILE --strategies d2l,lp-ft --seeds 3`, or through torchrun.

Each strategy runs with each seed on the same data and budget, in RUN/STRATEGY/seed-K. A finished run is not repeated.
The results are a table, and compare.md, compare.json and compare.png in RUN.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from trainer.cli import exit_after, run_cli
from trainer.commands.variants import PRETRAINED, folder_name, plan, variants
from trainer.config.build_data import dataset_summary, load_run_data
from trainer.config.execution import Workload, with_one_execution
from trainer.config.parse import split_command
from trainer.config.preflight import check_run_folder, preflight
from trainer.config.resolve import ResolvedConfig, pretrain_config, resolve, with_pretrained
from trainer.config.schema import Config
from trainer.config.start import create_parent_folder, start
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.pipeline import run
from trainer.report.comparison import Summary, Trial, notes, read_trial, summarize, table, write_comparison
from trainer.transfer.wise_ft import read_test_accuracy

NAME = "compare"
_MAX_SEEDS = 100


def compare(argv: Sequence[str], signals: StopSignals) -> tuple[Summary, ...] | None:
    """Run a comparison; return the summaries on rank 0 and None on other ranks.

    A run that fails with a UserError is a row of the table, unless all runs fail.

    Raises:
        UserError: something that the user can fix.
        Stopped: a run was asked to stop, and its state is saved.

    """
    own, rest = split_command(_parser(), argv)
    if sum(word.partition("=")[0] == "--strategies" for word in argv) > 1:
        raise UserError("--strategies is given more than once: separate the strategies by commas")
    if not 1 <= own.seeds <= _MAX_SEEDS:
        raise UserError(f"--seeds {own.seeds}: expected 1 to {_MAX_SEEDS}")
    plain, configs, messages = plan(rest, variants(own.strategies))
    base, ctx, console = start(next(iter(configs.values())))
    folder = Path(base.run.dir)
    data = load_run_data(base, ctx, console)  # an error here would end every run
    for message in messages:
        console.print(message)
    for text, config in configs.items():
        try:
            preflight(resolve(config), data, ctx)
        except UserError as error:
            raise UserError(f"strategy {text}: {error}") from None
    create_parent_folder(folder, ctx)
    configs = _with_pretraining(configs, plain, folder, console, signals)
    seeds = [base.run.seed + k for k in range(own.seeds)]
    runs = {(text, seed): _run_config(configs[text], text, seed, folder) for seed in seeds for text in configs}
    _, ctx, console = start(base)  # pretraining may have left the process group
    index = data.index
    workload = Workload(
        config=base,
        examples=index.train,
        classes=index.classes,
        weights=base.model.weights,
        evaluated=index.num_evaluated,
    )
    runs, execution = with_one_execution(runs, workload, ctx, console)

    def check_folders() -> None:
        for config in runs.values() if ctx.is_main_process else ():
            check_run_folder(config)

    ctx.main_process_first(check_folders)
    trials, failures = _run_all(runs, console, signals, is_main_process=ctx.is_main_process)
    if not ctx.is_main_process:
        return None
    summaries = summarize(trials, failures)
    seeds_text = f"{own.seeds} seed{'s' * (own.seeds > 1)} from {base.run.seed}"
    title = f"{base.model.name}, {base.train.epochs} epochs in batches of {base.train.batch_size}, {seeds_text}"
    facts = [*dataset_summary(data.prepared).split("\n"), title, *ctx.notes, f"precision {execution}"]
    command = shlex.join(["regraft", NAME, *argv])
    write_comparison(folder / NAME, summaries, command=command, facts=facts, title=title, warn=console.print)
    console.rule("comparison", align="left")
    console.print(table(summaries))
    console.print("\n".join(notes(summaries)))
    console.print(", ".join(str(folder / f"{NAME}.{kind}") for kind in ("md", "png", "json")))
    return summaries


def _run_config(config: Config, text: str, seed: int, folder: Path) -> ResolvedConfig:
    run_dir = str(folder / folder_name(text) / f"seed-{seed}")
    return resolve(replace(config, run=replace(config.run, seed=seed, dir=run_dir)))


def _run_all(
    runs: dict[tuple[str, int], ResolvedConfig], console: Console, signals: StopSignals, *, is_main_process: bool
) -> tuple[dict[str, list[Trial]], dict[str, dict[int, str]]]:
    """Return the trials of each strategy, and the error messages of its failed runs by seed.

    Raises:
        UserError: all runs have failed.

    """
    trials: dict[str, list[Trial]] = {text: [] for text, _ in runs}
    failures: dict[str, dict[int, str]] = {text: {} for text, _ in runs}
    for number, ((text, seed), config) in enumerate(runs.items(), start=1):
        console.rule(f"{text}, seed {seed} ({number} of {len(runs)})", align="left")
        try:
            trial = _run_trial(config, signals, is_main_process=is_main_process)
        except UserError as error:
            # A subclass is raised on one process only: the others do not start the next run.
            if type(error) is not UserError:
                raise
            failures[text][seed] = str(error)
            console.print(f"failed: {error}")
        else:
            if trial is not None:
                trials[text].append(trial)
    if len(runs) == sum(map(len, failures.values())):
        first = next(iter(failures[next(iter(runs))[0]].values()))
        raise UserError(f"all {len(runs)} runs have failed; the first: {first}")
    return trials, failures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft compare",
        usage="regraft compare [FOLDER] --strategies NAME[@KEY=VALUE...],... [--seeds N]\n"
        "                       [--config FILE] [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description="Compare strategies with several seeds under one budget; the same command resumes the comparison.",
        epilog="All other options are those of regraft train: --config FILE, --SECTION.KEY VALUE. They apply to all "
        "strategies. A strategy wins over them, and its options after @ win over the strategy.",
    )
    parser.add_argument(
        "--strategies",
        required=True,
        metavar="NAME[@key=value...],...",
        help="strategies to compare, such as d2l@optim.lr=5e-6,lp-ft,from-scratch; the first one is the reference",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of runs of each strategy, with run.seed, run.seed + 1, ... (default: %(default)s)",
    )
    return parser


def _with_pretraining(
    configs: dict[str, Config], plain: Config, folder: Path, console: Console, signals: StopSignals
) -> dict[str, Config]:
    """Run the pretraining phase once for all strategies that use it.

    `plain` is the config without a strategy, so that no strategy influences the pretraining.
    """
    if not any(config.pretrain.root for config in configs.values()):
        return configs
    console.rule("pretraining", align="left")
    config = pretrain_config(resolve(plain))
    result = run(replace(config, run=replace(config.run, dir=str(folder / PRETRAINED))), signals)
    return {
        text: with_pretrained(config, result.model_file) if config.pretrain.root else config
        for text, config in configs.items()
    }


def _run_trial(config: ResolvedConfig, signals: StopSignals, *, is_main_process: bool) -> Trial | None:
    """Run, unless the run is finished, and return its result on rank 0 and None on other ranks."""
    result = run(config, signals)
    if not is_main_process:
        return None
    trial = read_trial(result.folder, seed=config.run.seed, selection=result.val_split, select_by=result.select_by)
    # The rows are of the fine-tuned weights, the model file is of those that WiSE-FT selected.
    if result.alpha < 1:
        trial = replace(trial, accuracy=read_test_accuracy(result.folder))
    return trial


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(
        lambda signals: compare(words, signals),
        on_restart="The same command (without --run.resume never) resumes the comparison",
    )


if __name__ == "__main__":
    exit_after(main)

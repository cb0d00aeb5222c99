"""Strategies compared: `python -m trainer.compare --config F --strategies note,lp-ft --seeds 3` (or through torchrun).

Each strategy is run with each seed under one budget, in RUN/STRATEGY/seed-K; what is finished is not run again. Ends
in a table, compare.md, compare.json and compare.png in RUN: the note's claim, tested on one's own data.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:
    # Run by path, as main.py may be too.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from trainer import runtime
from trainer.assemble import describe, load_examples
from trainer.config import Config, ScratchConfig
from trainer.errors import UserError
from trainer.files import write_text_atomically
from trainer.main import answer, leave_after
from trainer.parse import QUICKSTART, dump, parse
from trainer.preflight import preflight
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
from trainer.report.console import make_console
from trainer.report.metrics import parse_rows
from trainer.run_folder import METRICS, MODEL, examine, kept_precision
from trainer.runtime import Runtime
from trainer.signals import StopSignals
from trainer.stages import resolve, run, source_stage, with_weights
from trainer.strategies import path_of
from trainer.versions import versions
from trainer.wise import test_accuracy

NAME = "compare"
SOURCE = "source-model"
_MOST_SEEDS = 100
_COMMON = (
    "run", "debug", "source", "scratch", "data.root", "data.seed", "data.val_fraction", "data.test_fraction",
    "data.extensions", "data.on_unreadable", "transfer.strategy",
)  # fmt: skip
"""What a variant may not set: it would be measured by another yardstick."""


@dataclass(frozen=True)
class Variant:
    """A strategy, as named on the command line: NAME, or NAME@key=value@key=value."""

    text: str
    strategy: str
    options: tuple[str, ...]
    """Its own, as words of the command line."""

    @property
    def folder(self) -> str:
        """Return the text as the name of a folder."""
        return re.sub(r"[^\w.@=+-]", "_", self.text, flags=re.ASCII).lstrip(".") or "_"


def variants(text: str) -> tuple[Variant, ...]:
    """Return the strategies of a list like `note@optim.lr=5e-6,lp-ft`; commas and @ within brackets are values' own.

    Raises:
        UserError: one is empty, comes twice or sets what must be common to all.

    """
    found = [_variant(part.strip()) for part in _split(text, ",")]
    folders = [variant.folder for variant in found]
    twice = sorted({variant.text for variant in found if folders.count(variant.folder) > 1})
    if twice or SOURCE in folders:
        raise UserError(
            f"--strategies {text}: {' and '.join(twice) or SOURCE} would share a folder: expected each name once"
        )
    return tuple(found)


def _variant(text: str) -> Variant:
    strategy, *options = _split(text, "@")
    wrong = [option for option in options if "=" not in option]
    if not strategy or wrong:
        raise UserError(
            f"--strategies holds {text!r}: expected names, or NAME@key=value, as in note@optim.lr=5e-6,lp-ft"
        )
    for option in options:
        key = option.partition("=")[0].removesuffix("+")
        if any(key == common or key.startswith(f"{common}.") for common in _COMMON):
            raise UserError(
                f"--strategies {text}: {key} is common to all that are compared: give it as an option of its own, "
                f"--{key}"
            )
    return Variant(text, strategy, tuple(f"--{option}" for option in options))


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def plan(options: Sequence[str], chosen: Sequence[Variant]) -> tuple[Config, dict[str, Config], list[str]]:
    """Return the config without a strategy, text of the variant -> the config of its runs, and what is to be said.

    Here a strategy wins over the options of the command line, which are common to all as the file's are: from-scratch
    is from scratch though weights are named for the others. A variant's own options come last.

    Raises:
        UserError: what is wrong with one of them, or they are not to be compared.

    """
    if any(word.partition("=")[0] == "--transfer.strategy" for word in options):
        raise UserError("--transfer.strategy: compare takes the strategies by --strategies; leave it out")
    plain = parse([*options, "--transfer.strategy=null"])
    if plain.debug:
        raise UserError("--debug is a run of its own: leave it out here")
    if not any(word.partition("=")[0] in ("--config", "--data.root") for word in options):
        options = [f"--config={QUICKSTART}", *options]
    found: dict[str, Config] = {}
    said: list[str] = []
    for variant in chosen:
        try:
            layer = f"--config={path_of(variant.strategy)}"
            words = [*options, layer, f"--transfer.strategy={variant.strategy}", *variant.options]
            config = parse(words)
            resolve(config)
        except UserError as error:
            raise UserError(f"strategy {variant.text}: {error}") from None
        found[variant.text] = replace(config, scratch=ScratchConfig())
        said += _overruled(options, variant, plain, config)
    data = {text: _yardstick(config) for text, config in found.items()}
    one, *others = data
    for other in others:
        if data[other] != data[one]:
            raise UserError(
                f"strategies {one} and {other} have other data ({data[one]}, {data[other]}): a strategy that is "
                "compared may set nothing of that"
            )
    return plain, found, said


def _overruled(options: Sequence[str], variant: Variant, plain: Config, config: Config) -> list[str]:
    """Return a line for each option of the command line that a strategy sets otherwise."""
    own = {option.partition("=")[0] for option in variant.options}
    lines = []
    for option in dict.fromkeys(word.partition("=")[0] for word in options if word.startswith("--")):
        section, dot, key = option.removeprefix("--").removesuffix("+").partition(".")
        if dot and option not in own:
            asked, has = (getattr(getattr(c, section), key) for c in (plain, config))
            if asked != has:
                lines.append(
                    f"strategy {variant.text}: {section}.{key} is {has}, not {asked} as on the command line"
                )
    return lines


def _yardstick(config: Config) -> dict[str, object]:
    """Return what all runs must have in common."""
    data = config.data
    keys = ("root", "seed", "val_fraction", "test_fraction", "extensions", "on_unreadable")
    return {key: getattr(data, key) for key in keys}


def compare(argv: Sequence[str], signals: StopSignals) -> tuple[Summary, ...] | None:
    """Do what the command line asks for; returns the comparison, None on the processes that only take part.

    Raises:
        UserError: whatever the user can mend; a run that fails for one is a row of the table, unless all do.
        Stopped: a run was asked to stop, and has been saved.

    """
    own, rest = _parser().parse_known_args(argv)
    if not 1 <= own.seeds <= _MOST_SEEDS:
        raise UserError(f"--seeds {own.seeds}: expected 1 to {_MOST_SEEDS}")
    chosen = variants(own.strategies)
    plain, configs, said = plan(rest, chosen)
    base = resolve(next(iter(configs.values())))
    folder = Path(base.run.dir)

    machine = runtime.start(device=base.run.device, precision=base.train.precision, threads=base.run.threads)
    console = make_console(speaks=machine.is_main)
    prepared = load_examples(base.data, machine, console)  # an error here is all runs'
    data = describe(prepared)
    console.print("\n".join([data, *said]))
    for text, config in configs.items():
        try:
            preflight(resolve(config), prepared.index, machine)
        except UserError as error:
            raise UserError(f"strategy {text}: {error}") from None
    configs = _with_source_model(configs, plain, folder, console, signals)
    seeds = [base.run.seed + k for k in range(own.seeds)]
    todo = {
        (variant.text, seed): resolve(
            replace(
                configs[variant.text],
                run=replace(
                    configs[variant.text].run, seed=seed, dir=str(folder / variant.folder / f"seed-{seed}")
                ),
            )
        )
        for seed in seeds
        for variant in chosen
    }
    # The source model's run has left the group.
    machine = runtime.start(device=base.run.device, precision=base.train.precision, threads=base.run.threads)
    runtime.in_turn(machine.accelerator, lambda: _require_own(todo, machine) if machine.is_main else None)

    trials: dict[str, list[Trial]] = {variant.text: [] for variant in chosen}
    failures: dict[str, dict[int, str]] = {variant.text: {} for variant in chosen}
    for number, ((text, seed), config) in enumerate(todo.items(), start=1):
        console.rule(f"{text}, seed {seed} ({number} of {len(todo)})", align="left")
        try:
            trial = _trial(config, signals, is_main=machine.is_main)
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
        raise UserError(
            f"all {len(todo)} runs have failed; the first: {next(iter(failures[chosen[0].text].values()))}"
        )
    if not machine.is_main:
        return None
    summaries = summarize(trials, failures)
    seeds_text = f"{own.seeds} seed{'s' * (own.seeds > 1)} from {base.run.seed}"
    title = (
        f"{base.model.name}, {base.train.epochs} epochs in batches of {base.train.batch_size}, {seeds_text}"
    )
    facts = [
        *data.split("\n"),
        title,
        *machine.notes,
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    command = shlex.join(["regraft", NAME, *argv])
    _write(folder, summaries, command=command, facts=facts, title=title)
    console.rule("comparison", align="left")
    console.print(table(summaries))
    console.print("\n".join(notes(summaries)))
    console.print(", ".join(str(folder / f"{NAME}.{kind}") for kind in ("md", "png", "json")))
    return summaries


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
        help="what is compared, as in note@optim.lr=5e-6,lp-ft,from-scratch; the first is what the others are "
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


def _with_source_model(
    configs: dict[str, Config], plain: Config, folder: Path, console: Console, signals: StopSignals
) -> dict[str, Config]:
    """Train the source model once for all that start from it, where the config has such a stage.

    `plain` is the config without a strategy: none of them has a say in how the source is trained.
    """
    if not any(config.source.root for config in configs.values()):
        return configs
    console.rule("source model", align="left")
    stage = source_stage(resolve(plain))
    run(replace(stage, run=replace(stage.run, dir=str(folder / SOURCE))), signals)
    file = folder / SOURCE / MODEL
    return {
        text: with_weights(config, file) if config.source.root else config for text, config in configs.items()
    }


def _require_own(todo: dict[tuple[str, int], Config], machine: Runtime) -> None:
    """Raise a UserError, before the long work, for a folder that holds a run of other options."""
    for config in todo.values():
        folder = Path(config.run.dir)
        precision = kept_precision(folder) or machine.precision
        examine(
            folder,
            dump(replace(config, train=replace(config.train, precision=precision))),
            resume=config.run.resume,
        )


def _trial(config: Config, signals: StopSignals, *, is_main: bool) -> Trial | None:
    """Run, or find the run finished, and return what it came to; None where another process has its figures."""
    outcome = run(config, signals)
    if outcome is None or not is_main:
        return None
    path = outcome.folder / METRICS
    rows = parse_rows(path.read_text(encoding="utf-8"), str(path))
    trial = trial_of(rows, seed=config.run.seed, selection=outcome.selection)
    if outcome.alpha < 1:  # the model file is another point of the line than the one that the rows are of
        trial = replace(trial, accuracy=test_accuracy(outcome.folder))
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
    return answer(
        lambda signals: compare(words, signals),
        goes_on="The same command (without --run.resume never) goes on with the comparison from there",
    )


if __name__ == "__main__":
    leave_after(main)

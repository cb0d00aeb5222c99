"""The speed bars: each asked ratio beside the measured one, from interleaved runs with an A/A control.

    python -m benchmarks bars --only d2l timm --markdown benchmarks/RESULTS.md
    python -m benchmarks bars --data-root HYMENOPTERA --weights SQUEEZENET.safetensors     # all scenarios

In each round every program runs once in a fresh process, in a random order, with the round's number as its seed. A
program that several bars need runs once per round for all of them. The table is printed, and written to the file, after
every round: a run that is cut short has recorded its complete rounds.
"""

import argparse
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.images import write_photographs
from benchmarks.measure import (
    Program,
    Result,
    cores,
    installed_peers,
    interleaved,
    mean_interval,
    median_interval,
    processor,
    versions,
)
from benchmarks.scenarios import SCENARIOS, Bar, Setting

CONTROL = " (control)"
NO_RUN = "No run is recorded yet.\n"
"""Line of RESULTS.md that the first recorded run replaces."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument(
        "--peers", nargs="+", metavar="PROGRAM", help="programs of equal_arithmetic; default: installed"
    )
    parser.add_argument("--pairs", type=int, default=5, help="number of rounds")
    parser.add_argument("--data-root", type=Path, help="image folder with train/ and val/; default: drawn photographs")
    parser.add_argument("--images", type=int, default=256, help="number of drawn training images")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of squeezenet1_1, which hymenoptera needs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--markdown", type=Path, help="file to which the results are appended as a section")


def main(arguments: argparse.Namespace) -> int:
    """Measure the bars; return 1 if one is not met, else 0."""
    bars = selected_bars(arguments)
    runs = programs(bars)
    heading = f"## {time.strftime('%Y-%m-%d')}: {processor()}\n\n{versions()}. Load average at the start: {load()}."
    section = f"{heading}\n\n    {command_line(sys.argv[1:])}\n"
    earlier = ""
    if arguments.markdown and arguments.markdown.exists():
        earlier = arguments.markdown.read_text(encoding="utf-8").replace(NO_RUN, "").rstrip() + "\n\n"
    print(section, flush=True)

    def report(results: Mapping[str, list[Result]]) -> None:
        text = table(bars, results)
        print(f"\n{text}\n", flush=True)
        if arguments.markdown:
            arguments.markdown.write_text(f"{earlier}{section}\n{text}\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or write_photographs(Path(folder), train=arguments.images)
        results = interleaved(runs, data, rounds=arguments.pairs, after_round=report)
    return int(not all(is_met(bar, results) for bar in bars))


def command_line(words: Sequence[str]) -> str:
    """Return the command without the folders of its files, which mean nothing on another machine."""
    names = [Path(word).name if os.sep in word else word for word in words]
    return shlex.join(["python", "-m", "benchmarks", *names])


def selected_bars(arguments: argparse.Namespace) -> list[Bar]:
    """Return the bars of the selected scenarios that can be measured here."""
    setting = Setting(
        threads=arguments.threads,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        weights=arguments.weights and arguments.weights.absolute(),
        peers=tuple(name for name in installed_peers() if name in (arguments.peers or [name])),
    )
    names = list(arguments.only or SCENARIOS)
    if "hymenoptera" in names and not (arguments.weights and arguments.data_root):
        message = "hymenoptera needs --data-root (the photographs of ants and bees) and --weights (squeezenet1_1)"
        if arguments.only:
            raise SystemExit(message)
        names.remove("hymenoptera")
        print(f"not measured: {message}")
    bars = [bar for name in names for bar in SCENARIOS[name](setting)]
    known = {"regraft", "resident_batch", *installed_peers()}
    for bar in bars:
        if bar.other.name not in known:
            print(f"not measured: {bar.scenario}, because {bar.other.name} is not installed")
    return [bar for bar in bars if bar.other.name in known]


def programs(bars: Sequence[Bar]) -> dict[str, Program]:
    """Return label -> program of what the bars compare, each once, with a control of each of ours."""
    ours = list(dict.fromkeys(bar.ours for bar in bars))
    distinct = list(dict.fromkeys([*ours, *(bar.other for bar in bars)]))
    return {key(program): program for program in distinct} | {key(program) + CONTROL: program for program in ours}


def key(program: Program) -> str:
    """Return the label of a program, which tells it from all others of the bars."""
    layout = "" if program.layout == "default" else f", {program.layout}"
    return f"{program}, {program.epochs} epochs{layout}"


def is_met(bar: Bar, results: Mapping[str, list[Result]]) -> bool:
    """Return whether the median ratio is as high as asked, and the accuracy not lower than that of the other."""
    ours, other = results[key(bar.ours)], results[key(bar.other)]
    differences = [a.accuracy - b.accuracy for a, b in zip(ours, other, strict=True)]
    is_less_accurate = not math.isnan(differences[0]) and mean_interval(differences)[2] < 0
    return median_interval(bar.ratios(ours, other))[0] >= bar.asked and not is_less_accurate


def table(bars: Sequence[Bar], results: Mapping[str, list[Result]]) -> str:
    """Return the measured ratios as a Markdown table; intervals are 95 % by the bootstrap."""
    rows = [
        "| scenario | ours / other | metric | asked | median | interval | A/A control | accuracy (ours; other) | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for bar in bars:
        ours, other = results[key(bar.ours)], results[key(bar.other)]
        median, low, high = median_interval(bar.ratios(ours, other))
        control = median_interval(bar.ratios(ours, results[key(bar.ours) + CONTROL]))
        rows.append(
            f"| {bar.scenario} | {bar.ours} / {bar.other} | {bar.metric} | {bar.asked} | **{median:.2f}** "
            f"| {low:.2f} to {high:.2f} | {control[0]:.2f} ({control[1]:.2f} to {control[2]:.2f}) "
            f"| {accuracy(ours)}; {accuracy(other)} | {'yes' if is_met(bar, results) else 'no'} |"
        )
    return "\n".join(rows)


def accuracy(results: Sequence[Result]) -> str:
    """Return the mean accuracy with its interval; of the model alone there is none."""
    if math.isnan(results[0].accuracy):
        return "-"
    mean, low, high = mean_interval([result.accuracy for result in results])
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def load() -> str:
    """Return the load average of the last minute: above a few tenths, other work disturbs the measurement."""
    return f"{os.getloadavg()[0]:.1f}"

"""`regraft doctor`: whether this machine, or these nodes, will carry a run; what is wrong, and what to do about it.

A check that itself fails is a finding like any other, and the rest go on. Nothing is written but to a folder of its
own beside the run folder, which is removed.
"""

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch import contract, machine
from launch.doctor.checks import Patient, examine
from launch.doctor.finding import Finding, Level
from launch.doctor.run_folder import existing
from launch.local.command import processes_and_threads, split_options

_ENDED = (signal.SIGTERM, signal.SIGHUP)


def main(words: Sequence[str]) -> int:
    """Examine what the command line asks for, print it, and return the exit code: 1 where anything is red."""
    own, options = split_options(words, ("--nodes", "--nproc"))
    flags = [word for word in options if word in ("-h", "--help", "--json")]
    arguments = doctor_parser().parse_args([*own, *flags])
    options = [word for word in options if word not in flags]
    run = contract.run_folder(options)
    gpus, cores = machine.gpus(os.environ), machine.cores()
    processes, _ = processes_and_threads(arguments.nproc, gpus=gpus, cores=cores)
    patient = Patient(
        run=run,
        processes=processes,
        nodes=arguments.nodes or _nodes_of_job(os.environ),
        options=tuple(options),
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        with _signals_as_interrupts(), _scratch(run) as patient.scratch:
            findings = list(examine(patient, say=say))
    except KeyboardInterrupt:
        say("interrupted: nothing was left behind")
        return contract.INTERRUPTED
    if arguments.json:
        print(
            json.dumps({"level": worst(findings), "findings": [one.fields() for one in findings]}, indent=1)
        )
    else:
        show(findings)
    return 1 if worst(findings) == "red" else 0


def _nodes_of_job(environment: Mapping[str, str]) -> int:
    """Return the nodes of the Slurm job that this runs in; 1 outside of any."""
    count = environment.get("SLURM_JOB_NUM_NODES", "1")
    return int(count) if "SLURM_JOB_ID" in environment and count.isdigit() else 1


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level there is."""
    levels = {one.level for one in findings}
    return "red" if "red" in levels else "yellow" if "yellow" in levels else "green"


def show(findings: Sequence[Finding]) -> None:
    """Print findings: a table on a terminal, plain lines where there is none."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415 (none of it is on the way of a training)
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table("", "check", "what was found", box=SIMPLE_HEAD, pad_edge=False)
        for one in findings:
            what = Text(_plain(one.what))
            if one.remedy is not None:
                what.append(f"\ntry: {_plain(one.remedy)}", style="bold")
            table.add_row(Text(one.level, style=one.level), Text(one.name), what)
        Console(highlight=False).print(table)
    else:
        for one in findings:
            print(f"{one.level:<7}{one.name}: {_plain(one.what)}")
            if one.remedy is not None:
                print(f"       try: {_plain(one.remedy)}")
    counts = {level: sum(one.level == level for one in findings) for level in ("green", "yellow", "red")}
    print(", ".join(f"{count} {level}" for level, count in counts.items() if count))


def _plain(text: str) -> str:
    """Return text on one line: what it quotes may hold anything."""
    return "".join(c if c.isprintable() else "; " if c == "\n" else "?" for c in text)


@contextmanager
def _scratch(run: Path) -> Iterator[Path | None]:
    """Make a folder for the doctor alone where the run folder will lie, for a block; None where that is refused."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".regraft-doctor-{secrets.token_hex(2)}-", dir=existing(run)))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let what ends a program be met as Ctrl-C is, for a block: with all put in order."""

    def interrupt(_number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, interrupt) for number in _ENDED}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def doctor_parser() -> ArgumentParser:
    """Return the parser of `doctor`, for all but the trainer's options."""
    parser = ArgumentParser(
        prog="regraft doctor",
        allow_abbrev=False,
        description="Whether this machine (or these nodes) will carry a run: versions, GPUs, room, limits, pace. "
        "All other options are the trainer's (--config FILE, --section.key VALUE): what they ask for is measured, "
        "without them what `regraft train` does without any. Exit code 1 where something is red.",
    )
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="examine N nodes, through srun (default: the job's)"
    )
    parser.add_argument(
        "--nproc",
        type=lambda text: None if text == "auto" else _positive(text),
        metavar="N|auto",
        help="processes of each node (default: auto, as `train`)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return number

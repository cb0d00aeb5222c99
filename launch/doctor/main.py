"""`regraft doctor`: run all checks and print what is wrong, and what to do about it.

The doctor writes only to a folder of its own beside the run folder, and removes it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launch import machine
from launch.doctor import host, measured, nodes, software
from launch.doctor.finding import DoctorContext, Finding
from launch.options import positive_int, process_count, split_options
from launch.trainer_options import run_folder

CHECKS: tuple[tuple[str, Callable[[DoctorContext], list[Finding]]], ...] = (
    ("versions", software.check_versions),
    ("variables", host.check_variables),
    ("ports", host.check_ports),
    ("run folder", host.check_run_folder),
    ("decoding and training speed (about 10 s)", measured.measure),
    ("GPUs", software.check_gpus),
    ("memory", host.check_memory),
    ("disk", host.check_disk),
    ("shared memory", host.check_shared_memory),
    (
        "all-reduce between processes (about 10 s)",
        lambda context: nodes.check_nodes(context) if context.nodes > 1 else measured.all_reduce(context),
    ),
)


def main(argv: Sequence[str]) -> int:
    """Run the checks, print the findings, and return the exit code: 1 if any finding is red."""
    own, options = split_options(argv, ("--nodes", "--nproc"))
    flags = [word for word in options if word in ("-h", "--help", "--json")]
    arguments = make_parser().parse_args([*own, *flags])
    options = [word for word in options if word not in flags]
    gpus = machine.gpus(os.environ)
    processes, _ = machine.processes_and_threads(arguments.nproc, gpus=gpus, cores=machine.usable_cores(gpus))
    context = DoctorContext(
        run=run_folder(options),
        processes=processes,
        nodes=arguments.nodes or int(os.environ.get("SLURM_JOB_NUM_NODES", "1")),
        options=tuple(options),
    )
    try:
        with suppress(OSError):  # the check of the run folder reports it
            parent = host.nearest_existing(context.run)
            context.scratch = Path(tempfile.mkdtemp(prefix=".regraft-doctor-", dir=parent))
        findings = list(run_checks(context))
    finally:
        if context.scratch is not None:
            shutil.rmtree(context.scratch, ignore_errors=True)
    counts = {level: sum(one.level == level for one in findings) for level in ("green", "yellow", "red")}
    if arguments.json:
        level = next((level for level in ("red", "yellow") if counts[level]), "green")
        print(json.dumps({"level": level, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{finding.level:<7}{finding.check}: {_one_line(finding.message)}")
            if finding.remedy is not None:
                print(f"       try: {_one_line(finding.remedy)}")
        print(", ".join(f"{count} {level}" for level, count in counts.items() if count))
    return 1 if counts["red"] else 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `doctor`, without the trainer's options."""
    parser = argparse.ArgumentParser(
        prog="regraft doctor",
        usage="regraft doctor [--nodes N] [--nproc N] [--json] [--config FILE]\n"
        "                      [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description="Check whether this machine, or several nodes, can run a training: versions, GPUs, memory, disk, "
        "network and speed. Exit code 1: a run would fail.",
        epilog="The trainer's options say which run to check; without them, it is the quickstart.",
    )
    parser.add_argument(
        "--nodes",
        type=positive_int,
        metavar="N",
        help="check N nodes through srun (default: the nodes of this Slurm job, else 1)",
    )
    parser.add_argument(
        "--nproc",
        type=process_count,
        metavar="N|auto",
        help="processes per node; auto: one per GPU, or one per 8 cores without GPUs (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def run_checks(context: DoctorContext) -> Iterator[Finding]:
    """Run all checks and yield their findings; a check that raises an exception is a finding, too."""
    for name, check in CHECKS:
        print(f"checking {name} ...", file=sys.stderr, flush=True)
        try:
            yield from check(context)
        except Exception as error:  # noqa: BLE001 (the other checks must still run)
            message = f"this check failed itself: {type(error).__name__}: {error}"
            remedy = "the other checks are valid; please report this"
            yield Finding(name.partition(" (")[0], "yellow", message, remedy)


def _one_line(text: str) -> str:
    """Replace line breaks and unprintable characters, which error messages may contain."""
    return "".join(c if c.isprintable() else "; " if c == "\n" else "?" for c in text)

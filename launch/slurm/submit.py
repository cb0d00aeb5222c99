"""`regraft submit` and `regraft render`: check a run, render its batch script, and submit it to Slurm."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launch.errors import LaunchError
from launch.local.process import run_trainer_program
from launch.options import split_options
from launch.slurm.allocation import to_folder_name
from launch.slurm.sbatch import SIGNAL_SECONDS, JobSpec, render, sbatch_options
from launch.slurm.settings import OPTION_NAMES, add_arguments, make_settings, read_sweep
from launch.slurm.site import DEFAULT_FILE, SITE_VARIABLE, load_site
from launch.trainer_options import absolute_path, option_value, trainer_folder
from regraft.contract import JOB_ID, LOGS, create_output_folder

SCRIPT, SWEEP = "job.sh", "sweep.txt"
_NUMBERS = {
    "nodes": "number of nodes (default: 1)",
    "gpus-per-node": "GPUs per node (default: none requested)",
    "cpus-per-task": "CPU cores per node (default: Slurm's, often 1)",
    "signal-seconds": f"tell the job to save N seconds before the time limit (default: {SIGNAL_SECONDS})",
}
_TEXTS = {
    "time": ("T", "time limit: minutes, 4:00:00 or 2-00:00:00 (default: the partition's)"),
    "mem": ("M", "memory per node, such as 64G (default: Slurm's)"),
    "partition": ("NAME", "Slurm partition (default: Slurm's)"),
    "account": ("NAME", "account to charge (default: Slurm's)"),
    "qos": ("NAME", "Slurm's quality of service (default: Slurm's)"),
    "job-name": ("NAME", "name in the queue (default: regraft)"),
    "array": ("N-M", "task indices of a job array: 0-9, or 0-9%%2 to run two at a time; see --sweep"),
}
_OVERRIDING_VARIABLES = {
    "--job-name": "SBATCH_JOB_NAME",
    "--gpus-per-node": "SBATCH_GPUS_PER_NODE",
    "--mem": "SBATCH_MEM_PER_NODE",
    "--time": "SBATCH_TIMELIMIT",
    "--partition": "SBATCH_PARTITION",
    "--account": "SBATCH_ACCOUNT",
    "--qos": "SBATCH_QOS",
    "--array": "SBATCH_ARRAY_INX",
    "--signal": "SBATCH_SIGNAL",
    "--requeue": "SBATCH_NO_REQUEUE",
    "--open-mode": "SBATCH_OPEN_MODE",
}
"""Environment variables that sbatch prefers to the options in a script."""


def render_job(argv: Sequence[str]) -> int:
    """Print the batch script for these arguments."""
    spec, _ = _parse("render", argv)
    print(render(spec), end="")
    return 0


def submit_job(argv: Sequence[str]) -> int:
    """Check the run, download what it needs, submit it, and return the exit code.

    Raises:
        LaunchError: a job option is invalid, the run folder is not writable, or Slurm refuses the job.

    """
    spec, arguments = _parse("submit", argv)
    sweep = spec.settings.sweep_file
    if not arguments.no_fetch:
        code = _fetch([[*spec.options, *line] for line in (read_sweep(sweep) if sweep else [[]])])
        if code != 0:
            return code
    default = f"runs/{to_folder_name(spec.job_name)}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    run = absolute_path("run.dir", option_value(spec.options, "run", "dir") or default)
    is_new_folder = not run.exists()
    spec = replace(spec, options=(*spec.options, f"--run.dir={run}"))
    job = None
    try:
        create_output_folder(run)
        (run / LOGS).mkdir(parents=True, exist_ok=True)  # Slurm does not create it for the job's output
        if sweep:
            # A copy, since the file may change while the job waits; it may already be the copy of an earlier job.
            content = sweep.read_bytes()
            (run / SWEEP).write_bytes(content)
            spec = replace(spec, settings=replace(spec.settings, sweep=str(run / SWEEP)))
        script = render(spec)
        _check_script(script)
        (run / SCRIPT).write_text(script, encoding="utf-8", errors="surrogateescape")
        try:
            job = _submit(spec, run, os.environ)
            (run / JOB_ID).write_text(f"{job}\n", encoding="ascii")
            _print_job(spec, run, job)
        except KeyboardInterrupt as interrupt:
            submitted = f"job {job} was submitted" if job else "`squeue --me` shows whether the job was submitted"
            interrupt.add_note(submitted)
            raise
    except OSError as error:
        if job:
            unwritten = f"{run / JOB_ID} or standard output cannot be written ({error})"
            raise LaunchError(f"job {job} was submitted, but {unwritten}") from None
        raise LaunchError(f"run.dir {run}: cannot be written to ({error}); choose another folder") from None
    except (LaunchError, KeyboardInterrupt) as error:
        if is_new_folder and not getattr(error, "__notes__", ()):
            shutil.rmtree(run, ignore_errors=True)
        raise
    return 0


def _parse(verb: str, argv: Sequence[str]) -> tuple[JobSpec, argparse.Namespace]:
    names = (*_NUMBERS, *_TEXTS)
    own, options = split_options(argv, (*OPTION_NAMES, *(f"--{name}" for name in names), "--site"))
    flags = [word for word in options if word in ("-h", "--help", "--no-fetch")]
    arguments = make_parser(verb).parse_args([*own, *flags])
    options = [word for word in options if word != "--no-fetch"]
    site = load_site(arguments.site, os.environ)
    arguments.stage = arguments.stage or site.stage
    settings = make_settings(arguments, os.environ)
    given = {
        name.replace("-", "_"): value
        for name in names
        if (value := getattr(arguments, name.replace("-", "_"))) is not None
    }
    if settings.sweep_file and "array" not in given:
        given["array"] = f"0-{len(read_sweep(settings.sweep_file)) - 1}"
    return JobSpec(**given, settings=settings, site=site, options=tuple(options)), arguments


def make_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of `submit` or `render`, without the trainer's options."""
    descriptions = {
        "submit": "Submit a run to Slurm. The options are checked first, and weights and data are downloaded here, "
        "since compute nodes often have no network.",
        "render": "Print the batch script that `regraft submit` would submit. Without options it is slurm/finetune.sh.",
    }
    parser = argparse.ArgumentParser(
        prog=f"regraft {verb}",
        usage=f"regraft {verb} [options] [--config FILE] [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description=descriptions[verb],
        epilog="All other options go to the trainer: see `regraft train --help`. docs/slurm.md explains jobs.",
    )
    group = parser.add_argument_group("resources and queue, as in sbatch")
    for name, text in _NUMBERS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, (metavar, text) in _TEXTS.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    add_arguments(parser)
    group = parser.add_argument_group("submission")
    group.add_argument(
        "--site", metavar="FILE", help=f"settings of the cluster (default: ${SITE_VARIABLE}, else {DEFAULT_FILE})"
    )
    no_fetch = "submit without checking the options and downloading weights and data"
    group.add_argument("--no-fetch", action="store_true", help=no_fetch if verb == "submit" else argparse.SUPPRESS)
    return parser


def _fetch(runs: Sequence[Sequence[str]]) -> int:
    """Have the trainer check the options of each run and download weights and data; return its exit code."""
    program = trainer_folder() / "commands" / "fetch.py"
    argv = [word for options in runs for word in ("--next", *options)]
    return run_trainer_program(program, argv[1:]).returncode


def _check_script(script: str) -> None:
    """Raise a LaunchError if bash cannot parse the script."""
    done = subprocess.run(["bash", "-n"], input=os.fsencode(script), capture_output=True, check=False, timeout=60)
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip()
        raise LaunchError(f"bash cannot parse the batch script, so it was not submitted: {message}")


def _submit(spec: JobSpec, run: Path, environment: Mapping[str, str]) -> str:
    """Submit RUN/job.sh, and return the job's id."""
    if not str(run).isprintable() or "\\" in str(run):
        raise LaunchError(f"run.dir {str(run)!r}: Slurm cannot write to a folder with this name; choose another one")
    # In the name of the output file, Slurm replaces `%j` and so on.
    job_id = "%A_%a" if spec.array is not None else "%j"
    output = f"{run}/{LOGS}/slurm-".replace("%", "%%") + job_id
    overriding = {_OVERRIDING_VARIABLES.get(option.partition("=")[0]) for option in sbatch_options(spec)}
    inherited = {name: value for name, value in environment.items() if name not in overriding}
    if sys.prefix != sys.base_prefix:  # `.venv/bin/regraft` does not set VIRTUAL_ENV if it is not activated
        inherited["VIRTUAL_ENV"] = sys.prefix
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}.out", str(run / SCRIPT)],
            env=inherited,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError("sbatch was not found: submit from a login node of the cluster") from None
    if done.returncode != 0:
        raise LaunchError(f"Slurm refused the job: {' '.join(done.stderr.split())}")
    sys.stderr.write(done.stderr)
    return done.stdout.strip().partition(";")[0]


def _print_job(spec: JobSpec, run: Path, job: str) -> None:
    # For an array, show the commands for its first task; its folder is made when the task starts.
    first = spec.array and spec.array.split(",")[0].partition("%")[0].partition("-")[0]
    folder, name = (run / first, f"{job}_{first}") if first is not None else (run, job)
    print(f"job {job} submitted")
    print(f"run folder {run}{'/TASK' if spec.array is not None else ''}")
    print(f"follow it  regraft status {shlex.quote(str(folder))} --watch")
    print(f"           tail -F {shlex.quote(f'{run}/{LOGS}/slurm-{name}.out')}")
    print(f"stop it    scancel {job}")

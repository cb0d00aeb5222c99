"""`regraft submit` and `regraft render`: a job for Slurm, checked before it waits in a queue."""

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

from launch import contract
from launch.errors import LaunchError
from launch.local.command import split_options
from launch.slurm.allocation import plain
from launch.slurm.sbatch import SIGNAL_SECONDS, Spec, header, render
from launch.slurm.settings import NAMES, SEEDS, add_to, settings, sweep_lines
from launch.slurm.site import find

SCRIPT, SWEEP = "job.sh", "sweep.txt"
_NUMBERS = {
    "nodes": "machines (default: 1)",
    "gpus-per-node": "GPUs of each; without it none is asked for",
    "cpus-per-task": "CPU cores of each (default: Slurm's, often one)",
    "signal-seconds": f"how long ahead of the time limit the job is told to save (default: {SIGNAL_SECONDS})",
}
_TEXTS = {
    "time": ("T", "limit: 4:00:00, 2-00:00:00, or minutes"),
    "mem": ("M", "memory of each node: 64G"),
    "partition": ("NAME", "Slurm's partition"),
    "account": ("NAME", "who pays"),
    "qos": ("NAME", "Slurm's quality of service"),
    "job-name": ("NAME", "in the queue (default: regraft)"),
    "array": ("N-M", "numbers of an array's tasks: 0-9, or 0-9%%2 for two at a time; see --sweep"),
}
_OVERRULES = {
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
"""Variables that sbatch puts before what stands in a script."""


def render_job(words: Sequence[str]) -> int:
    """Print the batch script that these words ask for."""
    spec, _ = _spec("render", words)
    print(render(spec), end="")
    return 0


def submit_job(words: Sequence[str]) -> int:
    """Check the run, fetch what it needs, and submit it; returns the exit code.

    Raises:
        LaunchError: the job is impossible, the run folder cannot be written to, or Slurm will not have it.

    """
    spec, found = _spec("submit", words)
    own = sweep_lines(Path(spec.settings.sweep)) if _has_file(spec) and spec.settings.sweep else [[]]
    if not found.no_fetch:
        code = _fetch([[*spec.options, *line] for line in own])
        if code != 0:
            return code
    folder = contract.given(spec.options, "run", "dir")
    usual = f"runs/{plain(spec.job_name)}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    run = contract.whole_path("run.dir", folder or usual)
    fresh = not run.exists()
    spec = replace(spec, options=(*spec.options, f"--run.dir={run}"))
    try:
        (run / contract.LOGS).mkdir(parents=True, exist_ok=True)  # or Slurm would have nowhere to write to
        if _has_file(spec) and spec.settings.sweep:
            # As it is now, whatever becomes of it while the job waits; it may be an earlier job's copy.
            lines = Path(spec.settings.sweep).read_bytes()
            (run / SWEEP).write_bytes(lines)
            spec = replace(spec, settings=replace(spec.settings, sweep=str(run / SWEEP)))
        text = render(spec)
        _check_script(text)
        (run / SCRIPT).write_text(text, encoding="utf-8", errors="surrogateescape")
        job = _sbatch(spec, run, os.environ)
        (run / contract.JOB).write_text(f"{job}\n", encoding="ascii")
    except OSError as error:
        raise LaunchError(f"run.dir {run}: cannot be written to ({error}); choose another folder") from None
    except LaunchError:
        if fresh:
            shutil.rmtree(run, ignore_errors=True)
        raise
    _tell(spec, run, job)
    return 0


def _spec(verb: str, words: Sequence[str]) -> tuple[Spec, argparse.Namespace]:
    parser = parser_of(verb)
    names = [f"--{name}" for name in (*_NUMBERS, *_TEXTS)]
    own, options = split_options(words, (*NAMES, *names, "--site"))
    flags = [word for word in options if word in ("-h", "--help", "--no-fetch")]
    found = parser.parse_args([*own, *flags])
    options = [word for word in options if word != "--no-fetch"]
    site = find(found.site, os.environ)
    found.stage = found.stage or site.stage
    chosen = settings(found, os.environ)
    given = {
        name.replace("-", "_"): value
        for name in (*_NUMBERS, *_TEXTS)
        if (value := getattr(found, name.replace("-", "_"))) is not None
    }
    if chosen.sweep not in (None, SEEDS) and "array" not in given:
        given["array"] = f"0-{len(sweep_lines(Path(str(chosen.sweep)))) - 1}"
    return Spec(**given, settings=chosen, site=site, options=tuple(options)), found


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of `submit` or `render`, for all but the trainer's options."""
    what = {
        "submit": "Submit a run to Slurm, after its config was checked and its weights and data were fetched here.",
        "render": "Print the batch script that `regraft submit` would submit; with no option, slurm/finetune.sh.",
    }
    parser = argparse.ArgumentParser(
        prog=f"regraft {verb}",
        allow_abbrev=False,
        description=f"{what[verb]} All other options are the trainer's: regraft train --help.",
    )
    for name, text in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, (metavar, text) in _TEXTS.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    add_to(parser)
    parser.add_argument(
        "--site", metavar="FILE", help="the cluster's settings (default: $REGRAFT_SITE, else the user's)"
    )
    fetching = "do not look at the options, weights and data before the job is submitted"
    parser.add_argument(
        "--no-fetch", action="store_true", help=fetching if verb == "submit" else argparse.SUPPRESS
    )
    return parser


def _has_file(spec: Spec) -> bool:
    return spec.settings.sweep not in (None, SEEDS)


def _fetch(runs: Sequence[Sequence[str]]) -> int:
    """Have the trainer check each run's options and fetch weights and data, which is shown; returns its exit code."""
    program = contract.trainer_folder() / "fetch.py"
    words = [word for options in runs for word in ("--next", *options)]
    return subprocess.run([sys.executable, str(program), *words[1:]], check=False).returncode


def _check_script(text: str) -> None:
    """Raise a LaunchError where bash would not read the script to its end."""
    done = subprocess.run(
        ["bash", "-n"], input=os.fsencode(text), capture_output=True, check=False, timeout=60
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise LaunchError(f"the batch script is not sound, and was not submitted: {said}")


def _sbatch(spec: Spec, run: Path, environment: Mapping[str, str]) -> str:
    """Submit RUN/job.sh, and return the job's id."""
    if not str(run).isprintable() or "\\" in str(run):
        raise LaunchError(
            f"run.dir {str(run)!r}: Slurm cannot write to a folder of such a name; choose another one"
        )
    # Slurm puts its own words for what follows a `%`.
    output = f"{run}/{contract.LOGS}/slurm-".replace("%", "%%") + (
        "%A_%a" if spec.array is not None else "%j"
    )
    settled = {_OVERRULES.get(word.partition("=")[0]) for word in header(spec)}
    inherited = {name: value for name, value in environment.items() if name not in settled}
    if sys.prefix != sys.base_prefix:  # called by its path, a virtual environment is not active
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


def _tell(spec: Spec, run: Path, job: str) -> None:
    # The first task of an array, whose folders are made when they begin.
    first = spec.array and spec.array.split(",")[0].partition("%")[0].partition("-")[0]
    shown, name = (run / first, f"{job}_{first}") if first is not None else (run, job)
    print(f"job {job} submitted")
    print(f"run folder {run}{'/TASK' if spec.array is not None else ''}")
    print(f"follow it  regraft status {shlex.quote(str(shown))} --watch")
    print(f"           tail -F {shlex.quote(f'{run}/{contract.LOGS}/slurm-{name}.out')}")
    print(f"stop it    scancel {job}")

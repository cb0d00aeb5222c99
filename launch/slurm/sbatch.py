"""Render the batch script of a Slurm job; pure functions, which submit.py uses.

Two programs read the script, and no name may be taken for anything else: sbatch reads the #SBATCH lines by its own
rules (`_quote_for_sbatch`), bash reads the rest (`shlex.quote`).
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launch.errors import LaunchError, require
from launch.options import option_name
from launch.slurm.settings import JobSettings
from launch.slurm.site import Site

SIGNAL_SECONDS = 120
"""Seconds before the time limit at which Slurm tells a job to save."""
_SHUTDOWN_MARGIN = 20
"""Seconds of these that torchrun and Slurm need for themselves."""
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")
_MEMORY = re.compile(r"\d+[KMGT]?", flags=re.IGNORECASE)
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_NEEDS_NO_QUOTES = re.compile(r"[\w./:=,@%+-]+", flags=re.ASCII)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A Slurm job: its resources, settings and the trainer's options."""

    job_name: str = "regraft"
    """Name of the job in the queue."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int | None = None
    """Number of GPUs per node; None: not requested."""
    cpus_per_task: int | None = None
    """Number of CPU cores per node; None: Slurm's default, which is often 1."""
    time: str | None = None
    """Time limit in Slurm's notation (`4:00:00`, `2-00:00:00`, or minutes); None: the partition's."""
    mem: str | None = None
    """Memory per node (`64G`); None: Slurm's default."""
    partition: str | None = None
    """Slurm partition; None: the default one, or $SBATCH_PARTITION."""
    account: str | None = None
    """Account to charge; None: the user's, or $SBATCH_ACCOUNT."""
    qos: str | None = None
    """Quality of service; None: the user's, or $SBATCH_QOS."""
    array: str | None = None
    """Task indices of a job array: `0-9`, or `0-9%2` to run two tasks at a time."""
    signal_seconds: int = SIGNAL_SECONDS
    """Seconds before the time limit at which the job is told to save."""
    settings: JobSettings = field(default_factory=JobSettings)
    """How the job starts the trainer."""
    site: Site = field(default_factory=Site)
    """Settings of the cluster."""
    options: tuple[str, ...] = ()
    """Command-line options of the trainer."""

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_task", 1), ("signal_seconds", 30)):
            value = getattr(self, key)
            require(value is None or least <= value <= 10**6, f"{option_name(key)} {value}: expected {least} or more")
        for key, pattern, example in (
            ("time", _TIME, "minutes, `4:00:00` or `2-00:00:00`"),
            ("mem", _MEMORY, "`64G`"),
            ("array", _ARRAY, "`0-9`, `0-9%2` or `1,3,5`"),
        ):
            text = getattr(self, key)
            require(
                text is None or (text.isascii() and pattern.fullmatch(text) is not None),
                f"{option_name(key)} {text!r}: expected {example}",
            )
        for key in ("job_name", "partition", "account", "qos"):
            text = getattr(self, key)
            require(
                text is None or (bool(text.strip()) and text.isprintable()),
                f"{option_name(key)} {text!r}: expected a name on one line",
            )
        require(
            not set(self.job_name) & set("/\\"),
            f"--job-name {self.job_name!r}: expected a name without slashes, since the output file is named after it",
        )
        require(
            self.settings.sweep is None or self.array is not None,
            f"--sweep {self.settings.sweep}: sets the options of each task in a job array; add --array, as in "
            "--array 0-9",
        )


def render(spec: JobSpec) -> str:
    """Return the batch script of a job."""
    shutdown_seconds = spec.signal_seconds - _SHUTDOWN_MARGIN
    lines = [
        _HEAD,
        *(f"#SBATCH {_quote_for_sbatch(option)}" for option in sbatch_options(spec)),
        "",
        "set -euo pipefail",
        "trap '' USR1 # until Python has started, this signal before the time limit would end the job",
        "",
        *_python_setup(spec.site),
        "# Seconds that torchrun gives the trainer to save.",
        f'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{shutdown_seconds}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in _variables(spec.site)),
        "",
        "# Modules in the working folder must not shadow others; a checkout of regraft is found there.",
        "[ -f launch/slurm/job.py ] || export PYTHONSAFEPATH=1",
        " \\\n    ".join(
            ["exec python3 -m launch.slurm.job", *_quote_arguments([*spec.settings.to_argv(), *spec.options]), '"$@"']
        ),
    ]
    return "\n".join(lines) + "\n"


_HEAD = """\
#!/bin/bash
# sbatch [--nodes N] [--gpus-per-node G] [--cpus-per-task C] [--time T] ... THIS_FILE [--config F] [--section.key V] ...
# Trains on all GPUs of the allocated nodes, or on their CPUs if they have no GPU. See docs/slurm.md."""


def sbatch_options(spec: JobSpec) -> list[str]:
    """Return the options of `sbatch`, one string each."""
    optional = {
        "--gpus-per-node": spec.gpus_per_node,
        "--cpus-per-task": spec.cpus_per_task,
        "--mem": spec.mem,
        "--time": spec.time,
        "--partition": spec.partition or spec.site.partition,
        "--account": spec.account or spec.site.account,
        "--qos": spec.qos or spec.site.qos,
        "--array": spec.array,
    }
    return [
        f"--job-name={spec.job_name}",
        f"--nodes={spec.nodes}",
        "--ntasks-per-node=1",
        *(f"{name}={value}" for name, value in optional.items() if value is not None),
        f"--signal=B:USR1@{spec.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output=%x-{'%A_%a' if spec.array is not None else '%j'}.out",
    ]


def _quote_for_sbatch(option: str) -> str:
    """Quote an option for an #SBATCH line.

    sbatch splits the line at spaces, removes both kinds of quotation marks, takes the character after a backslash
    literally, and ignores everything after `#`.
    """
    if _NEEDS_NO_QUOTES.fullmatch(option):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'


def _quote_arguments(argv: Sequence[str]) -> list[str]:
    """Return arguments quoted for bash, an option and its value on one line."""
    lines: list[str] = []
    for argument in argv:
        if lines and not argument.startswith("-") and "=" not in lines[-1]:
            lines[-1] += f" {shlex.quote(argument)}"
        else:
            lines.append(shlex.quote(argument))
    return lines


def _python_setup(site: Site) -> list[str]:
    """Return the lines that put the right Python first in PATH."""
    lines: list[str] = []
    if site.modules:
        lines.append(f"module load {' '.join(map(shlex.quote, site.modules))}")
    if not site.activate and not site.modules:
        return [*_DEFAULT_PYTHON.splitlines(), ""]
    for command in site.activate:
        if command.startswith(("/", "~/")):  # the folder of a virtual environment
            lines.append(f"source {_quote_home(command.rstrip('/') + '/bin/activate')}")
        else:
            lines.append(" ".join(map(_quote_home, _split(command))))
    # The scripts of module and conda use unset variables.
    return ["set +u", *lines, "set -u", ""]


_DEFAULT_PYTHON = """\
# Python: the virtual environment that was active at submission, else .venv here, else the first in PATH.
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PATH="$VIRTUAL_ENV/bin:$PATH"
elif [ -d .venv/bin ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
"""


def _variables(site: Site) -> Iterable[tuple[str, str]]:
    if site.nccl_interface is not None:
        yield "NCCL_SOCKET_IFNAME", site.nccl_interface
        yield "GLOO_SOCKET_IFNAME", site.nccl_interface
    yield from site.env


def _split(command: str) -> Sequence[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise LaunchError(f"site: activate {command!r}: {error}; expected a command and its arguments") from None


def _quote_home(word: str) -> str:
    """Quote a word for bash; a leading ~/ becomes the home folder of the job's user."""
    return f'"$HOME"/{shlex.quote(word[2:])}' if word.startswith("~/") else shlex.quote(word)

"""What a job asks of Slurm -> the text that `sbatch` takes. Pure functions; submit.py acts on them.

Two readers see the text, and neither may take a name for more than a name: sbatch reads the #SBATCH lines by its own
rules (`_header_word`), bash the rest (`shlex.quote`).
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from launch.errors import LaunchError
from launch.slurm.settings import Settings
from launch.slurm.site import Site

SIGNAL_SECONDS = 120
"""Seconds ahead of the time limit at which a job is told to save."""
_MARGIN = 20
"""Of them, what torchrun and Slurm keep for themselves."""
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")
_MEMORY = re.compile(r"\d+[KMGT]?", flags=re.IGNORECASE)
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_PLAIN = re.compile(r"[\w./:=,@%+-]+", flags=re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A job."""

    job_name: str = "regraft"
    """Its name in the queue."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """None: not asked for."""
    cpus_per_task: int | None = None
    """CPU cores of each node; None: Slurm's default, which is often one."""
    time: str | None = None
    """Limit, as Slurm writes it: `4:00:00`, `2-00:00:00`, or minutes; None: the partition's."""
    mem: str | None = None
    """Memory of each node: `64G`; None: Slurm's default."""
    partition: str | None = None
    """None: the default one, or $SBATCH_PARTITION."""
    account: str | None = None
    """None: the user's, or $SBATCH_ACCOUNT."""
    qos: str | None = None
    """None: the user's, or $SBATCH_QOS."""
    array: str | None = None
    """Numbers of an array's tasks: `0-9`, `0-9%2` for two at a time."""
    signal_seconds: int = SIGNAL_SECONDS
    """Seconds ahead of the time limit at which the job is told to save."""
    settings: Settings = field(default_factory=Settings)
    """How it starts the trainer."""
    site: Site = field(default_factory=Site)
    """What all jobs of the cluster have in common."""
    options: tuple[str, ...] = ()
    """The trainer's."""

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_task", 1), ("signal_seconds", 30)):
            value = getattr(self, key)
            _require(
                value is None or least <= value <= 10**6, f"{_option(key)} {value}: expected {least} or more"
            )
        for key, pattern, example in (
            ("time", _TIME, "minutes, `4:00:00` or `2-00:00:00`"),
            ("mem", _MEMORY, "`64G`"),
            ("array", _ARRAY, "`0-9`, `0-9%2` or `1,3,5`"),
        ):
            text = getattr(self, key)
            _require(
                text is None or (text.isascii() and pattern.fullmatch(text) is not None),
                f"{_option(key)} {text!r}: expected {example}",
            )
        for key in ("job_name", "partition", "account", "qos"):
            text = getattr(self, key)
            _require(
                text is None or (bool(text.strip()) and text.isprintable()),
                f"{_option(key)} {text!r}: expected a name on one line",
            )
        _require(
            not set(self.job_name) & set("/\\"),
            f"--job-name {self.job_name!r}: expected a name without slashes, since the output is called after it",
        )
        _require(
            self.settings.sweep is None or self.array is not None,
            f"--sweep {self.settings.sweep}: says what each of an array's tasks does; add --array, as in --array 0-9",
        )


def render(spec: Spec) -> str:
    """Return the batch script of a job."""
    blocks = [
        _HEAD,
        *(f"#SBATCH {_header_word(word)}" for word in header(spec)),
        "",
        "set -euo pipefail",
        "trap '' USR1 # until Python is up, the warning ahead of the time limit would end the job",
        "",
        *_preparation(spec.site),
        "# Seconds that torchrun gives the trainer to save.",
        f'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{spec.signal_seconds - _MARGIN}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in _variables(spec.site)),
        "",
        " \\\n    ".join(
            ["exec python3 -m launch.slurm.job", *_lines([*spec.settings.words(), *spec.options]), '"$@"']
        ),
    ]
    return "\n".join(blocks) + "\n"


def _lines(words: Sequence[str]) -> list[str]:
    """Return words quoted for bash, an option and its value in one line."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("-") and "=" not in lines[-1]:
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    return lines


_HEAD = """\
#!/bin/bash
# sbatch [--nodes N] [--gpus-per-node G] [--cpus-per-task C] [--time T] ... THIS_FILE [--config F] [--section.key V] ...
# Trains on whatever it is given: one GPU, several nodes of them, or none. docs/slurm.md says more."""


def header(spec: Spec) -> list[str]:
    """Return the options of `sbatch`, one word each."""
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


def _header_word(word: str) -> str:
    """Return a word as sbatch reads it in an #SBATCH line.

    It parts words at spaces, takes quotation marks of both kinds away, a character after a backslash for itself, and
    the rest of the line after `#` for a comment.
    """
    if _PLAIN.fullmatch(word):
        return word
    return '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _preparation(site: Site) -> list[str]:
    """Return the lines that make the right Python the first in PATH."""
    lines: list[str] = []
    if site.modules:
        lines.append(f"module load {' '.join(map(shlex.quote, site.modules))}")
    if not site.activate and not site.modules:
        return [*_USERS_PYTHON.splitlines(), ""]
    for line in site.activate:
        if line.startswith(("/", "~/")):  # a virtual environment's folder
            lines.append(f"source {_home(line.rstrip('/') + '/bin/activate')}")
        else:
            lines.append(" ".join(map(_home, _words(line))))
    # Neither module nor conda is written for a shell that ends at an unset variable.
    return ["set +u", *lines, "set -u", ""]


_USERS_PYTHON = """\
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


def _words(line: str) -> Sequence[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise LaunchError(f"site: activate {line!r}: {error}; expected a command and its words") from None


def _home(word: str) -> str:
    """Return a word for bash, a leading ~/ as the job's home folder."""
    return f'"$HOME"/{shlex.quote(word[2:])}' if word.startswith("~/") else shlex.quote(word)


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise LaunchError(text)

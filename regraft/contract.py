"""What `trainer` and `launch` both know: the run folder's layout, attempt records, exit codes, environment variables.

It imports the standard library alone, so that the launcher starts at once.
"""

import dataclasses
import errno
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DONE, FAILED, USER_ERROR = 0, 1, 2
STOPPED = 75
"""Exit code of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, to be started again. Under torchrun it is 0."""
INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""

CONFIG, METRICS, MODEL, SPLIT, CURVES = ("config.yaml", "metrics.jsonl", "model.safetensors", "split.csv", "curves.png")
IMAGES, EXCLUDED, BLOCKS = "images.json", "excluded.csv", "blocks.json"
EVALUATION, PREDICTIONS, REPORT = "evaluation.json", "predictions.csv", "report.html"
CHECKPOINTS, ATTEMPTS, ENVIRONMENT, AUDIT, HANGS, LOGS, TRACKERS = (
    "checkpoints",
    "attempts",
    "environment",
    "audit",
    "hangs",
    "logs",
    "trackers",
)
STOP = "STOP"
"""File that a person creates in the run folder to stop the run."""
JOB_ID = "job-id"
"""File with the id of the Slurm job that `regraft submit` queued last."""
PRETRAIN, BASELINE = "pretrain", "baseline"
"""Folders of a run's other phases, below its own."""
DEFAULT_RUN_DIR = "runs/default"
CONFIG_HEADER = "# Written by regraft: every option of this run. --config with this file runs it again.\n"
"""First line of every config.yaml that a run writes."""
OUTPUT_MARK = ".regraft"
"""Empty file in a folder that regraft created for its output, so that the folder is never read as data."""
RUN_SUBFOLDERS = frozenset({CHECKPOINTS, ATTEMPTS, ENVIRONMENT, AUDIT, HANGS, LOGS, TRACKERS, PRETRAIN, BASELINE})
OUTPUT_IMAGES = frozenset({CURVES, "preview.png", "lr-find.png"})
"""Images that regraft writes into a run folder."""
# Before OUTPUT_MARK, these were written into a run folder in which no run was started.
_UNMARKED_OUTPUT = frozenset({"preview.png", "lr-find.png", "lr-find.json"})

STOP_FILE = "the file STOP"
"""Reason of a stop that a person asked for by the file STOP."""
HANG_WAITING = "waiting for the other ranks"
"""Part of the message of a hang on a rank that only waited for others."""
COMMAND = "REGRAFT_COMMAND"
"""Environment variable: the command that was called, such as `regraft debug`, for the usage line of the trainer."""
STOP_SIGNAL = "stop-signal"
"""File in a launch's log folder: number of the attempt that was stopped, and the signal that the launcher received."""
LOG_FOLDER = "REGRAFT_LOGS"
"""Environment variable: the folder that the launcher writes this start's logs to."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: the file that a failing process describes its error in."""

AttemptState = Literal["running", "stopped", "done", "failed"]
ATTEMPT_STATES = ("running", "stopped", "done", "failed")
_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """What one start of the trainer records about itself in `attempts/NNNN.json`."""

    attempt: int
    """Number of the start, from 1."""
    state: AttemptState
    """stopped: on request, with the state saved; done: after the last epoch; failed: by an error."""
    reason: str | None = None
    """The signal, or `the file STOP`, of a stop; the error of a failure."""
    stage: str = ""
    """The phase in progress: `pretrain`, `baseline`, or empty for the fine-tuning itself."""
    step: int = 0
    """Updates of the phase up to its last checkpoint."""
    steps: int = 0
    """Updates of the whole phase."""
    epoch: int = 0
    """Whole epochs of the phase up to its last checkpoint."""
    epochs: int = 0
    """Epochs of the whole phase."""
    began: str
    """Time of the start, UTC."""
    training_began: str | None = None
    """Time when the first phase was ready to train, UTC: data, model, output layer and first evaluation were done."""
    ended: str | None = None
    """Time of the end, UTC."""
    host: str
    pid: int
    """Process id of rank 0."""
    started: int
    """Start of that process, in clock ticks since the host's boot. It tells apart processes with the same pid."""
    launcher: str | None = None
    """Identity of the torchrun that started the process; None without one."""
    pid_namespace: str
    """The host's boot id and the process's pid namespace: pids can be compared within one namespace only."""
    lease_id: str
    """Random id, different for every attempt."""

    def to_json(self) -> str:
        """Return the text of the attempt's file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def attempt_path(run: Path, number: int) -> Path:
    """Return the path of an attempt's record."""
    return run / ATTEMPTS / f"{number:04}.json"


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file; of a larger one, the last `max_bytes` bytes.

    Raises:
        OSError: it cannot be read, or it is no regular file. A FIFO or a device could be read forever.

    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:  # noqa: PTH123 (a handle)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        file.seek(max(0, status.st_size - max_bytes))
        return file.read(max_bytes)


def read_attempt(path: Path) -> AttemptRecord | None:
    """Return the record in a file, or None if the file is missing, damaged or half written."""
    try:
        record = AttemptRecord(**json.loads(read_file(path, max_bytes=_MAX_RECORD_BYTES).decode("ascii")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    counts = (record.attempt, record.step, record.steps, record.epoch, record.epochs, record.pid, record.started)
    texts = (record.began, record.host, record.pid_namespace, record.lease_id, record.stage)
    optional = (record.launcher, record.reason, record.training_began, record.ended)
    is_valid = (
        all(type(count) is int and count >= 0 for count in counts)
        and all(isinstance(text, str) for text in texts)
        and record.state in ATTEMPT_STATES
        and all(isinstance(text, str | None) for text in optional)
    )
    return record if is_valid else None


def read_attempts(run: Path) -> list[AttemptRecord]:
    """Return the records of a run's attempts, in order, as far as they can be read."""
    records = map(read_attempt, sorted((run / ATTEMPTS).glob("*.json")))
    return [record for record in records if record is not None]


def latest_attempt_number(run: Path) -> int:
    """Return the highest number of a run's attempts; 0 before the first."""
    try:
        names = [path.stem for path in (run / ATTEMPTS).iterdir() if path.suffix == ".json"]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def latest_attempt(run: Path) -> AttemptRecord | None:
    """Return the record of a run's last attempt; None if there was none or its record cannot be read."""
    number = latest_attempt_number(run)
    return read_attempt(attempt_path(run, number)) if number else None


def last_heartbeat(run: Path, number: int) -> float | None:
    """Return when an attempt last showed that it is alive, in seconds since 1970 by the file system's clock."""
    try:
        return attempt_path(run, number).stat().st_mtime
    except OSError:
        return None


def create_output_folder(folder: Path) -> None:
    """Create a folder for output, with a mark that keeps it from being read as data, unless it exists."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTPUT_MARK).touch()


def is_run_folder(folder: str) -> bool:
    """Return whether a run was started in the folder, or regraft created it for its output."""
    try:
        if (Path(folder) / OUTPUT_MARK).exists() or latest_attempt_number(Path(folder)):
            return True
        with (Path(folder) / CONFIG).open("rb") as file:
            return file.read(len(CONFIG_HEADER)) == CONFIG_HEADER.encode()
    except OSError:  # no config, or not readable
        return False


def is_in_default_run_folder(folder: str) -> bool:
    """Return whether a folder or its parent has the name of the folder that runs are in by default."""
    return Path(DEFAULT_RUN_DIR).parts[0] in Path(folder).parts[-2:]


def holds_only_output(folder: str, *, depth: int = 5) -> bool:
    """Return whether regraft wrote all of a folder: it is a run folder, or holds nothing but run folders (`runs/`)."""
    if is_run_folder(folder):
        return True
    in_default_folder = is_in_default_run_folder(folder)
    is_empty = True
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_empty = False
                if entry.is_dir():
                    is_output = depth > 0 and holds_only_output(entry.path, depth=depth - 1)
                else:
                    is_output = in_default_folder and entry.name in _UNMARKED_OUTPUT
                if not is_output:
                    return False
    except OSError:  # not readable, or a link to itself
        return False
    return not is_empty


def available_cores() -> int:
    """Return how many CPU cores this process may use: its affinity, or its container's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="ascii").strip().partition(" ")
        if limit.isdigit() and period.isdigit():
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return how many physical cores this process may use, or its container's quota if that is less.

    The second hardware thread of a core has no arithmetic units of its own: it decodes images, but a convolution on it
    slows down the one on the first thread.
    """
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
        except OSError:  # the kernel does not tell
            cores.add(str(cpu))
    return min(len(cores), available_cores())


def own_version() -> str:
    """Return regraft's version, or `uninstalled` for a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 (the launcher rarely needs it)

    try:
        return version("regraft")
    except PackageNotFoundError:
        return "uninstalled"

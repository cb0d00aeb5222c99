"""Find the first failure of a launch in its logs; later errors of other ranks about a lost partner are secondary."""

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.text import escape_lines
from regraft.contract import HANG_WAITING, STOP_FILE, AttemptRecord

_SECONDARY_ERRORS = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|\bgloo\b|\bNCCL|DistBackendError|DistNetworkError|ProcessGroup|"
    r"TCPStore|Socket Timeout|SignalException",
    flags=re.IGNORECASE,
)
_FIRST_EXIT = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: \d+\)")
"""Logged by torchrun at each restart, for the first process that exited; see torch.distributed.elastic."""
_FINAL_REPORT = re.compile(r"rank\s*: (\d+) \(local_rank: (\d+)\)\s+exitcode\s*: (-?\d+)")
"""Logged by torchrun at the end, for each failed process; see ChildFailedError in torch.distributed.elastic."""
_USER_ERROR = "error: "
"""Prefix of the trainer's errors that the user can fix."""
_HANG = "Hang: "
"""Prefix of the trainer's error for a rank that made no progress."""
_OUT_OF_MEMORY = "OutOfMemory: "
"""Prefix of the trainer's error for an attempt after which the micro-batches are halved."""
_LAST_LINES = 15
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        rf"^{_HANG}.*{HANG_WAITING}",
        "a rank that left no stack traces beside these was suspended, or its machine is unreachable",
    ),
    (
        rf"^{_HANG}",
        "the stack traces show where it was: a dead file system, a suspended data loader ...; if it was only slow, "
        "set --run.hang_timeout SECONDS",
    ),
    (
        rf"^{_OUT_OF_MEMORY}",
        "the same command resumes with smaller micro-batches; train.gradient_checkpointing true and train.precision "
        "bf16 need less memory too",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "train.micro_batch_size auto splits each batch into micro-batches that fit, and makes the same updates; "
        "train.precision bf16 needs about half the memory",
    ),
    (
        r"DefaultCPUAllocator: can't allocate|MemoryError|Cannot allocate memory",
        "the machine's memory is full: use train.micro_batch_size auto, fewer data.num_workers, or fewer processes",
    ),
    (r"EADDRINUSE|Address already in use", "another job uses the port: start again, which chooses another port"),
    (
        r"NCCL|DistBackendError",
        "the GPUs could not communicate: NCCL_DEBUG=INFO logs more; NCCL_SOCKET_IFNAME sets the network interface",
    ),
    (r"No space left on device", "the disk is full: free some space, then run the same command to resume"),
    (
        r"No such file or directory: .*\.(?:safetensors|pth)|download|URLError|Temporary failure in name resolution",
        "weights or data could not be downloaded: start the run once on a machine with network access, or pass a file "
        "as model.weights",
    ),
    (
        r"Bus error|SIGBUS|shared memory",
        "the shared memory of the data loaders (/dev/shm) is full: start the container with a larger --shm-size, or "
        "use --data.num_workers 0",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first failure of a launch."""

    rank: int | None
    """Global rank of the process; None if no process was started."""
    host: str
    """Name of its machine."""
    error: str
    """Exception, or the signal that killed the process."""
    is_user_error: bool
    """Whether the user has to fix it, so that a restart would not help."""
    lines: tuple[str, ...]
    """Last lines of its log."""
    log: Path | None
    """Its log file."""
    remedy: str | None
    """What to try; None if nothing is known."""
    priority: tuple[int, float]
    """The lowest of several failures is the cause: recorded error, hang, kill, secondary error, unknown; then time."""


def first_of(failures: Sequence[Failure]) -> Failure:
    """Return the first failure of several machines (at least one)."""
    return min(failures, key=lambda failure: failure.priority)


def first_failure(logs: Path, *, host: str, restart_dir: Path | None = None) -> Failure:
    """Return the first failure that the logs of a launch contain.

    An error that a process recorded comes before a process killed by a signal, and both before secondary errors.

    Args:
        logs: log folder of the launch.
        host: name of this machine.
        restart_dir: torchrun's folder of one restart; None: the one with an error that the user must fix, else
            the last.

    """
    folders = restart_dirs(logs)
    folder = restart_dir or find_user_error(logs, folders) or (folders[-1] if folders else None)
    torchrun_log = _tail(logs / "torchrun.log", 1000)
    recorded = _recorded_errors(folder) if folder else []
    causes = [error for error in recorded if not _is_secondary(error[2])]
    hangs = [error for error in recorded if error[2].startswith(_HANG)]
    index = folders.index(folder) if folder in folders else 0
    codes = _exit_codes("\n".join(torchrun_log), index, len(folders))
    killed = [rank for rank, code in codes if code < 0 and code != -signal.SIGTERM]
    rank: int | None
    if causes:
        order, (when, rank, error) = 0, causes[0]
    elif hangs:  # they all waited; torchrun may have killed the rank that they waited for
        order, (when, rank, error) = 1, hangs[0]
    elif killed:
        order, when, rank = 2, 0.0, killed[0]
        error = f"killed by {signal.Signals(-dict(codes)[rank]).name}"
    elif recorded:
        order, (when, rank, error) = 3, recorded[0]
    else:
        order, when, rank, error = 4, 0.0, (codes[0][0] if codes else None), ""
    is_user_error = error.startswith(_USER_ERROR)
    log = folder / str(rank or 0) / "stderr.log" if folder else None
    lines = _tail(log, _LAST_LINES) if log else []
    if not lines:
        log, lines = logs / "torchrun.log", torchrun_log[-_LAST_LINES:]
    error = error or (lines[-1] if lines else "no error message was logged")
    return Failure(
        rank=_global_rank(folder, rank, "\n".join(torchrun_log)),
        host=host,
        error=error,
        is_user_error=is_user_error,
        lines=tuple(lines),
        log=log,
        remedy=None if is_user_error else _remedy(error, lines),
        priority=(order, when),
    )


def lost_logs(logs: Path) -> Failure:
    """Return the failure of a launch whose log folder, and with it the run folder, was deleted or moved meanwhile."""
    missing = next(folder for folder in [*reversed(logs.parents), logs] if not folder.exists())
    error = (
        f"{_USER_ERROR}{missing} is gone: it was deleted or moved while the run was in progress. Move it back, and the "
        "same command resumes from its newest checkpoint; without it, the run starts anew"
    )
    return Failure(
        rank=None, host="", error=error, is_user_error=True, lines=(), log=None, remedy=None, priority=(0, 0.0)
    )


def restart_dirs(logs: Path) -> list[Path]:
    """Return torchrun's folders of each (re)start of the processes (`LOGS/ID/attempt_N`), oldest first."""
    folders = [
        (path.parent.stat().st_mtime, int(number), path)
        for path in logs.glob("*/attempt_*")
        if (number := path.name.removeprefix("attempt_")).isdigit()
    ]
    return [path for *_, path in sorted(folders)]


def find_user_error(logs: Path, folders: Sequence[Path]) -> Path | None:
    """Return the restart folder with an error that the user must fix, None if there is none.

    It is not always the last one: torchrun may restart the processes before the launcher notices the error.

    Args:
        logs: log folder of the launch.
        folders: the folders to search: some or all of `restart_dirs(logs)`.

    """
    for folder in folders:
        if any(folder.glob("*/error.json")) and first_failure(logs, host="", restart_dir=folder).is_user_error:
            return folder
    return None


def format_failure(failure: Failure) -> str:
    """Return the message to print for a failure."""
    if failure.is_user_error:
        return escape_lines(failure.error)
    where = f"rank {failure.rank} on {failure.host}" if failure.rank is not None else failure.host
    lines = [f"failed: {where}: {failure.error}"]
    lines += [f"  | {line}" for line in failure.lines if line != failure.error]
    if failure.log is not None:
        lines.append(f"log: {failure.log}")
    if failure.remedy is not None:
        lines.append(f"try: {failure.remedy}")
    return escape_lines("\n".join(lines))


def was_requested_stop(attempt: AttemptRecord, *, signaled: bool, succeeded: bool) -> bool:
    """Return whether an attempt was stopped on request, by a signal from outside or by the file STOP.

    When one process fails, Slurm and torchrun send SIGTERM to the others, which then record a stop as well.
    """
    return attempt.state == "stopped" and (signaled or succeeded or attempt.reason == STOP_FILE)


def _global_rank(folder: Path | None, local_rank: int | None, torchrun_log: str) -> int | None:
    """Return the global rank that a process or torchrun has recorded, else the local rank."""
    if folder is None or local_rank is None:
        return local_rank
    try:
        record = json.loads((folder / str(local_rank) / "error.json").read_text(encoding="utf-8"))
        return int(record["message"]["extraInfo"]["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        reported = {int(local): int(rank) for rank, local, _ in _FINAL_REPORT.findall(torchrun_log)}
        return reported.get(local_rank, local_rank)


def _exit_codes(torchrun_log: str, restart: int, restarts: int) -> list[tuple[int, int]]:
    """Return (local rank, exit code) of the failed processes of a restart, as far as torchrun logs them."""
    first = _FIRST_EXIT.findall(torchrun_log)[restart : restart + 1]
    final = _FINAL_REPORT.findall(torchrun_log) if restart == restarts - 1 or not restarts else []
    codes = [(int(rank), int(code)) for code, rank in first]
    codes += [(int(rank), int(code)) for _, rank, code in final]
    return list(dict.fromkeys(codes))


def _is_secondary(error: str) -> bool:
    if error.startswith(_USER_ERROR):
        return False
    return HANG_WAITING in error if error.startswith(_HANG) else _SECONDARY_ERRORS.search(error) is not None


def _remedy(error: str, lines: list[str]) -> str | None:
    text = "\n".join([error, *lines])
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), None)
    if remedy is None and error == "killed by SIGKILL":
        return (
            "usually the kernel, when memory is full: use fewer data.num_workers, train.micro_batch_size auto, or more "
            "memory"
        )
    return remedy


def _recorded_errors(restart_dir: Path) -> list[tuple[float, int, str]]:
    """Return (time, local rank, exception) of each error that a process has recorded, oldest first."""
    errors = []
    for path in restart_dir.glob("*/error.json"):
        try:
            message = json.loads(path.read_text(encoding="utf-8"))["message"]
            extra = message["extraInfo"]
            # The trainer adds `time`; torchrun's own `timestamp` has whole seconds only.
            when = float(extra.get("time", extra["timestamp"]))
            errors.append((when, int(path.parent.name), str(message["message"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # incomplete, since the process was killed: its exit code shows that
    return sorted(errors)


def _tail(path: Path, count: int) -> list[str]:
    """Return the last lines of a file that are not empty."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]

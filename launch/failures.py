"""Which rank failed first, and why; the others' complaints of a partner lost are its echo."""

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ECHO = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|\bgloo\b|\bNCCL|DistBackendError|DistNetworkError|ProcessGroup|"
    r"TCPStore|Socket Timeout|SignalException",
    flags=re.IGNORECASE,
)
_SEEN = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: \d+\)")
"""What torchrun says of each round, once: the first failure that it saw; see torch.distributed.elastic."""
_REPORTED = re.compile(r"rank\s*: (\d+) \(local_rank: (\d+)\)\s+exitcode\s*: (-?\d+)")
"""What it says of each process in the end; see ChildFailedError there."""
_USERS = "error: "
"""How the trainer begins what its user can mend."""
_HANG, _WAITS = "Hang: ", "waiting for the other ranks"
"""How the trainer tells of a rank that came to no step any more, and of one that only waited for it."""
_LAST_LINES = 15
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        rf"^{_HANG}.*{_WAITS}",
        "a rank that has left no stacks beside these was stopped, or its machine is out of reach",
    ),
    (
        rf"^{_HANG}",
        "the stacks say where it was: a dead file system, a loader that was stopped ...; if it was only slow, "
        "run.hang_timeout SECONDS",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "a smaller train.batch_size changes the run; train.accumulation 2 (or 4) cuts a batch into parts and does "
        "not; train.precision bf16 takes about half",
    ),
    (
        r"DefaultCPUAllocator: can't allocate|MemoryError|Cannot allocate memory",
        "the machine's memory is full: train.accumulation, fewer data.workers, or fewer processes",
    ),
    (
        r"EADDRINUSE|Address already in use",
        "another job holds the port: start again, which takes another one",
    ),
    (
        r"NCCL|DistBackendError",
        "the GPUs could not talk: NCCL_DEBUG=INFO tells more; NCCL_SOCKET_IFNAME names the network interface",
    ),
    (
        r"No space left on device",
        "the disk is full: make room, and the same command goes on",
    ),
    (
        r"No such file or directory: .*\.(?:safetensors|pth)|download|URLError|Temporary failure in name resolution",
        "weights or data could not be fetched: on a machine with a network, start the run once, or give a file by "
        "model.weights",
    ),
    (
        r"Bus error|SIGBUS|shared memory",
        "the workers' shared memory (/dev/shm) is full: in a container --shm-size, or --data.workers 0",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first failure of a launch."""

    rank: int | None
    host: str
    what: str
    """The exception, or the signal."""
    is_users: bool
    """Whether it is for the user to mend, so that starting again is of no use."""
    lines: tuple[str, ...]
    """The end of its log."""
    log: Path | None
    remedy: str | None
    order: tuple[int, float]
    """The least of several machines' is first: an error written down, a hang, a kill, an echo, nothing; then time."""


def first_of(failures: Sequence[Failure]) -> Failure:
    """Return the first failure of several machines' (one or more)."""
    return min(failures, key=lambda failure: failure.order)


def first_failure(logs: Path, *, host: str, of: Path | None = None) -> Failure:
    """Return the first failure that the logs of a launch tell of.

    An error that a process has written down goes before a process killed by a signal, and both before an echo.

    Args:
        logs: of the launch.
        host: this machine's name.
        of: torchrun's folder of one round of processes; None: that which its user has to mend, else the last.

    """
    found = rounds(logs)
    folder = of or users_round(logs, found) or (found[-1] if found else None)
    agent = _tail(logs / "torchrun.log", 1000)
    errors = _errors(folder) if folder else []
    causes = [error for error in errors if not _is_echo(error[2])]
    hangs = [error for error in errors if error[2].startswith(_HANG)]
    codes = _codes("\n".join(agent), found.index(folder) if folder in found else 0, len(found))
    killed = [rank for rank, code in codes if code < 0 and code != -signal.SIGTERM]
    rank: int | None
    if causes:
        order, (when, rank, what) = 0, causes[0]
    elif hangs:  # whom they waited for, torchrun may have had to kill
        order, (when, rank, what) = 1, hangs[0]
    elif killed:
        text = f"killed by {signal.Signals(-dict(codes)[killed[0]]).name}"
        order, when, rank, what = 2, 0.0, killed[0], text
    elif errors:
        order, (when, rank, what) = 3, errors[0]
    else:
        order, when, rank, what = 4, 0.0, (codes[0][0] if codes else None), ""
    is_users = what.startswith(_USERS)
    log = folder / str(rank or 0) / "stderr.log" if folder else None
    lines = _tail(log, _LAST_LINES) if log else []
    if not lines:
        log, lines = logs / "torchrun.log", agent[-_LAST_LINES:]
    what = what or (lines[-1] if lines else "it has said nothing")
    remedy = None if is_users else _remedy(what, lines)
    return Failure(
        rank=_among_all(folder, rank, "\n".join(agent)),
        host=host,
        what=what,
        is_users=is_users,
        lines=tuple(lines),
        log=log,
        remedy=remedy,
        order=(order, when),
    )


def _among_all(folder: Path | None, local_rank: int | None, agent: str) -> int | None:
    """Return a process's rank among all machines', which it or torchrun has written down; else that on its own."""
    if folder is None or local_rank is None:
        return local_rank
    try:
        error = json.loads((folder / str(local_rank) / "error.json").read_text(encoding="utf-8"))
        return int(error["message"]["extraInfo"]["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        reported = {int(local): int(rank) for rank, local, _ in _REPORTED.findall(agent)}
        return reported.get(local_rank, local_rank)


def rounds(logs: Path) -> list[Path]:
    """Return torchrun's folders of its rounds of processes (`LOGS/ID/attempt_N`), in their order."""
    found = [
        (path.parent.stat().st_mtime, int(number), path)
        for path in logs.glob("*/attempt_*")
        if (number := path.name.removeprefix("attempt_")).isdigit()
    ]
    return [path for *_, path in sorted(found)]


def users_round(logs: Path, found: Sequence[Path]) -> Path | None:
    """Return the round that has failed by what its user has to mend; None where none has.

    It need not be the last: torchrun may have begun the next one before anybody could look.

    Args:
        logs: of the launch.
        found: the rounds to look at, some or all of `rounds(logs)`.

    """
    for folder in found:
        if any(folder.glob("*/error.json")) and first_failure(logs, host="", of=folder).is_users:
            return folder
    return None


def _codes(agent: str, round_: int, count: int) -> list[tuple[int, int]]:
    """Return (rank, exit code) of what torchrun saw fail in a round (of `count`), as far as it says."""
    seen = _SEEN.findall(agent)[round_ : round_ + 1]
    reported = _REPORTED.findall(agent) if round_ == count - 1 or not count else []
    found = [(int(rank), int(code)) for code, rank in seen] + [
        (int(rank), int(code)) for _, rank, code in reported
    ]
    return list(dict.fromkeys(found))


def _is_echo(what: str) -> bool:
    if what.startswith(_USERS):
        return False
    return _WAITS in what if what.startswith(_HANG) else _ECHO.search(what) is not None


def _remedy(what: str, lines: list[str]) -> str | None:
    text = "\n".join([what, *lines])
    found = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), None)
    if found is None and what == "killed by SIGKILL":
        return "often the kernel, out of memory: fewer data.workers, train.accumulation, or more memory"
    return found


def told(failure: Failure) -> str:
    """Return a failure as a person reads it."""
    if failure.is_users:
        return failure.what
    who = f"rank {failure.rank} on {failure.host}" if failure.rank is not None else failure.host
    lines = [f"failed: {who}: {failure.what}"]
    lines += [f"  | {line}" for line in failure.lines if line != failure.what]
    if failure.log is not None:
        lines.append(f"log: {failure.log}")
    if failure.remedy is not None:
        lines.append(f"try: {failure.remedy}")
    return "\n".join(lines)


def _errors(attempt: Path) -> list[tuple[float, int, str]]:
    """Return (time, rank on its machine, exception) of what processes have written down, the first in time first."""
    found = []
    for path in attempt.glob("*/error.json"):
        try:
            message = json.loads(path.read_text(encoding="utf-8"))["message"]
            extra = message["extraInfo"]
            # `time` is the trainer's own, finer than a second.
            when = float(extra.get("time", extra["timestamp"]))
            found.append((when, int(path.parent.name), str(message["message"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # half written by a process that was killed: its exit code tells of it
    return sorted(found)


def _tail(path: Path, count: int) -> list[str]:
    """Return the last lines of a file, without those that are empty."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]

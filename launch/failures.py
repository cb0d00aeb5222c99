"""Which rank failed first, and why; the others' complaints of a partner lost are its echo."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

_ECHO = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|gloo|NCCL|DistBackendError|DistNetworkError|ProcessGroup|"
    r"TCPStore|Socket Timeout|SignalException",
    flags=re.IGNORECASE,
)
_REPORTED = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+)")
"""torchrun's report of its processes; see ChildFailedError in torch.distributed.elastic."""
_LAST_LINES = 15
_REMEDIES: tuple[tuple[str, str], ...] = (
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
    lines: tuple[str, ...]
    """The end of its log."""
    log: Path | None
    remedy: str | None


def first_failure(logs: Path, *, host: str) -> Failure:
    """Return the first failure that the logs of a launch tell of.

    An error that a process has written down goes before a process killed by a signal, and both before an echo.
    """
    attempt = _last_attempt(logs)
    agent = _tail(logs / "torchrun.log", 200)
    codes = {int(rank): int(code) for rank, code in _REPORTED.findall("\n".join(agent))}
    errors = _errors(attempt) if attempt else []
    causes = [error for error in errors if not _ECHO.search(error[2])]
    killed = [rank for rank, code in sorted(codes.items()) if code < 0 and code != -15]
    if causes or not (killed or errors):
        rank, what = (causes[0][1], causes[0][2]) if causes else (_only(codes), "")
    elif killed:
        rank, what = killed[0], f"killed by signal {-codes[killed[0]]}"
    else:
        rank, what = errors[0][1], errors[0][2]
    log = attempt / str(rank or 0) / "stderr.log" if attempt else None
    lines = _tail(log, _LAST_LINES) if log else []
    if not lines:
        log, lines = logs / "torchrun.log", agent[-_LAST_LINES:]
    what = what or (lines[-1] if lines else "it has said nothing")
    text = "\n".join([what, *lines])
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), None)
    if what.endswith("signal 9") and remedy is None:
        remedy = "often the kernel, out of memory: fewer data.workers, train.accumulation, or more memory"
    return Failure(rank=rank, host=host, what=what, lines=tuple(lines), log=log, remedy=remedy)


def told(failure: Failure) -> str:
    """Return a failure as a person reads it."""
    who = f"rank {failure.rank} on {failure.host}" if failure.rank is not None else failure.host
    lines = [f"failed: {who}: {failure.what}"]
    lines += [f"  | {line}" for line in failure.lines if line != failure.what]
    if failure.log is not None:
        lines.append(f"log: {failure.log}")
    if failure.remedy is not None:
        lines.append(f"try: {failure.remedy}")
    return "\n".join(lines)


def _last_attempt(logs: Path) -> Path | None:
    """Return torchrun's folder of its last round of processes: `LOGS/ID/attempt_N`."""
    rounds = [
        (path.stat().st_mtime, int(path.name.removeprefix("attempt_")), path)
        for path in logs.glob("*/attempt_*")
        if path.name.removeprefix("attempt_").isdigit()
    ]
    return max(rounds)[2] if rounds else None


def _errors(attempt: Path) -> list[tuple[float, int, str]]:
    """Return (time, rank, exception) of what processes have written down, the first in time first."""
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


def _only(codes: dict[int, int]) -> int | None:
    return next(iter(sorted(codes)), None)


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

"""What Slurm has given a job, and what it says of it: environment, `scontrol`, `squeue`."""

import re
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError

_LOWEST_PORT, _PORTS = 20_000, 10_000
"""Below 32768, where the ports begin that the system gives away."""
_PATIENCE = 60.0
"""Seconds for a controller that is busy."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A start of a job."""

    job_id: str
    """Of its own, also for an array's task."""
    array_id: str | None
    """Of the array."""
    task: int | None
    """Number of the array's task."""
    name: str
    nodes: str
    """As Slurm writes a list of nodes."""
    restarts: int
    """How often Slurm has started it before."""
    cpus_per_task: str | None

    @property
    def label(self) -> str:
        """Return what names this job to Slurm: an array's last task bears the array's id, which means them all."""
        return f"{self.array_id}_{self.task}" if self.task is not None else self.job_id

    @property
    def rdzv_id(self) -> str:
        """Return an id that no other start has."""
        return f"{self.job_id}.{self.restarts}"

    @property
    def default_run(self) -> Path:
        """Return the run folder of a job that names none; it stays the same when the job is queued again."""
        return Path("runs") / f"{plain(self.name)}-{self.label}"


def plain(name: str) -> str:
    """Return a job's name as a part of a folder's: what is neither letter, digit, dot nor dash is `_`."""
    return re.sub(r"[^\w.-]", "_", name)[:100]


def allocation(environment: Mapping[str, str]) -> Allocation:
    """Return what the batch shell's environment says.

    Raises:
        LaunchError: this is no batch job.

    """

    def number(name: str) -> str | None:
        value = environment.get(name, "")
        return value if re.fullmatch(r"[0-9]{1,18}", value) else None

    job_id, nodes = number("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
    if job_id is None or not nodes:
        raise LaunchError(
            "this is no Slurm job (SLURM_JOB_ID or SLURM_JOB_NODELIST is not set): start it by "
            "`sbatch slurm/finetune.sh` or `regraft submit`; without Slurm by `regraft train`"
        )
    task = number("SLURM_ARRAY_TASK_ID")
    return Allocation(
        job_id=job_id,
        array_id=number("SLURM_ARRAY_JOB_ID"),
        task=None if task is None else int(task),
        name=environment.get("SLURM_JOB_NAME", "job"),
        nodes=nodes,
        restarts=int(number("SLURM_RESTART_COUNT") or 0),
        cpus_per_task=number("SLURM_CPUS_PER_TASK"),
    )


def hosts(nodes: str) -> list[str]:
    """Return the names of the nodes in a list of Slurm's, in the order of SLURM_NODEID."""
    return _ask("scontrol", "show", "hostnames", nodes).split()


def addresses(nodes: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return how the nodes reach each other."""
    return find_addresses(names, _ask("scontrol", "show", "node", nodes, "-o"), resolves)


def find_addresses(names: Sequence[str], shown: str, resolves: Callable[[str], bool]) -> tuple[str, ...]:
    """Return for each node the first of its NodeAddr, NodeHostName and name that resolves.

    A node's name need not be known to anyone but Slurm. The name is handed on, not the number that it has here: to
    itself a machine is often 127.0.1.1.

    Raises:
        LaunchError: none of them does.

    """
    found: dict[str, list[str]] = {}
    for line in shown.splitlines():
        fields = dict(part.partition("=")[::2] for part in line.split() if "=" in part)
        known = [fields[key] for key in ("NodeAddr", "NodeHostName") if key in fields]
        found[fields.get("NodeName", "")] = known
    chosen = []
    for name in names:
        candidates = [*found.get(name, []), name]
        address = next(filter(resolves, candidates), None)
        if address is None:
            raise LaunchError(
                f"node {name}: none of {', '.join(dict.fromkeys(candidates))} is an address that resolves here; "
                "expected NodeAddr of `scontrol show node` to be one: ask the cluster's administrator"
            )
        chosen.append(address)
    return tuple(chosen)


def resolves(name: str) -> bool:
    """Return whether a name is known as an address on this machine."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def port_of(job_id: str, is_free: Callable[[int], bool]) -> int:
    """Return the port of a job's rendezvous: its own by its id, the next one that is free."""
    first = int(job_id) % _PORTS
    candidates = (_LOWEST_PORT + (first + i) % _PORTS for i in range(100))
    port = next(filter(is_free, candidates), None)
    if port is None:
        raise LaunchError(
            f"no port from {_LOWEST_PORT + first} on is free on this node: start the job on another one"
        )
    return port


def is_free(port: int) -> bool:
    """Return whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that has ended is nobody
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def state_of(label: str) -> tuple[str, str]:
    """Return a job's state and its reason, as Slurm has them now."""
    state, _, reason = (
        _ask("squeue", "--noheader", "--states=all", "--format=%T %r", f"--jobs={label}")
        .strip()
        .partition(" ")
    )
    return state, reason


def requeue(label: str) -> None:
    """Have Slurm queue a job again; raises a LaunchError that says why it would not."""
    _ask("scontrol", "requeue", label)


def _ask(*command: str, again: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGTERM and again:
            # Slurm's word that the job ends or is queued again goes to all processes of the batch script: to this one.
            return _ask(*command, again=False)
        said = " ".join((error.stderr or error.stdout).split())
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    else:
        return done.stdout
    raise LaunchError(f"{' '.join(command[:2])} has failed: {said}")

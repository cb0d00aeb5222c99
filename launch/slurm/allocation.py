"""Read a job's allocation from the environment, and query Slurm with `scontrol` and `squeue`."""

import re
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError

_FIRST_PORT, _PORT_COUNT = 20_000, 10_000
"""Ports for the rendezvous: below 32768, where the system's own choice of ports starts."""
_TIMEOUT_SECONDS = 60.0
"""How long to wait for a busy Slurm controller."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One start of a job."""

    job_id: str
    """Id of the job; each task of an array has one of its own."""
    array_id: str | None
    """Id of the array, None outside an array."""
    task: int | None
    """Index of the array task."""
    name: str
    """Name of the job."""
    nodes: str
    """Slurm's list of nodes, such as `node[1-2]`."""
    restarts: int
    """How often Slurm has started the job before."""
    cpus_per_task: str | None
    """Value of --cpus-per-task."""

    @property
    def label(self) -> str:
        """Return the id to give to Slurm; the plain id of an array's last task would name the whole array."""
        return f"{self.array_id}_{self.task}" if self.task is not None else self.job_id

    @property
    def rdzv_id(self) -> str:
        """Return a rendezvous id that no other start of a job has."""
        return f"{self.job_id}.{self.restarts}"

    @property
    def default_run_folder(self) -> Path:
        """Return the run folder of a job without run.dir; it stays the same when the job is requeued."""
        return Path("runs") / f"{to_folder_name(self.name)}-{self.label}"


def to_folder_name(job_name: str) -> str:
    """Return a job's name as part of a folder name: only letters, digits, dots and dashes stay."""
    return re.sub(r"[^\w.-]", "_", job_name)[:100]


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """Read the allocation from the environment of the batch script.

    Raises:
        LaunchError: this process is not part of a Slurm job.

    """

    def number(name: str) -> str | None:
        value = environment.get(name, "")
        return value if re.fullmatch(r"[0-9]{1,18}", value) else None

    job_id, nodes = number("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
    if job_id is None or not nodes:
        raise LaunchError(
            "this is not a Slurm job (SLURM_JOB_ID or SLURM_JOB_NODELIST is not set): start it with "
            "`sbatch slurm/finetune.sh` or `regraft submit`; without Slurm, use `regraft train`"
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


def node_names(nodes: str) -> list[str]:
    """Return the names in one of Slurm's node lists, in the order of SLURM_NODEID."""
    return _run_slurm("scontrol", "show", "hostnames", nodes).split()


def node_addresses(nodes: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses at which the nodes reach each other."""
    return resolve_node_addresses(names, _run_slurm("scontrol", "show", "node", nodes, "-o"), is_resolvable)


def resolve_node_addresses(
    names: Sequence[str], scontrol_output: str, is_resolvable: Callable[[str], bool]
) -> tuple[str, ...]:
    """Return for each node the first of its NodeAddr, NodeHostName and name that can be resolved.

    Only Slurm may know a node's name. The result has names and not IP addresses: a machine often resolves its own name
    to 127.0.1.1.

    Raises:
        LaunchError: no address of a node can be resolved.

    """
    known: dict[str, list[str]] = {}
    for line in scontrol_output.splitlines():
        fields = dict(part.partition("=")[::2] for part in line.split() if "=" in part)
        known[fields.get("NodeName", "")] = [fields[key] for key in ("NodeAddr", "NodeHostName") if key in fields]
    addresses = []
    for name in names:
        candidates = [*known.get(name, []), name]
        address = next(filter(is_resolvable, candidates), None)
        if address is None:
            raise LaunchError(
                f"node {name}: none of {', '.join(dict.fromkeys(candidates))} can be resolved here; expected "
                "NodeAddr of `scontrol show node` to be a resolvable address: ask the cluster's administrator"
            )
        addresses.append(address)
    return tuple(addresses)


def is_resolvable(name: str) -> bool:
    """Return whether this machine can resolve a host name."""
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def choose_port(job_id: str, is_free: Callable[[int], bool]) -> int:
    """Return a free port for a job's rendezvous; the first candidate depends on the job id."""
    offset = int(job_id) % _PORT_COUNT
    candidates = (_FIRST_PORT + (offset + i) % _PORT_COUNT for i in range(100))
    port = next(filter(is_free, candidates), None)
    if port is None:
        raise LaunchError(f"no port from {_FIRST_PORT + offset} on is free on this node: start the job on another one")
    return port


def is_port_free(port: int) -> bool:
    """Return whether no process listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection does not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def job_state(label: str) -> tuple[str, str]:
    """Return the state of a job and its reason, as `squeue` shows them now."""
    output = _run_slurm("squeue", "--noheader", "--states=all", "--format=%T %r", f"--jobs={label}")
    state, _, reason = output.strip().partition(" ")
    return state, reason


def requeue(label: str) -> None:
    """Requeue a job; raises a LaunchError with Slurm's message if Slurm refuses."""
    _run_slurm("scontrol", "requeue", label)


def _run_slurm(*command: str, retry: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGTERM and retry:
            # When a job ends or is requeued, Slurm signals all processes of the batch script, including this command.
            return _run_slurm(*command, retry=False)
        message = " ".join((error.stderr or error.stdout).split())
    except (OSError, subprocess.TimeoutExpired) as error:
        message = str(error)
    else:
        return done.stdout
    raise LaunchError(f"{' '.join(command[:2])} failed: {message}")

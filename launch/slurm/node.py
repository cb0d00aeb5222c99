"""A node's part of a Slurm job: `srun` starts this once on each node, and this starts torchrun.

srun --> launch.slurm.node (one a node) --> torchrun --> the trainer's processes

After a stop it leaves with 0, whatever torchrun says (1, after every signal): `srun --kill-on-bad-exit` would end the
other nodes, where rank 0 may still be saving.
"""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch import contract, machine
from launch.errors import LaunchError
from launch.failures import rounds, users_round
from launch.local.command import Local, environment, processes_and_threads
from launch.local.torchrun import PASSED_ON, run_agent

SECONDS_TO_MEET = 600
"""How long nodes wait for each other: they start at different times, and import torch from a shared disk."""
SECONDS_TO_MEET_STAGED = 3600
"""The same where each node copies the data first."""
SECONDS_TO_OUTLIVE = 35.0
"""How long the trainer's processes may take to save after torchrun has ended; they leave by themselves after 30."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ASKED = "asked"
"""File of a node's logs: the signal that asked it to stop. A preemption may tell the nodes and not the batch script."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all nodes of a job are told; the job's first node works it out (launch/slurm/job.py)."""

    addresses: tuple[str, ...]
    """Of the nodes, as the others reach them; by SLURM_NODEID."""
    port: int
    """Of the rendezvous, on the first node."""
    rdzv_id: str
    """Another one for every start of every job, so that two never meet."""
    logs: Path
    """Folder of this start."""
    nproc: int | None = None
    """Processes of each node; None: by its GPUs or cores."""
    max_restarts: int = 0
    """How often torchrun starts failed processes again."""
    stage: str | None = None
    """Folder of the node's own disk to which the data is copied first; may begin with $TMPDIR."""
    options: tuple[str, ...] = ()
    """The trainer's."""

    def words(self) -> list[str]:
        """Return the command line from which `parse` makes this again."""
        chosen = {"--nproc": self.nproc, "--stage": self.stage}
        return [
            f"--addresses={','.join(self.addresses)}",
            f"--port={self.port}",
            f"--rdzv-id={self.rdzv_id}",
            f"--logs={self.logs}",
            f"--max-restarts={self.max_restarts}",
            *(f"{name}={value}" for name, value in chosen.items() if value is not None),
            "--",
            *self.options,
        ]


def parse(words: Sequence[str]) -> Job:
    """Return the job that `Job.words` has written down."""
    own = list(words[: words.index("--")]) if "--" in words else list(words)
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm.node", allow_abbrev=False, description=__doc__
    )
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rdzv-id", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--stage")
    found = parser.parse_args(own)
    return Job(
        addresses=tuple(found.addresses.split(",")),
        port=found.port,
        rdzv_id=found.rdzv_id,
        logs=found.logs,
        nproc=found.nproc,
        max_restarts=found.max_restarts,
        stage=found.stage,
        options=tuple(words[len(own) + 1 :]),
    )


def torchrun(job: Job, *, node: int, processes: int, trainer: Path, options: Sequence[str]) -> list[str]:
    """Return torchrun's command line on a node.

    Each node leaves the standard output of its first process to torchrun: which node gets rank 0 is decided by the
    rendezvous, and rank 0 alone speaks.
    """
    seconds = SECONDS_TO_MEET if job.stage is None else SECONDS_TO_MEET_STAGED
    # Without is_host, a node whose name looks like the endpoint's would take itself for the host. read_timeout: the
    # others knock at the host's door so long.
    settings = f"is_host={'true' if node == 0 else 'false'},join_timeout={seconds},read_timeout={seconds}"
    redirects = ",".join(["0:2", *(f"{rank}:3" for rank in range(1, processes))])
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(job.addresses)}",
        f"--nproc-per-node={processes}",
        f"--max-restarts={job.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job.rdzv_id}",
        f"--rdzv-endpoint={_endpoint(job.addresses[0], job.port)}",
        f"--rdzv-conf={settings}",
        f"--local-addr={job.addresses[node]}",
        f"--log-dir={node_logs(job.logs, node)}",
        f"--redirects={redirects}",
        str(trainer / "main.py"),
        *options,
    ]


def node_logs(logs: Path, node: int) -> Path:
    """Return the folder of a node's logs within those of a start."""
    return logs / f"node-{node}"


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def cores_and_gpus(environment: Mapping[str, str], *, cores: int, gpus: int) -> tuple[int, int]:
    """Return what of a machine's cores and GPUs is this task's: Slurm does not bind processes everywhere."""

    def least(found: int, *names: str) -> int:
        given = next((environment[name] for name in names if environment.get(name, "").isdigit()), None)
        return found if given is None else min(found, int(given))

    return (
        max(1, least(cores, "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")),
        least(gpus, "SLURM_GPUS_ON_NODE"),
    )


@contextmanager
def staged(
    options: Sequence[str], folder: str | None, environment: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """Have the data on the node's own disk for a block, which gets the options that name the copy.

    A data set known by name, or a CSV, is read where it is.

    Raises:
        LaunchError: $TMPDIR is not set, or there is no room.

    """
    root = contract.given(options, "data", "root")
    if folder is None or root is None or not Path(root).expanduser().is_dir():
        if folder is not None:
            print(f"stage: data.root ({root}) is no folder, and is read where it is", file=sys.stderr)
        yield tuple(options)
        return
    source = Path(root).expanduser().absolute()
    # Two nodes of a test may be one machine, and two jobs share a node.
    own = (
        stage_folder(folder, environment)
        / f"regraft-{environment['SLURM_JOB_ID']}-{environment['SLURM_NODEID']}"
    )
    try:
        try:
            shutil.rmtree(own, ignore_errors=True)  # what a start that was killed has left
            shutil.copytree(source, own / source.name)
        except (OSError, shutil.Error) as error:
            raise LaunchError(
                f"stage: {source} cannot be copied to {own} ({error}): make room, or drop it"
            ) from None
        yield (*options, f"--data.root={own / source.name}")
    finally:
        shutil.rmtree(own, ignore_errors=True)


def stage_folder(folder: str, environment: Mapping[str, str]) -> Path:
    """Return the folder on a node's own disk; raises a LaunchError where the node sets no TMPDIR to begin it with."""
    if not folder.startswith("$TMPDIR"):
        return Path(folder)
    if not environment.get("TMPDIR"):
        raise LaunchError(
            f"stage is {folder}, but this node sets no TMPDIR: name a folder of the node's own disk"
        )
    return Path(environment["TMPDIR"] + folder.removeprefix("$TMPDIR"))


def run(job: Job, node: int) -> int:
    """Run this node's torchrun to its end; returns 0 also after a stop, 2 for what the user has to mend, else 1."""
    cores, gpus = cores_and_gpus(os.environ, cores=machine.cores(), gpus=machine.gpus(os.environ))
    processes, threads = processes_and_threads(job.nproc, gpus=gpus, cores=cores)
    trainer, logs = contract.trainer_folder(), node_logs(job.logs, node)
    local = Local(
        processes=processes,
        threads=threads,
        max_restarts=job.max_restarts,
        trainer=trainer,
        options=job.options,
        logs=logs,
    )
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals = _Signals()
    # Of all nodes: where a run is moved aside, the logs of this start stay.
    variables = {**environment(local, os.environ), contract.LOG_FOLDER: str(job.logs)}
    try:
        with staged(job.options, job.stage, os.environ) as options:
            signals.interrupt = False
            command = torchrun(job, node=node, processes=processes, trainer=trainer, options=options)
            ended = run_agent(command, variables, logs, look=lambda: users_round(logs, rounds(logs)) is None)
            if ended.asked is not None:
                _note_down(logs, ended.asked)
                _wait_for_orphans()
    except _Interrupted as asked:
        _note_down(logs, asked.number)
        return contract.DONE
    if ended.code == 0 or ended.asked is not None:
        return contract.DONE
    return contract.USER_ERROR if users_round(logs, rounds(logs)) else contract.FAILED


class _Interrupted(BaseException):
    """A signal came before torchrun was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """What comes before torchrun is started interrupts what is done; what comes after it has ended does nothing."""

    def __init__(self) -> None:
        self.interrupt = True
        for number in PASSED_ON:
            signal.signal(number, self._came)

    def _came(self, number: int, _: FrameType | None) -> None:
        if self.interrupt:
            self.interrupt = False
            raise _Interrupted(number)


def _note_down(logs: Path, asked: int) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    (logs / ASKED).write_text(signal.Signals(asked).name, encoding="ascii")


def _wait_for_orphans() -> None:
    """Wait for processes whose torchrun has ended before them: Slurm ends a step with its tasks.

    When a job is cancelled, Slurm and srun signal all of its processes several times over, and the third TERM ends a
    torchrun that waits for its own.
    """
    until = time.monotonic() + SECONDS_TO_OUTLIVE
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
        except ChildProcessError:
            return


def main(words: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    job = parse(sys.argv[1:] if words is None else words)
    node = os.environ.get("SLURM_NODEID", "")
    try:
        if not (node.isdigit() and int(node) < len(job.addresses)):
            raise LaunchError(
                f"SLURM_NODEID is {node!r}, expected 0 to {len(job.addresses) - 1}: this is started by srun, which "
                "`sbatch slurm/finetune.sh` starts"
            )
        return run(job, int(node))
    except (LaunchError, OSError, RuntimeError) as error:  # the last: no such home folder
        print(f"error: node {node}: {error}", file=sys.stderr)
        return contract.FAILED


if __name__ == "__main__":
    sys.exit(main())

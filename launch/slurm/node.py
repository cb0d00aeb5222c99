"""Run one node of a Slurm job; `srun` starts this program once per node, and it starts torchrun.

srun --> launch.slurm.node (one per node) --> torchrun --> the trainer's processes

After a stop it exits with code 0, although torchrun exits with 1 after every signal: `srun --kill-on-bad-exit` would
kill the other nodes, where rank 0 may still be saving.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launch import machine
from launch.errors import LaunchError
from launch.failures import find_user_error, restart_dirs
from launch.local.process import become_subreaper
from launch.local.torchrun import TorchrunConfig, run_torchrun, torchrun_command, trainer_environment
from launch.trainer_options import option_value, trainer_folder
from regraft.contract import DONE, FAILED, LOG_FOLDER, USER_ERROR
from regraft.startup_signals import STOP_SIGNALS

JOIN_SECONDS = 600
"""How long nodes wait for each other: they start at different times, and load torch from a shared disk."""
JOIN_SECONDS_STAGED = 3600
"""The same if each node first copies the data."""
ORPHAN_SECONDS = 35.0
"""How long the trainer's processes may save after torchrun has ended; they exit by themselves after 30 s."""
SIGNAL_FILE = "signal"
"""File in a node's logs with the signal that stopped it; a preemption may signal the nodes but not the batch script."""


@dataclass(frozen=True, kw_only=True)
class NodeTask:
    """What the job's first node tells all nodes (launch/slurm/job.py)."""

    addresses: tuple[str, ...]
    """Addresses at which the nodes reach each other, in the order of SLURM_NODEID."""
    port: int
    """Port of the rendezvous on the first node."""
    rdzv_id: str
    """Id of the rendezvous, different for each start of each job."""
    logs: Path
    """Log folder of this start of the job."""
    nproc: int | None = None
    """Number of processes per node; None: chosen by its GPUs or cores."""
    max_restarts: int = 0
    """How often torchrun restarts failed processes."""
    stage: str | None = None
    """Folder on the node's local disk to which the data is copied first; may start with $TMPDIR."""
    options: tuple[str, ...] = ()
    """Command-line options of the trainer."""

    def to_argv(self) -> list[str]:
        """Return the command-line arguments that `parse` turns into this task again."""
        optional = {"--nproc": self.nproc, "--stage": self.stage}
        return [
            f"--addresses={','.join(self.addresses)}",
            f"--port={self.port}",
            f"--rdzv-id={self.rdzv_id}",
            f"--logs={self.logs}",
            f"--max-restarts={self.max_restarts}",
            *(f"{name}={value}" for name, value in optional.items() if value is not None),
            "--",
            *self.options,
        ]


def parse(argv: Sequence[str]) -> NodeTask:
    """Parse the arguments of `NodeTask.to_argv`."""
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.node", allow_abbrev=False, description=__doc__)
    parser.add_argument("--addresses", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rdzv-id", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--stage")
    arguments = vars(parser.parse_args(own))
    addresses = tuple(arguments.pop("addresses").split(","))
    return NodeTask(addresses=addresses, options=tuple(argv[len(own) + 1 :]), **arguments)


def rendezvous_options(task: NodeTask, *, node: int) -> list[str]:
    """Return torchrun's rendezvous options on a node: all nodes meet on the first one."""
    seconds = JOIN_SECONDS if task.stage is None else JOIN_SECONDS_STAGED
    # Without is_host, a node whose name resembles the endpoint would act as the host. read_timeout limits how long the
    # other nodes try to connect to the host.
    settings = f"is_host={'true' if node == 0 else 'false'},join_timeout={seconds},read_timeout={seconds}"
    host = task.addresses[0]
    return [
        f"--nnodes={len(task.addresses)}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={task.rdzv_id}",
        f"--rdzv-endpoint={f'[{host}]' if ':' in host else host}:{task.port}",
        f"--rdzv-conf={settings}",
        f"--local-addr={task.addresses[node]}",
    ]


def node_logs(logs: Path, node: int) -> Path:
    """Return the log folder of a node within that of a start."""
    return logs / f"node-{node}"


def cores_and_gpus(environment: Mapping[str, str], *, cores: int, gpus: int) -> tuple[int, int]:
    """Return the cores and GPUs that Slurm gave to this task; not every cluster restricts processes to them."""

    def limit(available: int, *names: str) -> int:
        value = next((environment[name] for name in names if environment.get(name, "").isdigit()), None)
        return available if value is None else min(available, int(value))

    return (max(1, limit(cores, "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")), limit(gpus, "SLURM_GPUS_ON_NODE"))


@contextmanager
def staged_data(
    options: Sequence[str], folder: str | None, environment: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """Copy the data to the node's local disk for the duration of a block; yields the options with the copy's path.

    A data set that is given by name, or as a CSV file, is read where it is.

    Raises:
        LaunchError: $TMPDIR is not set, or the data cannot be copied.

    """
    root = option_value(options, "data", "root")
    if folder is None or root is None or not Path(root).expanduser().is_dir():
        if folder is not None:
            print(f"stage: data.root ({root}) is not a folder, and is not copied", file=sys.stderr)
        yield tuple(options)
        return
    source = Path(root).expanduser().absolute()
    # Two jobs may share a node.
    name = f"regraft-{environment['SLURM_JOB_ID']}-{environment['SLURM_NODEID']}"
    copy = stage_folder(folder, environment) / name
    try:
        try:
            shutil.rmtree(copy, ignore_errors=True)  # left by a start that was killed
            shutil.copytree(source, copy / source.name)
        except (OSError, shutil.Error) as error:
            raise LaunchError(
                f"stage: {source} cannot be copied to {copy} ({error}): free some space, or drop --stage"
            ) from None
        yield (*options, f"--data.root={copy / source.name}")
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def stage_folder(folder: str, environment: Mapping[str, str]) -> Path:
    """Return the folder on a node's local disk; raises a LaunchError if it starts with $TMPDIR and that is not set."""
    if not folder.startswith("$TMPDIR"):
        return Path(folder)
    if not environment.get("TMPDIR"):
        raise LaunchError(
            f"stage is {folder}, but TMPDIR is not set on this node: give a folder on the node's local disk"
        )
    return Path(environment["TMPDIR"] + folder.removeprefix("$TMPDIR"))


def run(task: NodeTask, node: int) -> int:
    """Run torchrun on this node to its end; return 0 also after a stop, 2 for a user's error, else 1."""
    gpus = machine.gpus(os.environ)
    cores, gpus = cores_and_gpus(os.environ, cores=machine.usable_cores(gpus), gpus=gpus)
    processes, threads = machine.processes_and_threads(task.nproc, gpus=gpus, cores=cores)
    logs = node_logs(task.logs, node)
    config = TorchrunConfig(
        processes=processes,
        threads=threads,
        max_restarts=task.max_restarts,
        trainer=trainer_folder(),
        options=task.options,
        logs=logs,
    )
    become_subreaper()
    signals = _Signals()
    # The log folder of all nodes, not of this one: the trainer keeps it in place when it archives a run.
    environment = {**trainer_environment(config, os.environ), LOG_FOLDER: str(task.logs)}

    def user_error() -> Path | None:
        return find_user_error(logs, restart_dirs(logs))

    try:
        with staged_data(task.options, task.stage, os.environ) as options:
            signals.interrupt = False
            command = torchrun_command(replace(config, options=options), rendezvous_options(task, node=node))
            result = run_torchrun(command, environment, logs, keep_running=lambda: user_error() is None)
            if result.signal is not None:
                _record_signal(logs, result.signal)
                _wait_for_orphans()
    except _Interrupted as interruption:
        _record_signal(logs, interruption.signal)
        return DONE
    if result.code == 0 or result.signal is not None:
        return DONE
    return USER_ERROR if user_error() else FAILED


class _Interrupted(BaseException):
    """A signal came before torchrun was started."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class _Signals:
    """Signals interrupt this program before torchrun is started; after torchrun has ended they are ignored."""

    def __init__(self) -> None:
        self.interrupt = True
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.interrupt:
            self.interrupt = False
            raise _Interrupted(number)


def _record_signal(logs: Path, number: int) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    (logs / SIGNAL_FILE).write_text(signal.Signals(number).name, encoding="ascii")


def _wait_for_orphans() -> None:
    """Wait for trainer processes that torchrun left behind, since Slurm ends a step when its tasks end.

    When a job is cancelled, Slurm and srun signal all of its processes several times; the third SIGTERM ends torchrun
    while it waits for its processes.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.1)
        except ChildProcessError:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node, and return the exit code."""
    task = parse(sys.argv[1:] if argv is None else argv)
    node = os.environ.get("SLURM_NODEID", "")
    try:
        if not (node.isdigit() and int(node) < len(task.addresses)):
            raise LaunchError(
                f"SLURM_NODEID is {node!r}, expected 0 to {len(task.addresses) - 1}: srun must start this program, as "
                "`sbatch slurm/finetune.sh` does"
            )
        return run(task, int(node))
    except (LaunchError, OSError, RuntimeError) as error:  # RuntimeError: the home folder does not exist
        print(f"error: node {node}: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())

"""Run a Slurm job on its first node; `slurm/finetune.sh` replaces the batch shell by this program.

launch.slurm.job --> srun --> launch.slurm.node (one per node) --> torchrun --> the trainer's processes

It chooses the run folder and the rendezvous of the nodes. It forwards the signals that Slurm sends to the batch shell
only (SIGUSR1 before the time limit). Finally it requeues the job if launch/slurm/requeue.py decides so.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch import machine
from launch.errors import LaunchError
from launch.failures import Failure, first_failure, first_of, format_failure, lost_logs
from launch.options import split_options
from launch.slurm import allocation, container, node
from launch.slurm.allocation import Allocation
from launch.slurm.requeue import JobOutcome, JobOwner, decide, job_owner
from launch.slurm.settings import OPTION_NAMES, JobSettings, add_arguments, make_settings, task_options
from launch.stop_signal import write_stop_signal
from launch.text import escape_unprintable
from launch.trainer_options import new_logs, option_value
from regraft.contract import DONE, FAILED, LOGS, USER_ERROR, read_attempts
from regraft.startup_signals import STOP_SIGNALS


class SignalForwarder:
    """Remembers the first signal, and forwards it to the job step."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal."""
        self._step: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def forward_to(self, step: subprocess.Popen[bytes]) -> None:
        """Forward signals to this `srun`, including one that came before it was started."""
        self._step = step
        if self.signal is not None:
            self._forward()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            self._forward()

    def _forward(self) -> None:
        if self._step is not None:
            self._step.send_signal(signal.SIGUSR1)  # the one signal that srun forwards and does not react to


def resolve_run_dir(
    options: Sequence[str], settings: JobSettings, job: Allocation, workdir: Path
) -> tuple[Path, tuple[str, ...]]:
    """Return the run folder of a job, and the trainer's options with this folder.

    The folder is the same for each start of the job. Each task of an array has a folder of its own: a subfolder of the
    given one, unless the task's own options set run.dir.

    Raises:
        LaunchError: the home folder does not exist, or the sweep has no line for the task.

    """
    own_options = task_options(settings.sweep, job.task or 0) if settings.sweep is not None else []
    argv = [*options, *own_options]
    own_folder = option_value(own_options, "run", "dir")
    folder = own_folder or option_value(options, "run", "dir")
    if folder is None:
        run = job.default_run_folder
    elif job.task is not None and own_folder is None:
        run = Path(folder) / str(job.task)
    else:
        run = Path(folder)
    try:
        run = workdir / run.expanduser()
    except RuntimeError:
        raise LaunchError(f"run.dir is {run}, but this home folder does not exist: give an absolute path") from None
    argv.append(f"--run.dir={run}")
    if job.restarts and option_value(argv, "run", "resume") == "never":
        argv.append("--run.resume=auto")  # `never` applies to the first start of the job
    return run, tuple(argv)


def srun_command(
    job: Allocation, nodes: int, settings: JobSettings, mounts: Sequence[Path], workdir: Path
) -> list[str]:
    """Return the command that starts one task on each node."""
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",  # otherwise the other nodes would wait in a collective
        "--wait=60",
        "--export=ALL",
        f"--job-name={job.rdzv_id}",  # the job's own name may contain any character
        *container.pyxis_options(settings, mounts, workdir),
    ]


def step_environment(job: Allocation, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the job step; srun does not inherit --cpus-per-task from the job."""
    if job.cpus_per_task is None:
        return dict(inherited)
    return {**inherited, "SRUN_CPUS_PER_TASK": job.cpus_per_task}


def run(argv: Sequence[str], forwarder: SignalForwarder) -> int:
    """Run one start of the job to its end, and return the exit code of the batch script.

    Raises:
        LaunchError: an option, the environment or the cluster is not as the job needs it.

    """
    own, options = split_options(argv, OPTION_NAMES)
    parser = argparse.ArgumentParser(prog="slurm/finetune.sh", allow_abbrev=False)
    add_arguments(parser)
    settings = make_settings(parser.parse_args(own), os.environ)
    job = allocation.read_allocation(os.environ)
    folder, trainer_options = resolve_run_dir(options, settings, job, Path.cwd())
    attempts_before = read_attempts(folder)
    if job.restarts and attempts_before and attempts_before[-1].state == "done":
        _print(job, f"{folder} is already done")
        return DONE

    hosts = allocation.node_names(job.nodes)
    logs = new_logs(folder)
    logs = logs.with_name(f"{logs.name}-job-{job.label}.{job.restarts}")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"run.dir {folder}: cannot be written to ({error}); choose another folder") from None
    _print(job, f"start {job.restarts + 1} on {', '.join(hosts)}; run folder {folder}")
    code = _run_step(job, settings, _node_task(job, settings, hosts, logs, trainer_options), folder, forwarder)

    failure = _first_failure(logs, hosts)
    outcome = JobOutcome(
        attempts_before=tuple(attempts_before),
        attempts_after=tuple(read_attempts(folder)),
        signal=forwarder.signal or (_signal_on_nodes(logs, len(hosts)) if code == 0 else None),
        owner=_job_owner(job),
        user_error=failure.is_user_error,
        succeeded=code == 0,
        restarts=job.restarts,
        max_attempts=settings.max_attempts,
    )
    if outcome.signal is not None and outcome.attempts_after:
        write_stop_signal(logs, outcome.attempts_after[-1].attempt, outcome.signal)
    decision = decide(outcome)
    if decision.code in (FAILED, USER_ERROR):
        print(format_failure(failure), file=sys.stderr, flush=True)
    _print(job, f"{decision.reason}: {'requeued' if decision.requeue else f'exit code {decision.code}'}")
    if decision.requeue:
        _requeue(job, folder)
    return decision.code


def _requeue(job: Allocation, folder: Path) -> None:
    # If the trainer has archived the run, the folder of Slurm's output file was moved with it.
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        allocation.requeue(job.label)
    except LaunchError as error:
        _print(job, f"could not be requeued ({error}): submit the same job again to resume")


def _node_task(
    job: Allocation, settings: JobSettings, hosts: Sequence[str], logs: Path, options: tuple[str, ...]
) -> node.NodeTask:
    return node.NodeTask(
        addresses=allocation.node_addresses(job.nodes, hosts),
        port=allocation.choose_port(job.job_id, allocation.is_port_free),
        rdzv_id=job.rdzv_id,
        logs=logs,
        nproc=settings.nproc,
        max_restarts=settings.max_restarts,
        stage=settings.stage,
        options=options,
    )


def _run_step(
    job: Allocation, settings: JobSettings, task: node.NodeTask, folder: Path, forwarder: SignalForwarder
) -> int:
    """Run srun to its end, and return its exit code."""
    workdir, in_container = Path.cwd(), settings.container is not None
    mounts = _mounts(settings, task.options, folder, workdir)
    _, gpus = node.cores_and_gpus(os.environ, cores=1, gpus=machine.gpus(os.environ))
    command = [
        *srun_command(job, len(task.addresses), settings, mounts, workdir),
        *container.apptainer_argv(settings, mounts, workdir, gpus=gpus > 0),
        container.PYTHON if in_container else sys.executable,
        "-m",
        "launch.slurm.node",
        *task.to_argv(),
    ]
    try:
        step = subprocess.Popen(command, env=step_environment(job, os.environ), stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LaunchError(f"srun cannot be started ({error}): it is part of Slurm, and must be in PATH") from None
    forwarder.forward_to(step)
    return step.wait()


def _mounts(settings: JobSettings, options: Sequence[str], folder: Path, workdir: Path) -> list[Path]:
    """Return the folders that a container needs: working folder, run, data, weights and cache."""
    if settings.container is None:
        return []
    stage = node.stage_folder(settings.stage, os.environ) if settings.stage else None
    paths = [
        option_value(options, *key)
        for key in (("data", "root"), ("data", "cache"), ("source", "root"), ("model", "weights"))
    ]
    paths.append(os.environ.get("REGRAFT_CACHE", "~/.cache/regraft"))
    folders = [_folder(path) for path in paths if path is not None]
    return container.mounted_folders(settings, [workdir, folder, stage, *folders])


def _folder(path_option: str) -> Path | None:
    """Return the folder of a path given as an option, None if it does not exist."""
    try:
        path = Path(path_option).expanduser().absolute()
        return path if path.is_dir() else path.parent if path.is_file() else None
    except (OSError, RuntimeError):  # an unknown ~user: the trainer reports it
        return None


def _first_failure(logs: Path, hosts: Sequence[str]) -> Failure:
    """Return the first failure of all nodes."""
    if not logs.exists():
        return lost_logs(logs)
    return first_of([first_failure(node.node_logs(logs, i), host=host) for i, host in enumerate(hosts)])


def _signal_on_nodes(logs: Path, count: int) -> str | None:
    """Return the signal that a node received; only valid if no node failed, or it may be a consequence of that."""
    files = [node.node_logs(logs, i) / node.SIGNAL_FILE for i in range(count)]
    return next((path.read_text(encoding="ascii") for path in files if path.exists()), None)


def _job_owner(job: Allocation) -> JobOwner:
    try:
        state, reason = allocation.job_state(job.label)
    except LaunchError as error:
        _print(job, f"Slurm does not report the state of this job ({error})")
        return job_owner(None, "")
    return job_owner(state or None, reason)


def _print(job: Allocation, message: str) -> None:
    print(f"job {job.label}: {escape_unprintable(message)}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job, and return the exit code."""
    forwarder = SignalForwarder()
    try:
        return run(sys.argv[1:] if argv is None else argv, forwarder)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

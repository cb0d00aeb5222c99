"""A Slurm job, on its first node: `slurm/finetune.sh` becomes this, in the batch shell's place.

launch.slurm.job --> srun --> launch.slurm.node (one a node) --> torchrun --> the trainer's processes

It settles where the run lies and where the nodes meet, passes on the signals that Slurm gives the batch shell alone
(USR1 ahead of the time limit), and queues the job again where launch/slurm/requeue.py says so.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from launch import contract, machine
from launch.errors import LaunchError
from launch.failures import Failure, first_failure, first_of, told
from launch.local.command import split_options
from launch.slurm import allocation as slurm
from launch.slurm import container, node
from launch.slurm import requeue as lifecycle
from launch.slurm.allocation import Allocation
from launch.slurm.settings import NAMES, Settings, add_to, settings, sweep_options

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Asked:
    """Remembers the first signal that comes, and passes it on to the step."""

    def __init__(self) -> None:
        self.by: str | None = None
        """Its name."""
        self._step: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._came)

    def of(self, step: subprocess.Popen[bytes]) -> None:
        """Pass signals on to this `srun`, the one that has come before included."""
        self._step = step
        if self.by is not None:
            self._pass_on()

    def _came(self, number: int, _: FrameType | None) -> None:
        if self.by is None:
            self.by = signal.Signals(number).name
            self._pass_on()

    def _pass_on(self) -> None:
        if self._step is not None:
            self._step.send_signal(
                signal.SIGUSR1
            )  # which srun hands to its tasks, and has no view of its own on


def settle(
    options: Sequence[str], chosen: Settings, job: Allocation, here: Path
) -> tuple[Path, tuple[str, ...]]:
    """Return the run folder of a job and the trainer's options, which name it.

    It is the same at each start of the job. An array's tasks have folders of their own: below the one that was given,
    unless the task's own options give it.

    Raises:
        LaunchError: there is no such home folder, or no line of options for the task.

    """
    own = sweep_options(chosen.sweep, job.task or 0) if chosen.sweep is not None else []
    words = [*options, *own]
    asked = contract.given(own, "run", "dir")
    folder = asked or contract.given(options, "run", "dir")
    if folder is None:
        run = job.default_run
    elif job.task is not None and asked is None:
        run = Path(folder) / str(job.task)
    else:
        run = Path(folder)
    try:
        run = here / run.expanduser()
    except RuntimeError:
        raise LaunchError(
            f"run.dir is {run}, and there is no such home folder: give the whole path"
        ) from None
    words.append(f"--run.dir={run}")
    if job.restarts and contract.given(words, "run", "resume") == "never":
        words.append("--run.resume=auto")  # it was meant for the first start
    return run, tuple(words)


def srun(job: Allocation, nodes: int, chosen: Settings, mounts: Sequence[Path], here: Path) -> list[str]:
    """Return the command that starts one task on each node."""
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",  # or the others would wait in a collective
        "--wait=60",
        "--export=ALL",
        f"--job-name={job.rdzv_id}",  # its own is anything
        *container.srun_words(chosen, mounts, here),
    ]


def step_environment(job: Allocation, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the step: srun takes over no --cpus-per-task by itself."""
    if job.cpus_per_task is None:
        return dict(inherited)
    return {**inherited, "SRUN_CPUS_PER_TASK": job.cpus_per_task}


def run(words: Sequence[str], asked: Asked) -> int:
    """Run a start of the job to its end, and return the batch script's exit code.

    Raises:
        LaunchError: the options, the environment or the cluster are not what a job needs.

    """
    own, options = split_options(words, NAMES)
    parser = argparse.ArgumentParser(prog="slurm/finetune.sh", allow_abbrev=False)
    add_to(parser)
    chosen = settings(parser.parse_args(own), os.environ)
    job = slurm.allocation(os.environ)
    folder, options_ = settle(options, chosen, job, Path.cwd())
    before = contract.all_attempts(folder)
    if job.restarts and before and before[-1].state == "done":
        _say(job, f"{folder} is done already")
        return contract.DONE

    hosts = slurm.hosts(job.nodes)
    logs = contract.new_logs(folder)
    logs = logs.with_name(f"{logs.name}-job-{job.label}.{job.restarts}")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"run.dir {folder}: cannot be written to ({error}); choose another folder"
        ) from None
    _say(job, f"start {job.restarts + 1} on {', '.join(hosts)}; run folder {folder}")
    code = _step(job, chosen, _nodes_part(job, chosen, hosts, logs, options_), folder, asked)

    failure = _first(logs, hosts)
    start = lifecycle.Start(
        before=before,
        after=contract.all_attempts(folder),
        asked=asked.by or (_asked_on_nodes(logs, len(hosts)) if code == 0 else None),
        standing=_standing(job),
        users_error=failure.is_users,
        ended_well=code == 0,
        restarts=job.restarts,
        limit=chosen.max_attempts,
    )
    decision = lifecycle.decide(start)
    if decision.code in (contract.FAILED, contract.USER_ERROR):
        print(told(failure), file=sys.stderr, flush=True)
    _say(job, f"{decision.why}: {'queued again' if decision.requeue else f'ends with {decision.code}'}")
    if decision.requeue:
        # Where the run was moved aside, so was the folder of the file that Slurm writes the job's output to.
        (folder / contract.LOGS).mkdir(parents=True, exist_ok=True)
        try:
            slurm.requeue(job.label)
        except LaunchError as error:
            _say(job, f"could not be queued again ({error}): submit it once more, and it goes on")
    return decision.code


def _nodes_part(
    job: Allocation, chosen: Settings, hosts: Sequence[str], logs: Path, options: tuple[str, ...]
) -> node.Job:
    return node.Job(
        addresses=slurm.addresses(job.nodes, hosts),
        port=slurm.port_of(job.job_id, slurm.is_free),
        rdzv_id=job.rdzv_id,
        logs=logs,
        nproc=chosen.nproc,
        max_restarts=chosen.max_restarts,
        stage=chosen.stage,
        options=options,
    )


def _step(job: Allocation, chosen: Settings, part: node.Job, folder: Path, asked: Asked) -> int:
    """Run srun to its end; returns its exit code."""
    here, inside = Path.cwd(), chosen.container is not None
    stage = node.stage_folder(chosen.stage, os.environ) if chosen.stage and inside else None
    places = [
        contract.given(part.options, *key)
        for key in (("data", "root"), ("data", "cache"), ("source", "root"), ("model", "weights"))
    ]
    cache = os.environ.get("REGRAFT_CACHE", "~/.cache/regraft")
    mounts = container.mounts_of(
        chosen,
        [here, folder, stage, *(_folder(place) for place in [*places, cache] if place is not None)],
    )
    _, gpus = node.cores_and_gpus(os.environ, cores=1, gpus=machine.gpus(os.environ))
    command = [
        *srun(job, len(part.addresses), chosen, mounts, here),
        *container.prefix(chosen, mounts, here, gpus=gpus > 0),
        container.PYTHON if inside else sys.executable,
        "-m",
        "launch.slurm.node",
        *part.words(),
    ]
    try:
        step = subprocess.Popen(command, env=step_environment(job, os.environ), stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LaunchError(
            f"srun cannot be started ({error}): it belongs to Slurm, and should be in PATH"
        ) from None
    asked.of(step)
    return step.wait()


def _folder(place: str) -> Path | None:
    """Return the folder of a path of the options, if it is one."""
    try:
        path = Path(place).expanduser().absolute()
        return path if path.is_dir() else path.parent if path.is_file() else None
    except (OSError, RuntimeError):  # no such ~user: the trainer says so
        return None


def _first(logs: Path, hosts: Sequence[str]) -> Failure:
    """Return the first failure of all nodes."""
    return first_of([first_failure(node.node_logs(logs, i), host=host) for i, host in enumerate(hosts)])


def _asked_on_nodes(logs: Path, count: int) -> str | None:
    """Return the signal that came to a node, None if there was none; where one has failed, it may be an echo."""
    files = [node.node_logs(logs, i) / node.ASKED for i in range(count)]
    return next((path.read_text(encoding="ascii") for path in files if path.exists()), None)


def _standing(job: Allocation) -> lifecycle.Standing:
    try:
        state, reason = slurm.state_of(job.label)
    except LaunchError as error:
        _say(job, f"Slurm does not say what has become of it ({error})")
        return lifecycle.standing(None, "")
    return lifecycle.standing(state or None, reason)


def _say(job: Allocation, text: str) -> None:
    print(f"job {job.label}: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    asked = Asked()
    try:
        return run(sys.argv[1:] if words is None else words, asked)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return contract.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())

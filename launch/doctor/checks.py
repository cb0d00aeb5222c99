"""All checks in their order, each between what finds facts out and what judges them."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import contract, machine
from launch.doctor import host, nodes, run_folder, software, variables
from launch.doctor import measured as pace
from launch.doctor.finding import Finding, red, yellow
from launch.local import process as child
from launch.local.command import clean

SECONDS_TO_MEASURE = 90.0
SECONDS_TO_EXCHANGE = 60.0
_DEFAULT_EXCHANGE = 64 << 20
"""Bytes that are exchanged where the model's size is not known."""


@dataclass(kw_only=True)
class Patient:
    """What is examined, and what earlier checks have found out for later ones."""

    run: Path
    """The run folder, which need not be there."""
    processes: int
    """On this machine."""
    nodes: int
    options: tuple[str, ...]
    """The trainer's."""
    scratch: Path | None = None
    """A folder for the doctor alone, on the run folder's disk; None: it cannot be made."""
    probed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What trainer/probe.py has told."""

    @property
    def workers(self) -> int:
        """Return the processes that decode for each trainer; a guess until that is measured."""
        return int(self.probed.get("model", {}).get("workers", 2))


def examine(patient: Patient, *, say: Callable[[str], object]) -> Iterator[Finding]:
    """Yield the findings of all checks, in an order in which later ones may use what earlier ones have found."""
    checks: tuple[tuple[str, Callable[[Patient], Iterable[Finding]]], ...] = (
        ("versions", lambda _: software.versions(platform.python_version())),
        ("variables", _variables),
        ("ports", lambda _: host.ports(host.try_ports(), host=socket.gethostname())),
        ("load", lambda _: [host.load(os.getloadavg()[0], cores=machine.cores())]),
        ("run folder", _run_folder),
        ("pace: reading, decoding, a training step, writing (some 10 s)", _pace),
        ("GPUs", _gpus),
        ("limits", _limits),
        ("memory", _memory),
        ("disk", _disk),
        ("shared memory", _shared_memory),
        ("all-reduce between processes (some 10 s)", _exchange),
    )
    for name, check in checks:
        say(f"checking {name} ...")
        try:
            yield from check(patient)
        except Exception as error:  # noqa: BLE001 (a check that fails must not end the others)
            yield yellow(
                name.partition(":")[0].partition(" (")[0],
                f"this check itself failed: {type(error).__name__}: {error}",
                "the others count all the same; please report it",
            )


def _variables(_: Patient) -> list[Finding]:
    return variables.leaks(
        os.environ,
        cores=machine.cores(),
        devices=machine.gpus({}),
        interfaces=host.interfaces(),
    )


def _run_folder(patient: Patient) -> list[Finding]:
    where = run_folder.existing(patient.run)
    if patient.scratch is None:
        return [
            red(
                "run folder",
                f"{where}: cannot be written to",
                "choose another run.dir, or mend its permissions",
            )
        ]
    try:
        wrong = run_folder.try_out(patient.scratch)
    except OSError as error:
        wrong = [f"writing is refused ({error.strerror})"]
    found = [run_folder.judge(where, wrong, run_folder.kind_of_disk(patient.scratch))]
    if patient.nodes == 1 and not wrong:
        found.append(run_folder.clocks({socket.gethostname(): run_folder.clock_ahead(patient.scratch)}))
    return found


def _pace(patient: Patient) -> list[Finding]:
    scratch = patient.scratch
    if scratch is None:
        return [yellow("measuring", "nothing, for want of a folder", "see what is said of the run folder")]
    probe = [sys.executable, str(contract.trainer_folder() / "probe.py")]
    ended = child.run(
        [*probe, "pace", str(scratch), str(patient.processes), *patient.options],
        seconds=SECONDS_TO_MEASURE,
        environment=clean(os.environ),
    )
    patient.probed = pace.read(ended.out)
    return [
        *pace.failures(patient.probed, ended=ended.why(SECONDS_TO_MEASURE)),
        *pace.images(patient.probed, processes=patient.processes),
        *pace.step(patient.probed, processes=patient.processes),
        *pace.checkpoints(patient.probed),
    ]


def _gpus(patient: Patient) -> list[Finding]:
    build = patient.probed.get("build", {})
    return software.gpus(
        _ask_driver(),
        {} if "error" in build else build,
        devices=machine.gpus({}),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _ask_driver() -> software.Driver | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,driver_version,memory.total,memory.free"
    listing = child.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], seconds=20)
    return software.read_driver(listing.out, child.run(["nvidia-smi"], seconds=20).out)


def _limits(patient: Patient) -> list[Finding]:
    return host.limits(host.read_limits(), processes=patient.processes, workers=patient.workers)


def _memory(patient: Patient) -> list[Finding]:
    step = patient.probed.get("step", {})
    # On a GPU it is the GPU's memory that was measured.
    measured = step.get("peak_bytes") if step.get("memory_bytes") is None else None
    return [host.memory(host.free_memory(), processes=patient.processes, needed=measured)]


def _disk(patient: Patient) -> list[Finding]:
    where = run_folder.existing(patient.run)
    free, files = host.room(where)
    needed = patient.probed.get("model", {}).get("kept_bytes")
    return [host.disk(free, needed, where=where, files=files)]


def _shared_memory(patient: Patient) -> list[Finding]:
    place = Path("/dev/shm")  # noqa: S108 (it is looked at)
    free = shutil.disk_usage(place).free if place.is_dir() else None
    return [host.shared_memory(free, workers=patient.processes * patient.workers)]


def _exchange(patient: Patient) -> list[Finding]:
    size = int(patient.probed.get("model", {}).get("gradient_bytes", _DEFAULT_EXCHANGE))
    if patient.nodes > 1:
        return _over_nodes(patient, size)
    # Where a run would be one process, two on the processors show that several would do.
    alone = patient.processes == 1
    wanted = max(2, patient.processes)
    ended = child.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nnodes=1",
            f"--nproc-per-node={wanted}",
            str(contract.trainer_folder() / "probe.py"),
            "allreduce",
            str(size),
            *(["cpu"] if alone else []),
        ],
        seconds=SECONDS_TO_EXCHANGE,
        environment=clean(os.environ),
    )
    told = pace.read(ended.out).get("allreduce")
    why = ended.why(SECONDS_TO_EXCHANGE) or "they ended without a word"
    probed = {} if alone else patient.probed
    return [pace.exchange(told, probed, ended=why, wanted=wanted)]


def _over_nodes(patient: Patient, size: int) -> list[Finding]:
    if shutil.which("srun") is None:
        return [
            red(
                "nodes",
                f"{patient.nodes} are asked for, and there is no srun here",
                "run it on the cluster, or drop --nodes",
            )
        ]
    if patient.scratch is None:
        return [red("nodes", "not tried, for want of a folder", "see what is said of the run folder")]
    command = nodes.srun(
        patient.scratch,
        nodes=patient.nodes,
        processes=patient.processes,
        size=size,
        inside="SLURM_JOB_ID" in os.environ,
    )
    ended = child.run(command, seconds=nodes.SECONDS, environment=clean(os.environ))
    told = nodes.read(ended.out)
    found = nodes.judge(told, nodes=patient.nodes, why=ended.why(nodes.SECONDS))
    if any(one.level == "red" for one in found[:1]):
        return found
    why = "; ".join(f"{one['host']}: {one['exchange']}" for one in told if "exchange" in one)
    wanted = patient.nodes * patient.processes
    summed = pace.read(ended.out).get("allreduce")
    return [
        *found,
        pace.exchange(summed, patient.probed, ended=why or "they ended without a word", wanted=wanted),
    ]

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch import machine
from launch.doctor import host, measured, nodes, software
from launch.doctor import main as doctor
from launch.doctor.finding import DoctorContext, Finding, format_bytes
from launch.local import process
from launch.local.process import ProcessResult
from tests.folders import image_folder
from tests.launch.helpers import marked_processes, restored_handlers
from tests.launching import REPOSITORY, wait_until

GIB = 1 << 30
Check = Callable[[DoctorContext], list[Finding]]


def levels(findings: list[Finding]) -> list[str]:
    for finding in findings:
        assert (finding.remedy is None) == (finding.level == "green"), "other levels have a remedy"
    return [finding.level for finding in findings]


@pytest.fixture
def context(tmp_path: Path) -> DoctorContext:
    return DoctorContext(run=tmp_path / "run", processes=2, nodes=1, options=(), scratch=tmp_path)


INSTALLED: dict[str, tuple[str, list[str]] | None] = {
    "regraft": ("1.0", ["torch>=2.11", "torchvision>=0.26", "rich>=1", "onnx; extra == 'export'"]),
    "torch": ("2.15.0+cu130", ["sympy"]),
    "torchvision": ("0.29.2+cu130", ["torch==2.15.0"]),
    "rich": ("13.0", ["missing"]),
    "sympy": ("1.13", []),
}
GPU = {"name": "H100", "memory": 80 * GIB, "free": 79 * GIB}
TORCH: dict[str, Any] = {"torch": "2.15.0", "cuda": "12.8", "hip": None, "gpus": [GPU]}
BUSY_GPU = TORCH | {"gpus": [GPU | {"free": GIB}]}
STEP: dict[str, Any] = {
    **{"images_per_second": 100.0, "batch_size": 8, "precision": "fp32", "device": "cpu"},
    **{"peak_bytes": GIB, "memory_bytes": None},
}
GPU_STEP = STEP | {"device": "cuda:0", "memory_bytes": 80 * GIB}
MODEL = {"gradient_bytes": 4e7, "checkpoints_bytes": 4e8, "workers": 2, "decoding_cores": 2, "cores": 2}
MEASURED: dict[str, dict[str, Any]] = {
    "torch": TORCH,
    "torchvision": {"torchvision": "0.29.2"},
    "config": {"model": "resnet18", "images": "5 of 5 images in /x"},
    "decoding": {"images_per_second": 120.0},
    "model": MODEL,
    "training step": STEP,
}
SUM = {"processes": 2, "backend": "gloo", "correct": True, "bytes": 4e7, "seconds": 0.04}
NEEDS_10_GIB = {"training step": STEP | {"peak_bytes": 10 * GIB}}
NOT_MEASURED: dict[str, Any] = {"training step": {}, "model": {}}
CHECKPOINTS_OF_10_GIB = {"model": {"checkpoints_bytes": 10 * GIB}}


@dataclass(kw_only=True)
class Machine:
    """Facts about a machine with two processes; `measured` and `installed` change MEASURED and INSTALLED."""

    measured: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    free: int = 64 * GIB  # of memory, disk and shared memory
    gpus: int = 2
    port_is_free: bool = True
    resolves: bool = True
    processes: int = 2

    def apply(self, context: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
        context.measured, context.processes = MEASURED | self.measured, self.processes
        for owner, name, value in (
            (os, "environ", self.environment),
            (host, "available_cores", lambda: 8),
            (machine, "gpus", lambda _: self.gpus),
            (software, "installed", (INSTALLED | self.installed).get),
            (socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")]),
            (socket, "gethostbyname", Mock(side_effect=None if self.resolves else OSError)),
            (host, "is_port_free", lambda _: self.port_is_free),
            (host, "available_memory", lambda: self.free),
            (shutil, "disk_usage", lambda _: Mock(free=self.free)),
        ):
            monkeypatch.setattr(owner, name, value)


DECODING, SPEED, GPUS = measured.check_decoding, measured.check_step, software.check_gpus
VERSIONS, PORTS, MEMORY = software.check_versions, host.check_ports, host.check_memory
DISK, SHARED_MEMORY = host.check_disk, host.check_shared_memory


@pytest.mark.parametrize(
    ("check", "facts", "expected"),
    [
        (VERSIONS, Machine(), "green: Python 3.*, regraft 1.0, torch 2.15.0.cu130, torchvision 0.29.2"),
        (VERSIONS, Machine(installed={"torch": ("2.14.0", [])}), r"red: torchvision \S+ needs torch==2\.15\.0"),
        (VERSIONS, Machine(installed={"torchvision": ("0.20", [])}), "red: regraft 1.0 needs .*; torchvision 0.20 is"),
        (VERSIONS, Machine(installed={"torchvision": None}), "red: regraft 1.0 needs torchvision>=0.26; it is not"),
        (VERSIONS, Machine(installed={"sympy": None}), r"red: torch \S+ needs sympy; it is not installed"),
        (VERSIONS, Machine(installed={"regraft": None}), "red: regraft is not installed in this Python"),
        (GPUS, Machine(), "green: 1 x H100, torch for CUDA 12.8"),
        (GPUS, Machine(gpus=0, measured={"torch": TORCH | {"gpus": []}}), "green: .* training runs on its CPU"),
        (GPUS, Machine(environment={"CUDA_VISIBLE_DEVICES": ""}), "green: CUDA_VISIBLE_DEVICES hides them"),
        (GPUS, Machine(measured={"torch": BUSY_GPU}), "yellow: .* 1.07 GB of 85.9 GB are free"),
        (GPUS, Machine(measured={"torch": TORCH | {"cuda": None, "gpus": []}}), "yellow: .* built for CPUs only"),
        (GPUS, Machine(measured={"torch": TORCH | {"gpus": []}}), "red: .* CUDA 12.8 cannot use any of 2 GPUs"),
        (GPUS, Machine(measured={"torch": {"error": "x"}}), ""),
        (PORTS, Machine(), "green"),
        (PORTS, Machine(port_is_free=False), "red"),
        (PORTS, Machine(resolves=False), "yellow"),
        (MEMORY, Machine(measured=NOT_MEASURED), "green"),
        (MEMORY, Machine(measured=NOT_MEASURED, free=GIB), "yellow: .* 2 x 2.15 GB needed, as an estimate"),
        (MEMORY, Machine(measured=NEEDS_10_GIB, free=24 * GIB), "yellow"),
        (MEMORY, Machine(measured=NEEDS_10_GIB, free=8 * GIB), "red: .* 2 x 10.7 GB needed, as measured"),
        (DISK, Machine(measured=CHECKPOINTS_OF_10_GIB), "green"),
        (DISK, Machine(measured=CHECKPOINTS_OF_10_GIB, free=15 * GIB), "yellow"),
        (DISK, Machine(measured=CHECKPOINTS_OF_10_GIB, free=9 * GIB), "red"),
        (DISK, Machine(measured=NOT_MEASURED, free=GIB // 4), "red"),
        (SHARED_MEMORY, Machine(), "green: .* for 4 data-loading workers"),
        (SHARED_MEMORY, Machine(free=GIB // 4), "yellow"),
        (SHARED_MEMORY, Machine(free=1 << 20), "red"),
        (SHARED_MEMORY, Machine(free=1 << 20, measured={"model": {"workers": 0}}), "yellow"),
        (DECODING, Machine(), "green"),
        (DECODING, Machine(measured={"decoding": {"images_per_second": 20.0}}), "yellow"),
        (DECODING, Machine(measured={"training step": GPU_STEP}, processes=1), "green"),
        (DECODING, Machine(measured={"training step": GPU_STEP}, processes=8), "yellow: .* training needs 800"),
        (DECODING, Machine(measured={"decoding": {"error": "x"}}), ""),
        (SPEED, Machine(), "green"),
        (SPEED, Machine(measured={"training step": GPU_STEP}), "green"),
        (SPEED, Machine(measured={"training step": GPU_STEP | {"peak_bytes": 79 * GIB}}), "yellow"),
        (SPEED, Machine(measured={"training step": {"error": "x"}}), ""),
    ],
)
def test_check(
    check: Check, facts: Machine, expected: str, context: DoctorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert levels(software.check_versions(context)) == ["green"], "the versions of this environment"
    facts.apply(context, monkeypatch)
    findings = check(context)
    assert len(findings) == bool(expected)
    levels(findings)
    for finding in findings:
        assert re.match(expected, f"{finding.level}: {finding.message}")


VARIABLES = {
    "green": (
        *("OMP_NUM_THREADS=4", "CUDA_VISIBLE_DEVICES=0", "NCCL_SOCKET_IFNAME=^docker", "HOME=/root"),
        *("NCCL_SOCKET_IFNAME=ib,eth0:1", "GLOO_SOCKET_IFNAME=eth", "CUDA_LAUNCH_BLOCKING=0"),
    ),
    "yellow": (
        *("PET_NNODES=2", "RANK=0", "LOCAL_WORLD_SIZE=0", "MASTER_ADDR=10.0.0.1", "TORCHELASTIC_RUN_ID=x"),
        *("ACCELERATE_USE_CPU=true", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", "NCCL_P2P_DISABLE=1"),
        *("CUDA_LAUNCH_BLOCKING=1", "TORCH_DISTRIBUTED_DEBUG=DETAIL", "PYTHONPATH=/x", "LD_PRELOAD=/x.so"),
        "PET_X=a\nred \x1b[31m" + "x" * 500,
    ),
    "red": (
        *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        *("NCCL_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME==eth"),
    ),
}


@pytest.mark.parametrize("level", VARIABLES)
def test_variables(level: str, context: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES[level]:
        name, _, value = variable.partition("=")
        Machine(environment={name: value}).apply(context, monkeypatch)
        (finding,) = host.check_variables(context)
        assert levels([finding]) == [level], variable
        assert level == "green" or finding.message.startswith(f"{name}={ascii(value)[1:-1][:80]}: ")
        assert finding.message.isprintable()
        assert len(finding.message) < 250


def test_run_folder(context: DoctorContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.nearest_existing(tmp_path / "runs" / "a" / "b") == tmp_path
    assert host.nearest_existing(tmp_path) == tmp_path.parent
    assert host.nearest_existing(Path("/dev/shm")) == Path("/dev/shm"), "a mount point"
    assert levels(host.check_run_folder(context)) == ["green"]
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    assert levels(host.check_run_folder(context)) == ["red"]
    context.scratch = None
    assert host.check_run_folder(context)[0].message == f"{tmp_path}: not writable"


def test_all_reduce() -> None:
    for changes, expected in (
        ({}, "green: 2 processes with gloo: 1 GB/s for 40 MB; 50 % of a training step of 80 ms"),
        ({"seconds": 0.05}, "yellow: .* 62 % of a training step"),
        ({"processes": 1}, "red: .*2 processes were started"),
        ({"correct": False}, "red: .*the sum is wrong"),
        (None, "red: 2 processes could not compute a sum: exit code 1: x"),
    ):
        result = None if changes is None else SUM | changes
        finding = measured.check_all_reduce(result, STEP, failure="exit code 1: x", processes=2)
        assert re.match(expected, f"{finding.level}: {finding.message}")
        levels([finding])
    assert [format_bytes(count) for count in (12, 1500, 999e9, 5e15)] == ["12 bytes", "1.5 kB", "999 GB", "5,000 TB"]


NODE = {"host": "a", "versions": {"torch": "2", "numpy": "1"}, "sees": [0, 1]}


def test_nodes() -> None:
    for first, second, expected in (
        ({}, {}, ["green"]),
        ({}, None, ["red"]),
        (None, None, ["red"]),
        ({}, {"sees": [1]}, ["red"]),
        ({}, {"versions": {"torch": "3", "numpy": "1"}}, ["green", "red"]),
        ({}, {"versions": {"torch": "2"}}, ["green", "yellow"]),
    ):
        changes = {name: one for name, one in (("a", first), ("b", second)) if one is not None}
        reports = {f"node {'ab'.index(name)}": NODE | {"host": name} | one for name, one in changes.items()}
        assert levels(nodes.check_reports(reports, nodes=2, failure="exit code 1: srun")) == expected


def test_nodes_see_each_others_reports(context: DoctorContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(context.scratch))
    assert levels(nodes.check_nodes(context)) == ["red"], "without srun"
    monkeypatch.setattr(nodes, "SHARED_FOLDER_SECONDS", 0.2)
    assert nodes.share_report(tmp_path, {}, node=1, nodes=2) == [1]
    assert nodes.share_report(tmp_path, {}, node=0, nodes=2) == [0, 1]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """Replace the processes of the doctor by the output of a good machine; yields their commands."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> ProcessResult:
        started.append(command)
        results = MEASURED if "measure" in command else {"all-reduce": SUM}
        lines = [json.dumps({"probe": name} | value) for name, value in results.items()]
        output = "\n".join(["a warning", '{"x": 1}', "{not json", "[1]", *lines])
        return ProcessResult(code=0, stdout=output, stderr="")

    monkeypatch.setattr(process, "run_with_timeout", run)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_NUM_NODES", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with restored_handlers(signal.SIGTERM, signal.SIGHUP):
        yield started


def test_check_that_raises_is_yellow_and_the_others_run(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(host, "available_memory", fail)
    monkeypatch.setattr(software, "installed", fail)
    assert doctor.main(["--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    failed = [one for one in findings if one["message"] == "this check failed itself: ZeroDivisionError: x"]
    assert [(one["check"], one["level"]) for one in failed] == [("versions", "yellow"), ("memory", "yellow")]
    assert findings[-1]["check"] == "all-reduce"


def test_exit_code_is_1_only_if_a_finding_is_red(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    assert doctor.main([]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^yellow variables: PET_NNODES=2: .*\n       try: unset PET_NNODES$", output, flags=re.M)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["level"] == "red"
    assert doctor.main(["--run.dir=/proc/runs/a", "--json"]) == 1
    findings = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert (findings["run folder"]["level"], findings["run folder"]["message"]) == ("red", "/proc: not writable")
    assert findings["measuring"]["level"] == "yellow"


def test_options_are_passed_to_the_probe_and_the_nodes_of_a_job_are_checked(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor.main(["--nproc", "3", "--config", "a b.yaml", "--json", "--optim.lr=$(touch x)"])
    measure, all_reduce = commands
    assert measure[-4:] == ["3", "--config", "a b.yaml", "--optim.lr=$(touch x)"]
    assert "--nproc-per-node=3" in all_reduce
    assert "cpu" not in all_reduce
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/srun")
    assert doctor.main([]) == 1, "the nodes do not answer"
    assert commands[-1][:2] == ["srun", "--nodes=3"]


TINY = ("--data.image_size=32", "--model.name=squeezenet1_1", "--model.weights=null", "--run.device=cpu")


def start_doctor(*arguments: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [sys.executable, "-m", "launch.cli", "doctor", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.slow
def test_doctor_checks_a_machine_without_gpus_and_leaves_no_files(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 4, "b": 4}, "test": {"a": 1, "b": 1}})
    (tmp_path / "here").mkdir()
    # torchrun would obey these variables if they reached it.
    options = (f"--data.root={root}", *TINY, "--nproc", "2", "--json")
    doctor_ = start_doctor(*options, cwd=tmp_path / "here", PET_NNODES="7", RANK="3")
    out, err = doctor_.communicate(timeout=300)
    findings = {one["check"]: one for one in json.loads(out)["findings"]}
    assert [one for one in findings.values() if one["level"] == "red"] == [], err
    assert doctor_.returncode == 0
    assert {"versions", "run folder", "decoding", "training step", "all-reduce"} <= set(findings), err
    assert findings["all-reduce"]["message"].startswith("2 processes with gloo: ")
    assert "8 of 8 images in" in findings["decoding"]["message"]
    assert "PET_NNODES=7" in out
    assert "checking all-reduce between processes" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "images"]
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_doctor_leaves_no_process_and_no_file(name: str, tmp_path: Path) -> None:
    mark = str(uuid.uuid4())
    doctor_ = start_doctor(*TINY, "--data.root=hotdog", cwd=tmp_path, REGRAFT_TEST_MARK=mark)
    wait_until(lambda: len(marked_processes(mark)) > 1 and any(tmp_path.iterdir()))
    doctor_.send_signal(getattr(signal, name))
    _, err = doctor_.communicate(timeout=60)
    assert doctor_.returncode == 75
    last = f"stopped by {name}: all its processes and files are removed. Run the same command again"
    assert err.splitlines()[-1] == last
    wait_until(lambda: not marked_processes(mark), seconds=10)  # they were killed, and may still be exiting
    assert list(tmp_path.iterdir()) == []

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch import machine
from launch.doctor import host, measured, nodes, software
from launch.doctor import main as doctor
from launch.doctor.finding import DoctorContext, Finding, format_bytes
from launch.local import process
from launch.local.process import ProcessResult, run_with_timeout
from tests.folders import image_folder
from tests.launching import REPOSITORY

GIB, MIB = 1 << 30, 1 << 20


def levels(findings: list[Finding]) -> list[str]:
    for finding in findings:
        assert (finding.remedy is None) == (finding.level == "green"), "other levels have a remedy"
    return [finding.level for finding in findings]


@pytest.fixture
def context(tmp_path: Path) -> DoctorContext:
    return DoctorContext(run=tmp_path / "run", processes=2, nodes=1, options=(), scratch=tmp_path)


# Versions.

INSTALLED: dict[str, tuple[str, list[str]]] = {
    "regraft": ("1.0", ["torch>=2.11", "torchvision>=0.26", "rich>=1", "onnx; extra == 'export'"]),
    "torch": ("2.15.0+cu130", ["sympy"]),
    "torchvision": ("0.29.2+cu130", ["torch==2.15.0"]),
    "rich": ("13.0", ["missing"]),
    "sympy": ("1.13", []),
}


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({}, "green", "Python 3.*, regraft 1.0, torch 2.15.0.cu130, torchvision 0.29.2"),
        (
            {"torch": ("2.14.0", [])},
            "red",
            r"torchvision 0\.29\.2\+cu130 needs torch==2\.15\.0; torch 2\.14\.0 is",
        ),
        (
            {"torchvision": ("0.20.0", [])},
            "red",
            "regraft 1.0 needs torchvision>=0.26; torchvision 0.20.0 is inst",
        ),
        ({"torchvision": None}, "red", "regraft 1.0 needs torchvision>=0.26; it is not installed"),
        ({"sympy": None}, "red", r"torch \S+ needs sympy; it is not installed"),
        ({"rich": ("0.9", [])}, "red", "regraft 1.0 needs rich>=1; rich 0.9 is installed"),
        ({"regraft": None}, "red", "regraft is not installed in this Python"),
    ],
)
def test_versions(
    changes: dict[str, Any],
    level: str,
    message: str,
    context: DoctorContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(software, "installed", (INSTALLED | changes).get)
    findings = software.check_versions(context)
    assert levels(findings) == [level]
    assert re.search(message, findings[0].message)


def test_versions_of_this_environment_fit(context: DoctorContext) -> None:
    assert levels(software.check_versions(context)) == ["green"]


# GPUs.

GPU = {"name": "H100", "memory": 80 * GIB, "free": 79 * GIB}
TORCH: dict[str, Any] = {"torch": "2.15.0", "cuda": "12.8", "hip": None, "gpus": [GPU]}


@pytest.mark.parametrize(
    ("torch", "in_machine", "visible", "level", "message"),
    [
        ({}, 1, None, "green", "1 x H100, torch for CUDA 12.8"),
        ({"gpus": []}, 0, None, "green", "training runs on its CPU"),
        ({}, 1, "", "green", "CUDA_VISIBLE_DEVICES hides them"),
        ({"gpus": [GPU | {"free": GIB}]}, 1, None, "yellow", "1.07 GB of 85.9 GB are free"),
        ({"cuda": None, "gpus": []}, 1, None, "yellow", "built for CPUs only"),
        ({"gpus": []}, 2, None, "red", "torch for CUDA 12.8 cannot use any of 2 GPUs"),
    ],
)
def test_gpus(
    torch: dict[str, Any],
    in_machine: int,
    visible: str | None,
    level: str,
    message: str,
    context: DoctorContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda _: in_machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    context.measured = {"torch": TORCH | torch}
    findings = software.check_gpus(context)
    assert levels(findings) == [level]
    assert message in findings[0].message


# This machine.


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("PET_NNODES", "2", "yellow"),
        ("RANK", "0", "yellow"),
        ("LOCAL_WORLD_SIZE", "0", "yellow"),
        ("MASTER_ADDR", "10.0.0.1", "yellow"),
        ("TORCHELASTIC_RUN_ID", "x", "yellow"),
        ("ACCELERATE_USE_CPU", "true", "yellow"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "red"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "red"),
        ("OMP_NUM_THREADS", "1", "yellow"),
        ("OMP_NUM_THREADS", "4", "green"),
        ("CUDA_VISIBLE_DEVICES", "", "yellow"),
        ("CUDA_VISIBLE_DEVICES", "0", "green"),
        ("NCCL_P2P_DISABLE", "1", "yellow"),
        ("NCCL_SOCKET_IFNAME", "ib0", "red"),
        ("NCCL_SOCKET_IFNAME", "=eth", "red"),
        ("NCCL_SOCKET_IFNAME", "^docker", "green"),
        ("NCCL_SOCKET_IFNAME", "ib,eth0:1", "green"),
        ("GLOO_SOCKET_IFNAME", "eth", "green"),
        ("CUDA_LAUNCH_BLOCKING", "1", "yellow"),
        ("CUDA_LAUNCH_BLOCKING", "0", "green"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "yellow"),
        ("PYTHONPATH", "/x", "yellow"),
        ("LD_PRELOAD", "/x.so", "yellow"),
        ("SLURM_JOB_ID", "3", "green"),
        ("HOME", "/root", "green"),
        ("PET_X", "a\nred \x1b[31m" + "x" * 500, "yellow"),
    ],
)
def test_variables(
    name: str, value: str, level: str, context: DoctorContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {name: value})
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "gpus", lambda _: 2)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    (finding,) = host.check_variables(context)
    assert levels([finding]) == [level]
    assert level == "green" or finding.message.startswith(f"{name}={ascii(value)[1:-1][:80]}: ")
    assert finding.message.isprintable()
    assert len(finding.message) < 250


@pytest.mark.parametrize(
    ("is_free", "address", "expected"),
    [(True, "10.0.0.1", ["green"]), (False, "10.0.0.1", ["red"]), (False, None, ["red", "yellow"])],
)
def test_ports(
    is_free: bool,
    address: str | None,
    expected: list[str],
    context: DoctorContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(_: str) -> str:
        if address is None:
            raise OSError
        return address

    monkeypatch.setattr(host, "is_port_free", lambda _: is_free)
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    assert levels(host.check_ports(context)) == expected


Usage = namedtuple("Usage", "free")


def set_facts(
    context: DoctorContext, monkeypatch: pytest.MonkeyPatch, free: int, **model: int | None
) -> None:
    """Set the free memory and disk space, and what the probe has measured."""
    context.measured = {"model": {key: value for key, value in model.items() if value is not None}}
    context.measured["training step"] = {"peak_bytes": model.get("peak_bytes"), "memory_bytes": None}
    monkeypatch.setattr(host, "available_memory", lambda: free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))


Check = Callable[[DoctorContext], list[Finding]]


@pytest.mark.parametrize(
    ("check", "free", "facts", "level"),
    [
        # Two processes need 2 GiB each, if nothing was measured.
        (host.check_memory, 64 * GIB, {}, "green"),
        (host.check_memory, 1 * GIB, {}, "yellow"),
        (host.check_memory, 64 * GIB, {"peak_bytes": 10 * GIB}, "green"),
        (host.check_memory, 24 * GIB, {"peak_bytes": 10 * GIB}, "yellow"),
        (host.check_memory, 8 * GIB, {"peak_bytes": 10 * GIB}, "red"),
        (host.check_disk, 100 * GIB, {"checkpoints_bytes": 10 * GIB}, "green"),
        (host.check_disk, 15 * GIB, {"checkpoints_bytes": 10 * GIB}, "yellow"),
        (host.check_disk, 9 * GIB, {"checkpoints_bytes": 10 * GIB}, "red"),
        (host.check_disk, GIB // 4, {}, "red"),
        (host.check_shared_memory, GIB, {"workers": 2}, "green"),
        (host.check_shared_memory, GIB // 4, {"workers": 2}, "yellow"),
        (host.check_shared_memory, MIB, {"workers": 2}, "red"),
        (host.check_shared_memory, MIB, {"workers": 0}, "yellow"),
    ],
)
def test_memory_disk_and_shared_memory(
    check: Check,
    free: int,
    facts: dict[str, int],
    level: str,
    context: DoctorContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_facts(context, monkeypatch, free, **facts)
    assert levels(check(context)) == [level]


def test_memory_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    assert host.available_memory(cgroup=tmp_path) == 3 * GIB // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert host.available_memory(cgroup=tmp_path) > GIB


def test_run_folder(context: DoctorContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.nearest_existing(tmp_path / "runs" / "a" / "b") == tmp_path
    assert host.nearest_existing(tmp_path) == tmp_path.parent
    assert host.nearest_existing(Path("/dev/shm")) == Path("/dev/shm"), "a mount point"
    assert levels(host.check_run_folder(context)) == ["green"]
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    assert levels(host.check_run_folder(context)) == ["red"]
    context.scratch = None
    assert host.check_run_folder(context)[0].message == f"{tmp_path}: not writable"


# Measurements.

STEP = {
    "images_per_second": 100.0,
    "batch_size": 8,
    "precision": "fp32",
    "device": "cpu",
    "peak_bytes": GIB,
    "memory_bytes": None,
}
GPU_STEP = STEP | {"device": "cuda:0", "memory_bytes": 80 * GIB}
MEASURED: dict[str, dict[str, Any]] = {
    "torch": TORCH,
    "torchvision": {"torchvision": "0.29.2"},
    "config": {"model": "resnet18", "images": "5 of 5 images in /x"},
    "decoding": {"images_per_second": 120.0},
    "model": {
        "gradient_bytes": 4e7,
        "checkpoints_bytes": 4e8,
        "workers": 2,
        "decoding_cores": 2,
        "cores": 2,
    },
    "training step": STEP,
}
SUM = {"processes": 2, "backend": "gloo", "correct": True, "bytes": 4e7, "seconds": 0.04}


def to_lines(values: dict[str, dict[str, Any]]) -> str:
    return "".join(json.dumps({"probe": name} | value) + "\n" for name, value in values.items())


def test_other_lines_in_the_output_of_the_probe_are_skipped() -> None:
    output = 'warning\n{"probe": "a", "x": 1}\n{"x": 1}\n{not json\n[1]\n{"probe": "b", "error": "e"}\n'
    assert measured.parse_output(output) == {"a": {"x": 1}, "b": {"error": "e"}}


@pytest.mark.parametrize(
    ("changes", "processes", "check", "expected"),
    [
        ({}, 1, measured.check_decoding, ["green"]),
        ({"decoding": {"images_per_second": 20.0}}, 1, measured.check_decoding, ["yellow"]),
        ({"training step": GPU_STEP}, 1, measured.check_decoding, ["green"]),
        ({"training step": GPU_STEP}, 8, measured.check_decoding, ["yellow"]),  # each GPU needs as many
        ({"training step": {"error": "x"}}, 8, measured.check_decoding, ["green"]),
        ({"decoding": {"error": "x"}}, 1, measured.check_decoding, []),
        ({}, 1, measured.check_step, ["green"]),
        ({"training step": GPU_STEP}, 2, measured.check_step, ["green"]),
        ({"training step": GPU_STEP | {"peak_bytes": 79 * GIB}}, 2, measured.check_step, ["yellow"]),
        ({"training step": {"error": "x"}}, 1, measured.check_step, []),
    ],
)
def test_speed_of_decoding_and_training(
    changes: dict[str, Any], processes: int, check: Check, expected: list[str], context: DoctorContext
) -> None:
    context.measured, context.processes = MEASURED | changes, processes
    assert levels(check(context)) == expected


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({}, "green", "2 processes with gloo: 1 GB/s for 40 MB; 50 % of a training step of 80 ms"),
        ({"seconds": 0.05}, "yellow", "62 % of a training step"),
        ({"processes": 1}, "red", "2 processes were started"),
        ({"correct": False}, "red", "the sum is wrong"),
        (None, "red", "2 processes could not compute a sum: exit code 1: x"),
    ],
)
def test_all_reduce(changes: dict[str, Any] | None, level: str, message: str) -> None:
    result = None if changes is None else SUM | changes
    finding = measured.check_all_reduce(result, STEP, failure="exit code 1: x", processes=2)
    assert levels([finding]) == [level]
    assert message in finding.message


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (999e9, "999 GB"), (5e15, "5,000 TB")]
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


# Several nodes.

NODE = {"host": "a", "versions": {"torch": "2", "numpy": "1"}, "sees": [0, 1]}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, ["green"]),
        ({}, None, ["red"]),
        (None, None, ["red"]),
        ({}, {"sees": [1]}, ["red"]),
        ({}, {"versions": {"torch": "3", "numpy": "1"}}, ["green", "red"]),
        ({}, {"versions": {"torch": "2"}}, ["green", "yellow"]),
    ],
)
def test_nodes(first: dict[str, Any] | None, second: dict[str, Any] | None, expected: list[str]) -> None:
    reports = {
        f"node {number}": NODE | {"host": "ab"[number]} | changes
        for number, changes in enumerate((first, second))
        if changes is not None
    }
    assert levels(nodes.check_reports(reports, nodes=2, failure="exit code 1: srun")) == expected


def test_nodes_without_srun_are_red(context: DoctorContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(context.scratch))
    assert levels(nodes.check_nodes(context)) == ["red"]


def test_nodes_see_each_others_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SHARED_FOLDER_SECONDS", 0.2)
    assert nodes.share_report(tmp_path, {}, node=1, nodes=2) == [1]
    assert nodes.share_report(tmp_path, {}, node=0, nodes=2) == [0, 1]


# Processes with a time limit.


def marked_processes(mark: str) -> list[int]:
    """Return the processes with this text in their environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                pids.append(int(path.name))
    return pids


def test_process_is_killed_at_its_time_limit_with_its_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.5)
    ignores_sigterm = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = f"subprocess.Popen([sys.executable, '-c', {ignores_sigterm!r}], start_new_session=True)"
    command = [sys.executable, "-c", f"import subprocess, sys; {child}.wait()"]
    mark = str(uuid.uuid4())
    result = run_with_timeout(command, seconds=2.0, environment={**os.environ, "REGRAFT_TEST_MARK": mark})
    assert result.code is None
    assert result.failure_reason(2.0) == "not finished after 2 s (it printed nothing)"
    assert marked_processes(mark) == []


@pytest.mark.parametrize(
    ("code", "stderr", "reason"),
    [
        (0, "Error: x", None),
        (3, "a\nValueError: b\nend\n", "exit code 3: ValueError: b"),
        (3, "a\nb\n", "exit code 3: b"),
    ],
)
def test_failure_reason_is_the_last_error(code: int, stderr: str, reason: str | None) -> None:
    assert ProcessResult(code=code, stdout="", stderr=stderr).failure_reason(1) == reason


# The whole command.


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """Replace the processes of the doctor by the output of a good machine; yields their commands."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> ProcessResult:
        started.append(command)
        output = to_lines(MEASURED if "measure" in command else {"all-reduce": SUM})
        return ProcessResult(code=0, stdout=output, stderr="")

    monkeypatch.setattr(process, "run_with_timeout", run)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_NUM_NODES", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    assert re.search(
        r"^yellow variables: PET_NNODES=2: .*\n       try: unset PET_NNODES$", output, flags=re.M
    )
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["level"] == "red"


def test_trainer_options_are_passed_to_the_probe(commands: list[list[str]]) -> None:
    doctor.main(["--nproc", "3", "--config", "a b.yaml", "--json", "--optim.lr=$(touch x)"])
    measure, all_reduce = commands
    assert measure[-4:] == ["3", "--config", "a b.yaml", "--optim.lr=$(touch x)"]
    assert "--nproc-per-node=3" in all_reduce
    assert "cpu" not in all_reduce


def test_nodes_of_a_job_are_checked(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/srun")
    assert doctor.main([]) == 1, "the nodes do not answer"
    assert commands[-1][:2] == ["srun", "--nodes=3"]


def test_unwritable_run_folder_is_red(commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--run.dir=/proc/runs/a", "--json"]) == 1
    findings = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert (findings["run folder"]["level"], findings["run folder"]["message"]) == (
        "red",
        "/proc: not writable",
    )
    assert findings["measuring"]["level"] == "yellow"


TINY = ("--data.image_size=32", "--model.name=squeezenet1_1", "--model.weights=null", "--run.device=cpu")


def start_doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "doctor", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_doctor_checks_a_machine_without_gpus_and_leaves_no_files(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 4, "b": 4}, "test": {"a": 1, "b": 1}})
    (tmp_path / "here").mkdir()
    # torchrun would obey these variables if they reached it.
    doctor_ = start_doctor(
        *(f"--data.root={root}", *TINY, "--nproc", "2", "--json"),
        cwd=tmp_path / "here",
        PET_NNODES="7",
        RANK="3",
    )
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
    deadline = time.monotonic() + 120
    while len(marked_processes(mark)) < 2 or not list(tmp_path.iterdir()):
        assert doctor_.poll() is None, doctor_.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    doctor_.send_signal(getattr(signal, name))
    _, err = doctor_.communicate(timeout=60)
    assert doctor_.returncode == 130
    assert err.splitlines()[-1] == "interrupted: all files and processes of the doctor are removed"
    deadline = time.monotonic() + 10
    while marked_processes(mark):  # they were killed, and may still be exiting
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []

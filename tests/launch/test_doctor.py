import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import checks as examine
from launch.doctor import host, nodes, software, variables
from launch.doctor import main as doctor
from launch.doctor import measured as pace
from launch.doctor import run_folder as folder
from launch.doctor.finding import Finding, size
from launch.doctor.host import Limits, Ports
from launch.doctor.software import Driver
from launch.local import process as child
from launch.local.process import Child
from tests.folders import image_folder
from tests.launching import REPOSITORY

GIB = 1 << 30


def levels(findings: Sequence[Finding]) -> list[str]:
    for one in findings:
        assert (one.remedy is None) == (one.level == "green"), "what is not green comes with a remedy"
    return [one.level for one in findings]


# --- versions

SOUND: dict[str, tuple[str, list[str]]] = {
    "regraft": ("1.0", ["torch>=2.11", "torchvision>=0.26", "rich[extra]>=1", "onnx; extra == 'export'"]),
    "torch": ("2.15.0+cu130", ["sympy"]),
    "torchvision": ("0.29.2+cu130", ["torch==2.15.0"]),
    "rich": ("13.0", ["markdown; extra == 'extra'"]),
    "markdown": ("1.0", []),
    "sympy": ("1.13", []),
}


def installed(changes: Mapping[str, tuple[str, list[str]] | None]) -> list[Finding]:
    there = {**SOUND, **changes}
    return software.versions("3.11.7", look=there.get)


def test_what_is_installed_and_fits_is_green() -> None:
    assert levels(installed({})) == ["green"]
    assert installed({})[0].what.startswith(
        "Python 3.11.7, regraft 1.0, torch 2.15.0+cu130, torchvision 0.29.2"
    )


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
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
        ({"sympy": None}, "red", "needs sympy; it is not installed"),
        ({"markdown": None}, "yellow", "rich 13.0 needs markdown; it is not installed"),
        ({"rich": ("0.9", [])}, "red", "regraft 1.0 needs rich>=1; rich 0.9 is installed"),
        ({"regraft": None}, "red", "regraft is not installed in this Python"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], level: str, what: str) -> None:
    found = installed(changes)
    assert levels(found) == [level]
    assert re.search(what, found[0].what)


def test_these_versions_are_those_of_this_python() -> None:
    assert levels(software.versions("3.11")) == ["green"]


# --- GPUs

LISTING = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 81000\nNVIDIA H100 80GB HBM3, 570.86.15, 81559, 1000\n"
HEADER = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |"
DRIVER = Driver(version="570.86.15", cuda=(12, 8), gpus=(("H100", 80 * GIB, 79 * GIB),))
BUILD: dict[str, Any] = {
    "torch": "2.15.0",
    "cuda": "12.8",
    "hip": None,
    "gpus": [{"name": "H100", "memory": 80 * GIB, "capability": [9, 0]}],
    "architectures": ["sm_80", "sm_90", "compute_90"],
}


def on_gpus(
    driver: Driver | None = DRIVER, *, devices: int = 1, visible: str | None = None, **changes: Any
) -> list[Finding]:
    return software.gpus(driver, BUILD | changes, devices=devices, visible=visible)


def test_nvidia_smi_is_read() -> None:
    found = software.read_driver(LISTING, HEADER)
    assert found is not None
    assert (found.version, found.cuda, len(found.gpus)) == ("570.86.15", (12, 8), 2)
    assert found.gpus[0] == ("NVIDIA H100 80GB HBM3", 81559 << 20, 81000 << 20)
    newer = software.read_driver(LISTING, "CUDA UMD Version: 13.1")
    assert newer is not None
    assert newer.cuda == (13, 1)
    assert software.read_driver("No devices were found\n", HEADER) is None


def test_a_machine_without_gpus_is_green() -> None:
    assert levels(on_gpus(None, devices=0, gpus=[])) == ["green"]


@pytest.mark.parametrize(
    ("found", "level", "what"),
    [
        (on_gpus(), "green", "1 x H100, torch's CUDA 12.8; driver 570.86.15"),
        (on_gpus(visible=""), "green", "hidden by CUDA_VISIBLE_DEVICES"),
        (on_gpus(None), "yellow", "nvidia-smi does not answer"),
        (on_gpus(software.read_driver(LISTING, HEADER)), "yellow", "1.05 GB of 85.5 GB are free"),
        (on_gpus(cuda=None, gpus=[]), "yellow", "built for processors alone"),
        (on_gpus(cuda="13.0", gpus=[]), "red", "built for CUDA 13.0; driver 570.86.15 runs up to CUDA 12.8"),
        (on_gpus(cuda="12.9", gpus=[]), "red", "finds no GPU that it can use"),
        (
            on_gpus(architectures=["sm_70", "sm_100"]),
            "red",
            "H100 is sm_90; torch 2.15.0 is built for sm_70, sm_100",
        ),
        (on_gpus(architectures=["compute_80"]), "green", "1 x H100"),
        (on_gpus(architectures=["sm_86", "sm_90a"]), "green", "1 x H100"),
    ],
)
def test_gpus_that_torch_cannot_use_are_named(found: list[Finding], level: str, what: str) -> None:
    assert levels(found) == [level]
    assert what in found[0].what


# --- variables


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
        ("CUDA_VISIBLE_DEVICES", "", "yellow"),
        ("NCCL_DEBUG", "INFO", "yellow"),
        ("NCCL_P2P_DISABLE", "1", "yellow"),
        ("NCCL_SOCKET_IFNAME", "ib0", "red"),
        ("GLOO_SOCKET_IFNAME", "eth", "green"),
        ("NCCL_SOCKET_IFNAME", "=eth", "red"),
        ("NCCL_SOCKET_IFNAME", "^docker", "green"),
        ("NCCL_SOCKET_IFNAME", "ib,eth0:1", "green"),
        ("CUDA_LAUNCH_BLOCKING", "1", "yellow"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", "yellow"),
        ("PYTHONPATH", "/x", "yellow"),
        ("MALLOC_PERTURB_", "3", "yellow"),
        ("LD_PRELOAD", "/x.so", "yellow"),
        ("OMP_NUM_THREADS", "4", "green"),
        ("CUDA_VISIBLE_DEVICES", "0", "green"),
        ("NCCL_DEBUG", "WARN", "green"),
        ("CUDA_LAUNCH_BLOCKING", "0", "green"),
        ("SLURM_JOB_ID", "3", "green"),
        ("HOME", "/root", "green"),
    ],
)
def test_variables_that_leak_into_a_run_are_named(name: str, value: str, level: str) -> None:
    found = variables.leaks({name: value}, cores=8, devices=2, interfaces=["lo", "eth0"])
    assert levels(found) == [level]
    assert level == "green" or found[0].what.startswith(f"{name}={value}: ")


def test_a_variables_value_cannot_forge_a_line() -> None:
    (found,) = variables.leaks({"PET_X": "a\nred \x1b[31m" + "x" * 500}, cores=1, devices=0, interfaces=[])
    assert found.what.isprintable()
    assert len(found.what) < 250


# --- this machine


@pytest.mark.parametrize(
    ("limits", "processes", "level"),
    [
        (Limits(open_files=1048576, processes=None, cores=64, quota=None), 8, "green"),
        (Limits(open_files=512, processes=None, cores=64, quota=None), 1, "yellow"),
        (Limits(open_files=64, processes=None, cores=64, quota=None), 1, "red"),
        (Limits(open_files=4096, processes=500, cores=64, quota=None), 8, "red"),
        (Limits(open_files=4096, processes=5000, cores=64, quota=8.0), 8, "green"),
        (Limits(open_files=4096, processes=None, cores=64, quota=0.5), 1, "yellow"),
        (Limits(open_files=4096, processes=None, cores=2, quota=None), 4, "yellow"),
    ],
)
def test_limits_that_are_too_low_are_named(limits: Limits, processes: int, level: str) -> None:
    assert levels(host.limits(limits, processes=processes, workers=2)) == [level]


def test_a_control_groups_limits_count(tmp_path: Path) -> None:
    (tmp_path / "pids.max").write_text("77\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    found = host.read_limits(tmp_path)
    assert (found.processes, found.quota) == (77, 1.5)
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert host.read_limits(tmp_path).quota is None
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    assert host.free_memory(groups=tmp_path) == 3 * GIB // 4


@pytest.mark.parametrize(
    ("free", "needed", "level"),
    [
        (64 * GIB, None, "green"),
        (1 * GIB, None, "yellow"),
        (64 * GIB, 10 * GIB, "green"),
        (24 * GIB, 10 * GIB, "yellow"),
        (8 * GIB, 10 * GIB, "red"),
    ],
)
def test_memory_is_held_against_what_was_measured(free: int, needed: int | None, level: str) -> None:
    assert levels([host.memory(free, processes=2, needed=needed)]) == [level]


@pytest.mark.parametrize(
    ("free", "needed", "files", "level"),
    [
        (100 * GIB, 10 * GIB, None, "green"),
        (15 * GIB, 10 * GIB, None, "yellow"),
        (9 * GIB, 10 * GIB, None, "red"),
        (GIB // 4, None, None, "red"),
        (100 * GIB, 10 * GIB, 12, "red"),
    ],
)
def test_a_disk_is_held_against_the_checkpoints(
    free: int, needed: int | None, files: int | None, level: str
) -> None:
    assert levels([host.disk(free, needed, where=Path("/x"), files=files)]) == [level]


@pytest.mark.parametrize(
    ("free", "workers", "level"),
    [
        (GIB, 4, "green"),
        (GIB // 4, 4, "yellow"),
        (1 << 20, 4, "red"),
        (1 << 20, 0, "yellow"),
        (None, 1, "red"),
    ],
)
def test_workers_need_shared_memory(free: int | None, workers: int, level: str) -> None:
    assert levels([host.shared_memory(free, workers=workers)]) == [level]


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (Ports(ephemeral_from=32768, tried=8, bound=8, address="10.0.0.1"), ["green"]),
        (Ports(ephemeral_from=32768, tried=8, bound=0, address="10.0.0.1"), ["red"]),
        (Ports(ephemeral_from=1024, tried=8, bound=8, address=None), ["yellow", "yellow"]),
    ],
)
def test_ports_have_to_be_free_and_the_hosts_name_to_lead_somewhere(
    ports: Ports, expected: list[str]
) -> None:
    assert levels(host.ports(ports, host="h")) == expected


def test_a_busy_machine_is_no_place_to_measure() -> None:
    assert levels([host.load(0.3, cores=2), host.load(1.2, cores=2)]) == ["green", "yellow"]


# --- the run folder


def test_a_folder_of_a_usual_disk_does(tmp_path: Path) -> None:
    assert folder.try_out(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert abs(folder.clock_ahead(tmp_path)) < 5
    assert folder.kind_of_disk(Path("/proc")) == "proc"
    assert folder.existing(tmp_path / "runs" / "a" / "b") == tmp_path
    assert folder.existing(tmp_path) == tmp_path.parent
    assert folder.existing(Path("/dev/shm")) == Path("/dev/shm"), "a disk of its own"


@pytest.mark.parametrize(("shift", "expected"), [(-100, 100.0), (100, -100.0)])
def test_a_servers_other_clock_is_seen(
    shift: int, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.utime
    monkeypatch.setattr(os, "utime", lambda path: plain(path, times=(time.time() + shift,) * 2))
    assert folder.clock_ahead(tmp_path) == pytest.approx(expected, abs=5)


@pytest.mark.parametrize(
    ("kind", "wrong", "level"),
    [("ext4", [], "green"), ("tmpfs", [], "yellow"), ("overlay", [], "yellow"), ("nfs4", ["x"], "red")],
)
def test_a_disk_that_loses_what_is_written_is_named(kind: str, wrong: list[str], level: str) -> None:
    assert levels([folder.judge(Path("/runs"), wrong, kind)]) == [level]


def test_the_longest_mount_point_is_a_folders_disk(tmp_path: Path) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    shown = str(place).replace(" ", "\\040")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"20 1 {number} / / rw - ext4 /dev/x rw\n21 20 {number} / {shown} rw shared:1 - nfs4 server:/x rw\n"
        f"22 20 {number} / {shown}/deeper rw - tmpfs x rw\n"
    )
    assert folder.kind_of_disk(place, mounts) == "nfs4"


@pytest.mark.parametrize(
    ("ahead", "level"),
    [
        ({"a": 0.1, "b": -0.2}, "green"),
        ({"a": 3.0, "b": 0.0}, "yellow"),
        ({"a": -30.0}, "red"),
        ({"a": 20.0, "b": -20.0}, "red"),
    ],
)
def test_clocks_that_differ_are_named(ahead: dict[str, float], level: str) -> None:
    assert levels([folder.clocks(ahead)]) == [level]


# --- what was measured

STEP = {
    "images_per_second": 100.0,
    "examples": 8,
    "precision": "fp32",
    "device": "cpu",
    "threads": 2,
    "peak_bytes": GIB,
    "memory_bytes": None,
}
ON_GPU = STEP | {"device": "cuda:0", "memory_bytes": 80 * GIB}
PROBED: dict[str, dict[str, Any]] = {
    "build": BUILD,
    "vision": {"torchvision": "0.29.2"},
    "config": {"model": "resnet18", "batch_size": 32, "images": "5 of 5 in /x"},
    "read": {"images_per_second": 500.0, "bytes_per_second": 1e8, "threads": 8},
    "decode": {"images_per_second": 120.0},
    "model": {
        "gradient_bytes": 4e7,
        "checkpoint_bytes": 1e8,
        "kept_bytes": 4e8,
        "decoding_cores": 2,
        "cores": 2,
    },
    "step": STEP,
    "write": {"bytes_per_second": 5e7, "bytes": 1e8},
}


def test_what_others_print_between_the_probes_lines_is_passed_over() -> None:
    said = 'warning\n{"probe": "a", "x": 1}\n{"x": 1}\n{not json\n[1]\n{"probe": "b", "error": "e"}\n'
    assert pace.read(said) == {"a": {"x": 1}, "b": {"error": "e"}}


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, ["green", "green"]),
        ({"read": PROBED["read"] | {"images_per_second": 50.0}}, 1, ["yellow", "green"]),
        ({"decode": {"images_per_second": 20.0}}, 1, ["green", "yellow"]),
        ({"step": ON_GPU}, 1, ["green", "green"]),
        ({"step": ON_GPU}, 8, ["yellow", "yellow"]),  # each of them takes as much
        ({"step": {"error": "x"}}, 8, ["green", "green"]),
        ({"read": {"error": "x"}, "decode": {"error": "x"}}, 1, []),
    ],
)
def test_images_that_come_slower_than_training_takes_them_are_named(
    changes: dict[str, Any], processes: int, expected: list[str]
) -> None:
    assert levels(pace.images(PROBED | changes, processes=processes)) == expected


def test_a_step_that_hardly_fits_is_named() -> None:
    assert levels(pace.step(PROBED, processes=1)) == ["green"]
    assert levels(pace.step(PROBED | {"step": ON_GPU}, processes=2)) == ["green"]
    full = ON_GPU | {"peak_bytes": 79 * GIB}
    assert levels(pace.step(PROBED | {"step": full}, processes=2)) == ["yellow"]
    assert pace.step({}, processes=1) == []


def test_checkpoints_that_take_long_are_named() -> None:
    assert levels(pace.checkpoints(PROBED)) == ["green"]
    assert levels(pace.checkpoints(PROBED | {"write": {"bytes_per_second": 1e6}})) == ["yellow"]
    assert pace.checkpoints({}) == []


@pytest.mark.parametrize(
    ("told", "level", "what"),
    [
        (
            {},
            "green",
            "2 processes by gloo: 1 GB/s of a sum of 40 MB, 500 us for a small one; 50 % of a step",
        ),
        ({"seconds": 0.05}, "yellow", "62 % of a step of 80 ms"),
        ({"ranks": 1}, "red", "2 were started"),
        ({"right": False}, "red", "the sum is wrong"),
        (None, "red", "2 processes could not exchange a sum: exit code 1: x"),
    ],
)
def test_an_exchange_is_held_against_a_step(told: dict[str, Any] | None, level: str, what: str) -> None:
    usual = {"ranks": 2, "backend": "gloo", "right": True, "bytes": 4e7, "seconds": 0.04, "latency": 5e-4}
    found = pace.exchange(None if told is None else usual | told, PROBED, ended="exit code 1: x", wanted=2)
    assert levels([found]) == [level]
    assert what in found.what


def test_what_the_probe_could_not_do_is_red() -> None:
    assert pace.failures(PROBED, ended=None) == []
    found = pace.failures({"vision": {"error": "operator torchvision::nms"}}, ended="no end after 90 s (x)")
    assert levels(found) == ["red", "red"]
    assert [one.name for one in found] == ["torchvision", "measuring"]


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (999e9, "999 GB"), (5e15, "5,000 TB")]
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert size(count) == text


# --- several nodes

NODE = {"host": "a", "ahead": 0.0, "versions": {"torch": "2", "numpy": "1"}, "sees": [0, 1]}
TWO = [NODE | {"node": 0}, NODE | {"node": 1, "host": "b"}]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (TWO, ["green", "green", "green"]),
        (TWO[:1], ["red"]),
        ([], ["red"]),
        ([TWO[0], TWO[1] | {"sees": [1]}], ["red", "green", "green"]),
        ([TWO[0], TWO[1] | {"ahead": 5.0}], ["green", "yellow", "green"]),
        ([TWO[0], TWO[1] | {"versions": {"torch": "3", "numpy": "1"}}], ["green", "green", "red"]),
        ([TWO[0], TWO[1] | {"versions": {"torch": "2"}}], ["green", "green", "yellow"]),
    ],
)
def test_nodes_that_differ_are_named(told: list[dict[str, Any]], expected: list[str]) -> None:
    assert levels(nodes.judge(told, nodes=2, why="exit code 1: srun")) == expected


def test_nodes_are_told_apart_in_what_srun_prints() -> None:
    said = (
        '{"node": 1, "host": "b"}\nnoise\n{"node": 0, "host": "a"}\n{"node": 1, "exchange": "x"}\n{"node"\n'
    )
    assert nodes.read(said) == [{"node": 0, "host": "a"}, {"node": 1, "host": "b", "exchange": "x"}]


def test_nodes_without_srun_are_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    patient = examine.Patient(run=tmp_path / "run", processes=1, nodes=2, options=(), scratch=tmp_path)
    assert levels(examine._exchange(patient)) == ["red"]


def test_nodes_meet_in_a_shared_folder_and_say_whom_they_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SECONDS_TO_SEE", 0.2)
    assert nodes.meet(tmp_path, node=1, nodes=2, facts={"node": 1}) == [{"node": 1}]
    assert nodes.meet(tmp_path, node=0, nodes=2, facts={"node": 0}) == [{"node": 0}, {"node": 1}]


# --- children


def test_a_child_is_not_waited_for_for_ever_and_takes_its_own_children_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "_SECONDS_TO_LEAVE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    started = f"subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    program = f"import subprocess, sys; {started}.wait()"
    mark = str(uuid.uuid4())
    ended = child.run(
        [sys.executable, "-c", program], seconds=2.0, environment={**os.environ, "REGRAFT_TESTED_CHILD": mark}
    )
    assert ended.code is None
    assert ended.why(2.0) == "no end after 2 s (it has said nothing)"
    assert alive(mark) == []


def test_how_a_child_failed_is_its_last_error() -> None:
    assert Child(code=0, out="", err="Error: x").why(1) is None
    assert Child(code=3, out="", err="a\nValueError: b\nend\n").why(1) == "exit code 3: ValueError: b"
    assert Child(code=3, out="", err="a\nb\n").why(1) == "exit code 3: b"


# --- the whole


def alive(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """Let children answer at once what a sound machine's would; yields their commands."""
    commands: list[list[str]] = []
    summed = {"ranks": 2, "backend": "gloo", "right": True, "bytes": 4e7, "seconds": 0.01, "latency": 1e-4}

    def run(command: list[str], **_: object) -> Child:
        commands.append(command)
        told = PROBED if "pace" in command else {"allreduce": summed}
        return Child(
            code=0, out="".join(json.dumps({"probe": k} | v) + "\n" for k, v in told.items()), err=""
        )

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(examine, "_ask_driver", lambda: None)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_a_check_that_fails_itself_is_a_finding_and_the_rest_go_on(
    usual: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(host, "read_limits", broken)
    monkeypatch.setattr(software, "versions", broken)
    assert doctor.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    failed = [one for one in said["findings"] if "itself failed: ZeroDivisionError: x" in one["what"]]
    assert [(one["name"], one["level"]) for one in failed] == [("versions", "yellow"), ("limits", "yellow")]
    assert said["findings"][-1]["name"] == "all-reduce"


def test_the_exit_code_is_1_only_for_what_is_red(
    usual: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("yellow variables: PET_NNODES=2: ") for line in lines)
    assert (
        lines[lines.index(next(x for x in lines if "PET_NNODES=2" in x)) + 1]
        == "       try: unset PET_NNODES"
    )
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["level"] == "red"


def test_the_trainers_options_are_handed_on_and_its_own_are_not(
    usual: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main(["--nproc", "3", "--config", "a b.yaml", "--json", "--optim.lr=$(touch x)"])
    measured, exchanged = usual
    assert measured[-4:] == ["3", "--config", "a b.yaml", "--optim.lr=$(touch x)"]
    assert "--nproc-per-node=3" in exchanged
    assert "cpu" not in exchanged


def test_a_folder_that_cannot_be_written_to_is_red(
    usual: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--run.dir=/proc/runs/a", "--json"]) == 1
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert (found["run folder"]["level"], found["run folder"]["what"]) == (
        "red",
        "/proc: cannot be written to",
    )
    assert found["measuring"]["level"] == "yellow"


@pytest.mark.parametrize("words", [["--nproc", "0"], ["--nodes", "x"], ["--nproc"]])
def test_a_wrong_number_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(words)
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_a_job_is_examined_on_all_of_its_nodes() -> None:
    assert doctor._nodes_of_job({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "3"}) == 3
    assert doctor._nodes_of_job({"SLURM_JOB_NUM_NODES": "3"}) == 1
    assert doctor._nodes_of_job({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "x"}) == 1


TINY = ("--data.image_size=32", "--model.name=squeezenet1_1", "--model.weights=null", "--run.device=cpu")


def regraft(*words: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "doctor", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_machine_without_gpus_is_examined_whole_and_left_as_it_was(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 4, "b": 4}, "test": {"a": 1, "b": 1}})
    (tmp_path / "here").mkdir()
    # What torchrun would obey if it came to it.
    process = regraft(
        *(f"--data.root={root}", *TINY, "--nproc", "2", "--json"),
        cwd=tmp_path / "here",
        PET_NNODES="7",
        RANK="3",
    )
    out, err = process.communicate(timeout=300)
    said = json.loads(out)
    found = {one["name"]: one for one in said["findings"]}
    assert [one for one in said["findings"] if one["level"] == "red"] == [], err
    assert process.returncode == 0
    for name in (
        "versions",
        "run folder",
        "reading",
        "decoding",
        "training step",
        "checkpoints",
        "all-reduce",
    ):
        assert name in found, err
    assert found["all-reduce"]["what"].startswith("2 processes by gloo: ")
    assert found["versions"]["level"] == "green"
    assert "PET_NNODES=7" in out
    assert "checking all-reduce between processes" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "images"]
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_that_is_ended_leaves_no_process_and_no_file_behind(name: str, tmp_path: Path) -> None:
    mark = str(uuid.uuid4())
    process = regraft(*TINY, "--data.root=hotdog", cwd=tmp_path, REGRAFT_TESTED_CHILD=mark)
    until = time.monotonic() + 120
    while len(alive(mark)) < 2 or not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: nothing was left behind"
    until = time.monotonic() + 10
    while alive(mark):  # killed, and on the way out
        assert time.monotonic() < until
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []

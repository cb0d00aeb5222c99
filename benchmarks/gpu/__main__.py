"""Run the checks of a GPU, each in a process of its own: see benchmarks/gpu.sh."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import describe_machine, missing_packages

Record = dict[str, Any]
"""Name, status, seconds, details and message of a check."""
BUDGET = 460
"""Seconds for everything: gpu.sh ends within 8 minutes."""
LEAST = 10
"""Seconds that must be left to start a check."""
CPU_LIMIT = 200
"""Time limit of every check on a CPU, which may be busy [seconds]."""
GOOD = ("passed", "skipped")


def main() -> int:
    """Run the checks; return 0 if all have passed, 1 if not, 2 if packages are missing."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description="Checks and speed of regraft on one GPU.")
    parser.add_argument("--cpu", action="store_true", help="the same checks on a CPU with tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="names of checks")
    parser.add_argument("--budget", type=int, default=BUDGET, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results.json and results.txt")
    parser.add_argument("--folder", type=Path, help="folder of images and runs; default: a temporary one")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the section of RESULTS.md of an earlier run")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # in the process of one check
    arguments = parser.parse_args()
    if arguments.report:
        print(section(json.loads(arguments.report.read_text(encoding="utf-8"))))
        return 0
    device = "cpu" if arguments.cpu or os.environ.get("DEVICE") == "cpu" else "cuda"
    if missing := missing_packages():
        print(f"missing Python packages: {', '.join(missing)}. The head of benchmarks/gpu.sh says how to bring them")
        return 2
    if arguments.check:
        print(json.dumps(run_check(arguments.check, arguments.folder, device)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run_checks(arguments, arguments.folder or Path(folder), device)


def run_check(name: str, folder: Path, device: str) -> Record:
    """Run a check in this process; return its status, details and message."""
    from benchmarks.gpu.checks import checks  # noqa: PLC0415 (imported after the packages were looked for)
    from benchmarks.gpu.workplace import CheckFailed, CheckSkipped, Workplace  # noqa: PLC0415

    work = Workplace(folder=folder, device=device)
    try:
        details = dict(checks(work)[name].function(work))
    except CheckSkipped as error:
        return {"status": "skipped", "message": str(error)}
    except (CheckFailed, SystemExit) as error:
        return {"status": "failed", "message": str(error)}
    is_below = work.on_gpu and "ratio" in details and details["ratio"] < details["asked"]
    return {"status": "below" if is_below else "passed", "details": details}


def run_checks(arguments: argparse.Namespace, folder: Path, device: str) -> int:
    """Run every check in its own process, then measure the speed again while there is time."""
    from benchmarks.gpu.checks import checks  # noqa: PLC0415
    from benchmarks.gpu.workplace import Workplace  # noqa: PLC0415

    ends = time.monotonic() + arguments.budget
    machine = describe_machine(device)
    print(json.dumps(machine), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    every = checks(Workplace(folder=folder, device=device))
    names = arguments.only or list(every)
    if unknown := sorted({*names} - {*every}):
        raise SystemExit(f"no checks named {', '.join(unknown)}: expected some of {', '.join(every)}")
    records: list[Record] = []

    def left() -> float:
        return ends - time.monotonic()

    def measure(name: str) -> None:
        limit = every[name].limit if device == "cuda" else CPU_LIMIT
        record = in_own_process(name, folder, device, limit=min(limit, left()))
        records.append(record)
        print(f"{name:24} {record['status']:10} {record['seconds']:6.1f} s  {describe(record)}", flush=True)
        write(arguments.out, machine, records)

    for name in names:
        if left() > LEAST:
            measure(name)
        else:
            records.append({"name": name, "status": "not run", "seconds": 0.0, "message": "no time was left"})
    took = {record["name"]: record["seconds"] for record in records if "ratio" in record.get("details", {})}
    while device == "cuda" and (again := [name for name in took if 1.2 * took[name] < left()]):
        for name in again:
            if 1.2 * took[name] < left():
                measure(name)
    write(arguments.out, machine, records)
    print(f"\n{table(records)}\n\nresults: {arguments.out}/results.json, {arguments.out}/results.txt")
    return int(not all(status(group) in GOOD for group in grouped(records).values()))


def in_own_process(name: str, folder: Path, device: str, *, limit: float) -> Record:
    """Run a check in its own process, and kill it and its children when its time is over."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--check", name, "--folder", str(folder)]
    words += ["--cpu"] * (device == "cpu")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    began = time.monotonic()
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"name": name, "status": "timed out", "seconds": limit, "message": f"not done within {limit:.0f} s"}
    record = {"name": name, "status": "failed", "seconds": time.monotonic() - began}
    try:
        return record | json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return record | {"message": f"exit code {process.returncode}: {errors.strip()[-2000:]}"}


def describe(record: Record) -> str:
    """Return the message or the figures of a record in one line."""
    if "message" in record:
        return str(record["message"]).splitlines()[0][:200]
    return ", ".join(f"{key} {shorten(value)}" for key, value in record["details"].items())


def shorten(value: object) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return name -> the records of a check, of which a measurement of speed may have several."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["name"], []).append(record)
    return groups


def ratios(group: Sequence[Record]) -> list[float]:
    """Return the measured ratios of a check."""
    return [record["details"]["ratio"] for record in group if "ratio" in record.get("details", {})]


def status(group: Sequence[Record]) -> str:
    """Return the status of a check; the median of several measurements of speed decides."""
    if len(measured := ratios(group)) > 1:
        asked = next(record["details"]["asked"] for record in group if "details" in record)
        return "passed" if statistics.median(measured) >= asked else "below"
    return str(group[0]["status"])


def table(records: Sequence[Record]) -> str:
    """Return one line per check."""
    lines = [f"{'check':24} {'status':10} measured"]
    for name, group in grouped(records).items():
        text = describe(group[0])
        if len(measured := ratios(group)) > 1:
            text = (
                f"median ratio {statistics.median(measured):.3f} of {len(measured)} rounds "
                f"({min(measured):.3f} to {max(measured):.3f}); first round: {text}"
            )
        lines.append(f"{name:24} {status(group):10} {text}")
    return "\n".join(lines)


def section(results: Mapping[str, Any]) -> str:
    """Return the results as a section of RESULTS.md."""
    machine = dict(results["machine"])
    installed = machine.pop("versions")
    names = ("torch", "torchvision", "accelerate", "timm")
    versions = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
    hardware = ", ".join(f"{name} {value}" for name, value in machine.items())
    return (
        f"## {results['date']}: {machine.get('gpu', 'CPU')}\n\n{hardware}; {versions}.\n\n    benchmarks/gpu.sh\n\n"
        f"```\n{table(results['checks'])}\n```"
    )


def write(folder: Path, machine: Mapping[str, object], records: Sequence[Record]) -> None:
    """Write what was measured so far."""
    results = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "checks": records}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.txt").write_text(f"{json.dumps(machine)}\n\n{table(records)}\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())

"""Check several nodes of a Slurm cluster: a shared run folder, equal versions, and an all-reduce between them.

`srun` starts this program once per node: `python -m launch.doctor.nodes FOLDER PROCESSES PROGRAM ...`. Each node writes
a file to the folder and looks for the files of the others. If it sees all of them, it starts PROGRAM with torchrun.
"""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.doctor import measured
from launch.doctor.finding import DoctorContext, Finding, Level
from launch.doctor.software import PACKAGES, installed
from launch.slurm import allocation
from launch.slurm.node import NodeTask, rendezvous_options

SHARED_FOLDER_SECONDS = 20.0
TOTAL_SECONDS = SHARED_FOLDER_SECONDS + measured.ALL_REDUCE_SECONDS + 40.0


def check_nodes(context: DoctorContext) -> list[Finding]:
    """Run this module on all nodes through srun, and check what the nodes report."""
    if context.scratch is None or shutil.which("srun") is None:
        problem = "there is no srun here" if context.scratch else "the run folder is not writable"
        remedy = "run it on the cluster with a writable run.dir, or drop --nodes"
        return [Finding("nodes", "red", f"{context.nodes} were requested, but {problem}", remedy)]
    command = srun_command(context, context.scratch, in_job="SLURM_JOB_ID" in os.environ)
    result = measured.run_without_launcher(command, seconds=TOTAL_SECONDS)
    failure = result.failure_reason(TOTAL_SECONDS)
    results = measured.parse_output(result.stdout)
    findings = check_reports(results, nodes=context.nodes, failure=failure)
    if findings[0].level == "red":
        return findings
    step, processes = context.measured.get("training step", {}), context.nodes * context.processes
    summed = results.get("all-reduce")
    return [*findings, measured.check_all_reduce(summed, step, failure=failure, processes=processes)]


def srun_command(context: DoctorContext, folder: Path, *, in_job: bool) -> list[str]:
    """Return the command that starts this program on each node, in this job or in a new one that starts at once."""
    return [
        *("srun", f"--nodes={context.nodes}", f"--ntasks={context.nodes}", "--ntasks-per-node=1"),
        "--job-name=regraft-doctor",
        *([] if in_job else ["--immediate=30", "--time=5"]),
        *(sys.executable, "-m", "launch.doctor.nodes", str(folder), str(context.processes)),
        *measured.all_reduce_program(context),
    ]


def check_reports(results: Mapping[str, Mapping[str, Any]], *, nodes: int, failure: str | None) -> list[Finding]:
    """Check the reports of all nodes; `failure` says why srun failed, if it did."""
    reports = [results[f"node {node}"] for node in range(nodes) if f"node {node}" in results]
    hosts = ", ".join(str(report["host"]) for report in reports)
    if len(reports) < nodes:
        message = f"{len(reports)} of {nodes} answered: {failure or 'srun printed nothing more'}"
        remedy = "see `sinfo`; or run `regraft doctor` in an allocation of `salloc --nodes N`"
        return [Finding("nodes", "red", message, remedy)]
    blind = [str(report["host"]) for report in reports if report["sees"] != list(range(nodes))]
    findings = [Finding("shared run folder", "green", f"{hosts} see each other's files")]
    if blind:
        message = f"{', '.join(blind)} does not see the files of the other nodes"
        remedy = "set run.dir to a folder on a file system that all nodes share"
        findings = [Finding("shared run folder", "red", message, remedy)]
    for name in sorted({name for report in reports for name in report["versions"]}):
        versions = {str(report["host"]): report["versions"].get(name, "missing") for report in reports}
        if len(set(versions.values())) > 1:
            message = f"{name}: " + ", ".join(f"{version} on {host}" for host, version in versions.items())
            level: Level = "red" if name in ("regraft", "torch", "accelerate") else "yellow"
            findings.append(Finding("node versions", level, message, "use one environment on all nodes"))
    return findings


def share_report(folder: Path, report: Mapping[str, Any], *, node: int, nodes: int) -> list[int]:
    """Write a report to the shared folder, and return the nodes whose reports this node sees there."""
    temporary = folder / f".node-{node}.tmp"
    temporary.write_text(json.dumps(report), encoding="ascii")
    temporary.replace(folder / f"node-{node}.json")
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    seen: list[int] = []
    while len(seen) < nodes and time.monotonic() < deadline:
        os.listdir(folder)  # noqa: PTH208 (makes a network file system ask its server)
        seen = [number for number in range(nodes) if (folder / f"node-{number}.json").exists()]
        time.sleep(0.1)
    return seen


def main(argv: Sequence[str]) -> int:
    """Run the checks of one node, print its report, and return 1 if the all-reduce failed."""
    folder, processes, *program = argv
    node, node_list = int(os.environ["SLURM_NODEID"]), os.environ["SLURM_STEP_NODELIST"]
    names = allocation.node_names(node_list)
    versions = {name: package[0] for name in PACKAGES if (package := installed(name)) is not None}
    versions["python"] = platform.python_version()
    report = {"probe": f"node {node}", "host": names[node], "versions": versions}
    seen = share_report(Path(folder), report, node=node, nodes=len(names))
    print(json.dumps(report | {"sees": seen}), flush=True)
    if len(seen) < len(names):
        return 0
    task = NodeTask(
        addresses=allocation.node_addresses(node_list, names),
        port=allocation.choose_port(os.environ["SLURM_JOB_ID"], lambda _: True),  # the same on all nodes
        rdzv_id=Path(folder).name,
        logs=Path(folder),
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--log-dir={folder}"]
    command = [*torchrun, *rendezvous_options(task, node=node), *program]
    result = measured.run_without_launcher(command, seconds=measured.ALL_REDUCE_SECONDS)
    print(result.stdout, end="", flush=True)
    failure = result.failure_reason(measured.ALL_REDUCE_SECONDS)
    if failure is not None:
        print(f"error: {names[node]}: {failure}", file=sys.stderr)
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

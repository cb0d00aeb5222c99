"""Several nodes: whether they see one folder, agree on the time and the versions, and can exchange a sum.

`srun` starts this once on each node: `python -m launch.doctor.nodes FOLDER NODES PROCESSES BYTES`. Each leaves a file
in the folder, looks for the others' and, where it sees all of them, starts torchrun with the first one as its host.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import contract
from launch.doctor.finding import Finding, green, red, yellow
from launch.doctor.host import PORTS_FROM, interfaces, try_ports
from launch.doctor.run_folder import clock_ahead, clocks
from launch.doctor.software import SHOWN, installed
from launch.local import process as child
from launch.local.command import clean

SECONDS_TO_SEE = 20.0
SECONDS_TO_EXCHANGE = 60.0
SECONDS = SECONDS_TO_SEE + SECONDS_TO_EXCHANGE + 40.0
_FIRST_PORT_OF_ALL = 32768


def srun(folder: Path, *, nodes: int, processes: int, size: int, inside: bool) -> list[str]:
    """Return the command that starts this on `nodes` nodes; `inside` an allocation, or in one of its own, at once."""
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--job-name=regraft-doctor",
        *([] if inside else ["--immediate=30", "--time=5"]),
        sys.executable,
        "-m",
        "launch.doctor.nodes",
        str(folder),
        str(nodes),
        str(processes),
        str(size),
    ]


def read(output: str) -> list[dict[str, Any]]:
    """Return what the nodes have told, in their order."""
    told: dict[int, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith('{"node"'):
            try:
                fields = json.loads(line)
                told.setdefault(int(fields["node"]), {}).update(fields)
            except (ValueError, KeyError, TypeError):
                continue
    return [told[node] for node in sorted(told)]


def judge(told: Sequence[Mapping[str, Any]], *, nodes: int, why: str | None) -> list[Finding]:
    """Return what the nodes come to; `why` is how srun failed, if it has."""
    met = [one for one in told if "host" in one]
    if len(met) < nodes:
        return [
            red(
                "nodes",
                f"{len(met)} of {nodes} answered: {why or 'srun has said nothing more'}",
                "see `sinfo`; within an allocation: salloc --nodes ..., and `regraft doctor` in it",
            )
        ]
    everyone = {one["node"] for one in met}
    blind = [one for one in met if set(one["sees"]) != everyone]
    hosts = ", ".join(str(one["host"]) for one in met)
    findings = []
    if blind:
        findings.append(
            red(
                "run folder on all nodes",
                f"{', '.join(str(one['host']) for one in blind)} does not see what the others write",
                "put run.dir on a file system that all nodes share",
            )
        )
    else:
        findings.append(green("run folder on all nodes", f"{hosts} see what each of them writes"))
    findings.append(clocks({f"{one['host']} ({one['node']})": float(one["ahead"]) for one in met}))
    findings += _versions(met)
    return findings


def _versions(met: Sequence[Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for name in sorted({name for one in met for name in one["versions"]}):
        found = {str(one["host"]): one["versions"].get(name) for one in met}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{version or 'none'} on {host}" for host, version in found.items())
            judge = red if name in ("regraft", "torch", "accelerate") else yellow
            findings.append(
                judge("versions on all nodes", f"{name}: {told}", "one environment for all nodes")
            )
    return findings or [green("versions on all nodes", "the same")]


def address(environment: Mapping[str, str]) -> str:
    """Return this node's address as Slurm knows it; a node's name need not resolve."""
    name = environment.get("SLURMD_NODENAME", "")
    if name:
        try:
            said = subprocess.run(
                ["scontrol", "show", "node", name, "-o"],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        found = re.search(r"\bNodeAddr=(\S+)", said)
        if found:
            return found[1]
    return socket.gethostname()


def torchrun(
    met: Sequence[Mapping[str, Any]], *, node: int, processes: int, size: int, token: str
) -> list[str]:
    """Return a node's command for the exchange."""
    head = met[0]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(met)}",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-id=regraft-doctor-{token}",
        f"--rdzv-endpoint={head['address']}:{head['port']}",
        f"--rdzv-conf=is_host={'true' if node == 0 else 'false'},join_timeout=50,read_timeout=50",
        f"--local-addr={met[node]['address']}",
        str(contract.trainer_folder() / "probe.py"),
        "allreduce",
        str(size),
    ]


def meet(folder: Path, *, node: int, nodes: int, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Leave facts in the folder, and return those of the nodes that are seen there, this one's among them."""
    temporary = folder / f".node-{node}.tmp"
    temporary.write_text(json.dumps(facts), encoding="ascii")
    temporary.replace(folder / f"node-{node}.json")
    until = time.monotonic() + SECONDS_TO_SEE
    found: list[dict[str, Any]] = []
    while len(found) < nodes and time.monotonic() < until:
        os.listdir(folder)  # noqa: PTH208 (a network file system then asks its server)
        paths = [folder / f"node-{number}.json" for number in range(nodes)]
        found = [json.loads(path.read_text(encoding="ascii")) for path in paths if path.exists()]
        time.sleep(0.1)
    return found


def main(words: Sequence[str]) -> int:
    """Do a node's part."""
    folder, nodes, processes, size = Path(words[0]), int(words[1]), int(words[2]), int(words[3])
    node = int(os.environ.get("SLURM_NODEID", "0"))
    ephemeral = min(_FIRST_PORT_OF_ALL, try_ports(count=1).ephemeral_from)
    facts = {
        "node": node,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "address": address(os.environ),
        "port": random.randrange(PORTS_FROM, max(ephemeral, PORTS_FROM + 1)),
        "ahead": clock_ahead(folder),
        "interfaces": list(interfaces()),
        "versions": {name: there[0] for name in SHOWN if (there := installed(name)) is not None}
        | {"python": sys.version.split()[0]},
    }
    met = meet(folder, node=node, nodes=nodes, facts=facts)
    print(json.dumps(facts | {"sees": [one["node"] for one in met]}), flush=True)
    if len(met) < nodes:
        return 0
    command = torchrun(met, node=node, processes=processes, size=size, token=folder.name)
    ended = child.run(command, seconds=SECONDS_TO_EXCHANGE, environment=clean(os.environ))
    print(ended.out, end="", flush=True)
    why = ended.why(SECONDS_TO_EXCHANGE)
    if why is not None:
        print(json.dumps({"node": node, "exchange": why}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

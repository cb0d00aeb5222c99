"""What trainer/probe.py has measured, judged."""

import json
from collections.abc import Mapping
from typing import Any

from launch.doctor.finding import Finding, green, red, size, yellow

Probed = Mapping[str, Mapping[str, Any]]
"""Probe -> what it has told."""
SECONDS_FOR_A_CHECKPOINT = 30.0
_SLOW_NETWORK = 0.5
"""Of a step's time, for its exchange, that is worth a word."""


def read(output: str) -> dict[str, dict[str, Any]]:
    """Return what the probe's output tells; lines that others have printed are passed over."""
    found: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                fields = json.loads(line)
                found[str(fields.pop("probe"))] = fields
            except (ValueError, KeyError, AttributeError):
                continue
    return found


def failures(probed: Probed, *, ended: str | None) -> list[Finding]:
    """Return what the probe could not do.

    Args:
        probed: what it told.
        ended: how it ended before its time, None where it came to its end.

    """
    found: list[Finding] = []
    for name, remedy in (
        ("build", "import torch does not work: install torch and torchvision anew, together, from one index"),
        ("vision", "torch and torchvision do not fit: install both anew, together, from one index"),
        ("config", "mend the option that it names"),
        ("read", "see that the images can be read from here"),
        ("decode", "see that the images can be read from here"),
        ("step", "a smaller share of the batch at once: --train.accumulation 2, or more memory"),
        ("write", "put run.dir on a disk that can be written to"),
    ):
        error = probed.get(name, {}).get("error")
        if error is not None:
            found.append(red(_TITLES[name], str(error), remedy))
    if ended is not None:
        found.append(red("measuring", ended, "python -c 'import torch, torchvision' shows more"))
    return found


_TITLES = {
    "build": "torch",
    "vision": "torchvision",
    "config": "config",
    "read": "reading",
    "decode": "decoding",
    "step": "training step",
    "write": "checkpoints",
}


def step(probed: Probed, *, processes: int) -> list[Finding]:
    """Return the pace of a training step, and whether it fits into its GPU."""
    found = probed.get("step", {})
    if "images_per_second" not in found:
        return []
    on_gpu = _is_on_gpu(found)
    where = f"each of {processes} processes" if on_gpu else f"{found['threads']} threads"
    what = (
        f"{_rate(found['images_per_second'])} images/s in {found['precision']} on {found['device']}, {where}: "
        f"{probed['config']['model']}, {found['examples']} at once"
    )
    if found["memory_bytes"] is not None:
        share = found["peak_bytes"] / found["memory_bytes"]
        what += f", {size(found['peak_bytes'])} of {size(found['memory_bytes'])} at the peak"
        if share > 0.9:
            return [
                yellow(
                    "training step", what, "--train.accumulation 2 takes half the memory for the same update"
                )
            ]
    return [green("training step", what)]


def images(probed: Probed, *, processes: int) -> list[Finding]:
    """Return whether images come as fast as training takes them."""
    read, decode, model, step = (probed.get(name, {}) for name in ("read", "decode", "model", "step"))
    findings: list[Finding] = []
    need = step.get("images_per_second", 0.0) * (processes if _is_on_gpu(step) else 1)
    needed = f"; training takes {_rate(need)}" if need else ""
    if "images_per_second" in read:
        rate = read["images_per_second"]
        what = (
            f"{_rate(rate)} images/s, {size(read['bytes_per_second'])}/s by {read['threads']} readers "
            f"({probed['config']['images']}){needed}"
        )
        findings.append(
            yellow("reading", what, "copy the images to a local disk, and give it by --data.root")
            if need and rate < need
            else green("reading", what)
        )
    if "images_per_second" in decode and model:
        # Where the trainer itself decodes between its updates, the cores are taken from the step.
        cores = min(model["decoding_cores"] * processes, model["cores"])
        rate = decode["images_per_second"] * cores
        what = f"{_rate(decode['images_per_second'])} images/s on one core, {_rate(rate)} on {cores}{needed}"
        findings.append(
            yellow(
                "decoding",
                what,
                "more cores or --data.workers, or smaller files: decoding grows with their pixels",
            )
            if need and rate < need
            else green("decoding", what)
        )
    return findings


def checkpoints(probed: Probed) -> list[Finding]:
    """Return how long a checkpoint takes to write."""
    write, model = probed.get("write", {}), probed.get("model", {})
    if "bytes_per_second" not in write or not model:
        return []
    seconds = model["checkpoint_bytes"] / write["bytes_per_second"]
    what = (
        f"{size(write['bytes_per_second'])}/s to the run folder's disk: {seconds:.1f} s for one of "
        f"{size(model['checkpoint_bytes'])}"
    )
    if seconds > SECONDS_FOR_A_CHECKPOINT:
        return [
            yellow(
                "checkpoints",
                f"{what}; a stop ahead of a time limit has to leave that long",
                "put run.dir on a faster disk; checkpoint.every '10 min' writes less often",
            )
        ]
    return [green("checkpoints", what)]


def exchange(told: Mapping[str, Any] | None, probed: Probed, *, ended: str, wanted: int) -> Finding:
    """Return how fast the processes exchange gradients.

    Args:
        told: the probe's `allreduce`, None where it told nothing.
        probed: what else was told.
        ended: how it ended, for where it told nothing.
        wanted: number of processes.

    """
    if told is None:
        return red(
            "all-reduce",
            f"{wanted} processes could not exchange a sum: {ended}",
            "NCCL_DEBUG=INFO (TORCH_DISTRIBUTED_DEBUG=DETAIL) tells more; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME "
            "name the network interface",
        )
    what = (
        f"{told['ranks']} processes by {told['backend']}: {size(told['bytes'] / told['seconds'])}/s of a sum of "
        f"{size(told['bytes'])}, {1e6 * told['latency']:,.0f} us for a small one"
    )
    if told["ranks"] != wanted:
        return red("all-reduce", f"{what}; {wanted} were started", "see that all of them are started alike")
    if not told["right"]:
        return red(
            "all-reduce", f"{what}; the sum is wrong", "a broken network or GPU: try NCCL_P2P_DISABLE=1"
        )
    pace = probed.get("step", {})
    if "images_per_second" in pace:
        one = pace["examples"] / pace["images_per_second"]
        part = told["seconds"] / one
        what += f"; {100 * part:.0f} % of a step of {1000 * one:,.0f} ms"
        if part > _SLOW_NETWORK:
            return yellow(
                "all-reduce",
                what,
                "a larger train.batch_size exchanges less often; a faster interface by NCCL_SOCKET_IFNAME",
            )
    return green("all-reduce", what)


def _is_on_gpu(step: Mapping[str, Any]) -> bool:
    return str(step.get("device", "")).startswith("cuda")


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"

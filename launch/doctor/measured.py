"""Measure decoding, training steps and all-reduce with trainer/commands/probe.py, and judge the results."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch.doctor.finding import DoctorContext, Finding, Level, format_bytes, make_finding
from launch.local import process
from launch.local.torchrun import without_launcher_variables
from launch.trainer_options import trainer_folder

MEASURE_SECONDS, ALL_REDUCE_SECONDS = 90.0, 60.0
"""Time limits."""
_DEFAULT_ALL_REDUCE_BYTES = 64 << 20
"""Size of the all-reduce if the size of the model is not known."""
_SLOW_ALL_REDUCE = 0.5
"""Share of a training step's time above which the all-reduce is reported as slow."""
_REMEDIES = {
    **dict.fromkeys(("torch", "torchvision"), "reinstall torch and torchvision together, from one index"),
    "config": "fix the option that the message names",
    "decoding": "check that the images can be read on this machine",
    "model": "use --train.micro_batch_size auto, or a machine with more memory",
    "training step": "use --train.micro_batch_size auto, or a machine with more memory",
}


def parse_output(output: str) -> dict[str, dict[str, Any]]:
    """Return the measurements in the output of the probe or of the nodes; other lines are skipped."""
    measured: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                values = json.loads(line)
                measured[str(values.pop("probe"))] = values
            except (ValueError, KeyError, AttributeError):
                continue
    return measured


def run_without_launcher(command: Sequence[str], *, seconds: float) -> process.ProcessResult:
    """Run a command without the variables of an outer launcher."""
    environment = without_launcher_variables(os.environ)
    return process.run_with_timeout(command, seconds=seconds, environment=environment)


def measure(context: DoctorContext) -> list[Finding]:
    """Measure decoding and training steps of the configured run, and check them."""
    if context.scratch is None:
        remedy = "see the finding about the run folder"
        return [Finding("measuring", "yellow", "not possible without a run folder", remedy)]
    probe = [sys.executable, str(trainer_folder() / "commands" / "probe.py"), "measure"]
    arguments = [str(context.scratch), str(context.processes), *context.options]
    result = run_without_launcher([*probe, *arguments], seconds=MEASURE_SECONDS)
    context.measured = parse_output(result.stdout)
    findings = [
        Finding(name, "red", str(context.measured[name]["error"]), remedy)
        for name, remedy in _REMEDIES.items()
        if "error" in context.measured.get(name, {})
    ]
    if failure := result.failure_reason(MEASURE_SECONDS):
        remedy = "python -c 'import torch, torchvision' may show more"
        findings.append(Finding("measuring", "red", failure, remedy))
    return [*findings, *check_step(context), *check_decoding(context)]


def check_step(context: DoctorContext) -> list[Finding]:
    """Report the speed of a training step, and whether it fits in GPU memory."""
    step = context.measured.get("training step", {})
    level: Level = "green"
    if "images_per_second" not in step:
        return []
    message = (
        f"{context.measured['config']['model']}: {_format_rate(step['images_per_second'])} images/s per process in "
        f"{step['precision']} on {step['device']}, {step['batch_size']} images per step"
    )
    if step["memory_bytes"] is not None:
        message += f", peak memory {format_bytes(step['peak_bytes'])} of {format_bytes(step['memory_bytes'])}"
        level = "yellow" if step["peak_bytes"] > 0.9 * step["memory_bytes"] else "green"
    remedy = "--train.micro_batch_size auto takes what fits, and makes the same updates"
    return [make_finding("training step", level, message, remedy)]


def check_decoding(context: DoctorContext) -> list[Finding]:
    """Check that the CPU decodes images as fast as training needs them."""
    decoding, model, step = (context.measured.get(key, {}) for key in ("decoding", "model", "training step"))
    if "images_per_second" not in decoding or not model:
        return []
    # Without workers, the trainer decodes between its updates.
    cores = min(model["decoding_cores"] * context.processes, model["cores"])
    rate = decoding["images_per_second"] * cores
    on_gpu = str(step.get("device", "")).startswith("cuda")  # processes on a CPU share its cores
    needed = step.get("images_per_second", 0.0) * (context.processes if on_gpu else 1)
    message = (
        f"{_format_rate(decoding['images_per_second'])} images/s on one core, {_format_rate(rate)} on {cores}"
        + (f"; training needs {_format_rate(needed)}" if needed else "")
        + f" ({context.measured['config']['images']})"
    )
    remedy = "use more cores or --data.num_workers, or smaller image files"
    return [make_finding("decoding", "yellow" if rate < needed else "green", message, remedy)]


def all_reduce(context: DoctorContext) -> list[Finding]:
    """Compute a sum between the processes of this machine; a run of one process tries two on the CPU."""
    single, processes = context.processes == 1, max(2, context.processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"),
        *([f"--log-dir={context.scratch}"] if context.scratch is not None else []),
        f"--nproc-per-node={processes}",
        *all_reduce_program(context),
        *(["cpu"] if single else []),
    ]
    result = run_without_launcher(command, seconds=ALL_REDUCE_SECONDS)
    failure = result.failure_reason(ALL_REDUCE_SECONDS)
    summed = parse_output(result.stdout).get("all-reduce")
    step = {} if single else context.measured.get("training step", {})
    return [check_all_reduce(summed, step, failure=failure, processes=processes)]


def all_reduce_program(context: DoctorContext) -> list[str]:
    """Return the program for torchrun that computes a sum as large as the gradients."""
    size = int(context.measured.get("model", {}).get("gradient_bytes", _DEFAULT_ALL_REDUCE_BYTES))
    return [str(trainer_folder() / "commands" / "probe.py"), "allreduce", str(size)]


def check_all_reduce(
    summed: Mapping[str, Any] | None, step: Mapping[str, Any], *, failure: str | None, processes: int
) -> Finding:
    """Check that all processes have computed a sum, and how fast compared with a training step."""
    remedy = (
        "NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL shows more; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME set "
        "the network interface; NCCL_P2P_DISABLE=1 avoids a broken connection between GPUs"
    )
    if summed is None:
        message = f"{processes} processes could not compute a sum: {failure or 'they printed nothing'}"
        return Finding("all-reduce", "red", message, remedy)
    rate = format_bytes(summed["bytes"] / summed["seconds"])
    message = f"{summed['processes']} processes with {summed['backend']}: {rate}/s for {format_bytes(summed['bytes'])}"
    level: Level = "green"
    if summed["processes"] != processes:
        level, message = "red", f"{message}; {processes} processes were started"
    elif not summed["correct"]:
        level, message = "red", f"{message}; the sum is wrong"
    elif "images_per_second" in step:
        step_seconds = step["batch_size"] / step["images_per_second"]
        share = summed["seconds"] / step_seconds
        message += f"; {100 * share:.0f} % of a training step of {1000 * step_seconds:,.0f} ms"
        if share > _SLOW_ALL_REDUCE:
            level, remedy = ("yellow", "use a larger train.batch_size, or a faster interface (NCCL_SOCKET_IFNAME)")
    return make_finding("all-reduce", level, message, remedy)


def _format_rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"

"""Check package versions, and whether torch can use the GPUs."""

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version

from launch import machine
from launch.doctor.finding import DoctorContext, Finding, format_bytes

PACKAGES = ("regraft", "torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow")


def installed(name: str) -> tuple[str, list[str]] | None:
    """Return (version, requirements) of a package, None if it is not installed."""
    try:
        return version(name), requires(name) or []
    except PackageNotFoundError:
        return None


def check_versions(_: DoctorContext) -> list[Finding]:
    """Check that the requirements of regraft and of its main packages are met."""
    from packaging.requirements import Requirement  # noqa: PLC0415 (no other verb needs it)

    findings, versions = [], [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        package = installed(name)
        if package is None:  # the packages that require it report that
            continue
        versions.append(f"{name} {package[0]}")
        for requirement in map(Requirement, package[1]):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            other = installed(requirement.name)
            if other is None or not requirement.specifier.contains(other[0], prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                found = f"{requirement.name} {other[0]} is installed" if other else "it is not installed"
                message = f"{name} {package[0]} needs {wanted}; {found}"
                remedy = f"pip install '{wanted}'; install torch and torchvision together from one index"
                findings.append(Finding("versions", "red", message, remedy))
    if installed("regraft") is None:
        remedy = "pip install -e . in its folder"
        findings.append(Finding("versions", "red", "regraft is not installed in this Python", remedy))
    return findings or [Finding("versions", "green", ", ".join(versions))]


def check_gpus(context: DoctorContext) -> list[Finding]:
    """Check that torch can use the GPUs, and that their memory is free."""
    build, visible = context.measured.get("torch", {}), os.environ.get("CUDA_VISIBLE_DEVICES")
    in_machine, gpus, cuda = machine.gpus({}), build.get("gpus", []), build.get("cuda")
    if not in_machine and not gpus:
        return [Finding("GPUs", "green", "this machine has none: training runs on its CPU")]
    if visible is not None and not visible.strip(" ,"):
        return [Finding("GPUs", "green", "CUDA_VISIBLE_DEVICES hides them: training runs on the CPU")]
    if "torch" not in build:  # the check of torch reports the error
        return []
    if cuda is None and build.get("hip") is None:
        message = f"torch {build['torch']} is built for CPUs only: the GPUs are not used"
        remedy = "install the CUDA build of torch and torchvision (pytorch.org, Get Started)"
        return [Finding("GPUs", "yellow", message, remedy)]
    if not gpus:
        message = f"torch for CUDA {cuda} cannot use any of {in_machine} GPUs"
        remedy = (
            "nvidia-smi shows whether the driver works, and the newest CUDA version that it supports: update it, or "
            "install torch for that version; start a container with its GPUs"
        )
        return [Finding("GPUs", "red", message, remedy)]
    names = ", ".join(sorted({str(gpu["name"]) for gpu in gpus}))
    return [
        Finding(
            "GPUs",
            "yellow",
            f"{gpu['name']}: {format_bytes(gpu['free'])} of {format_bytes(gpu['memory'])} are free",
            "nvidia-smi shows the processes on it; choose other GPUs with CUDA_VISIBLE_DEVICES",
        )
        for gpu in gpus
        if gpu["free"] < gpu["memory"] // 2
    ] or [Finding("GPUs", "green", f"{len(gpus)} x {names}, torch for CUDA {cuda}")]

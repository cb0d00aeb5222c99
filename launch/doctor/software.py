"""Versions that do not fit, and GPUs that torch cannot use."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from launch.doctor.finding import Finding, green, red, size, yellow

SHOWN = ("regraft", "torch", "torchvision", "accelerate", "safetensors", "numpy", "pillow")
_VITAL = frozenset({"regraft", "torch", "torchvision", "accelerate", "safetensors"})
"""Packages whose own needs, left open, end a run; others' may never be met in one."""


def installed(name: str) -> tuple[str, list[str]] | None:
    """Return (version, requirements) of a package that is installed here."""
    try:
        return version(name), requires(name) or []
    except PackageNotFoundError:
        return None


def versions(python: str, look: Callable[[str], tuple[str, list[str]] | None] = installed) -> list[Finding]:
    """Return whether all that regraft needs is there, and whether what is there fits together.

    Args:
        python: its version.
        look: package -> (version, requirements as in its metadata), None where it is not installed.

    """
    from packaging.requirements import Requirement  # noqa: PLC0415 (only doctor needs it)

    found: list[Finding] = []
    waiting: list[tuple[str, str]] = [("regraft", "")]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop(0)
        there = look(name)
        if (name, extra) in seen or there is None:
            continue
        seen.add((name, extra))
        for text in there[1]:
            need = Requirement(text)
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            waiting += [(need.name, one) for one in ("", *sorted(need.extras))]
            other = look(need.name)
            fits = other is not None and need.specifier.contains(other[0], prereleases=True)
            if not fits:
                here = f"{need.name} {other[0]} is installed" if other else "it is not installed"
                judge = red if name in _VITAL else yellow
                wanted = f"{need.name}{need.specifier}"
                found.append(
                    judge(
                        "versions",
                        f"{name} {there[0]} needs {wanted}; {here}",
                        f"pip install '{wanted}', or install torch and torchvision together from one index",
                    )
                )
    if look("regraft") is None:
        found.append(
            red("versions", "regraft is not installed in this Python", "pip install -e . in its folder")
        )
    shown = [f"{name} {there[0]}" for name in SHOWN if (there := look(name)) is not None]
    return found or [green("versions", f"Python {python}, {', '.join(shown)}")]


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What nvidia-smi says."""

    version: str
    cuda: tuple[int, int] | None
    """The newest CUDA that the driver runs."""
    gpus: tuple[tuple[str, int, int], ...]
    """(name, memory, of it free) [bytes] of each."""


def read_driver(listing: str, header: str) -> Driver | None:
    """Return the driver by nvidia-smi's output.

    Args:
        listing: of `--query-gpu=name,driver_version,memory.total,memory.free --format=csv,noheader,nounits`.
        header: of a plain call.

    """
    gpus: list[tuple[str, int, int]] = []
    driver = ""
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[2].isdigit() and fields[3].isdigit():
            driver = fields[1]
            gpus.append((fields[0], int(fields[2]) << 20, int(fields[3]) << 20))
    newest = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", header)
    if not gpus:
        return None
    cuda = (int(newest[1]), int(newest[2])) if newest else None
    return Driver(version=driver, cuda=cuda, gpus=tuple(gpus))


def gpus(
    driver: Driver | None, build: Mapping[str, Any], *, devices: int, visible: str | None
) -> list[Finding]:
    """Return whether torch can use the GPUs.

    Args:
        driver: what nvidia-smi says, None where it says nothing.
        build: the probe's `build`; empty where it could not be made.
        devices: /dev/nvidia0 and so on.
        visible: CUDA_VISIBLE_DEVICES.

    """
    usable = build.get("gpus", [])
    if not devices and driver is None and not usable:
        return [green("GPUs", "none on this machine: training runs on its processors")]
    if visible is not None and not visible.strip(" ,"):
        return [
            green("GPUs", f"{devices} there, hidden by CUDA_VISIBLE_DEVICES: training runs on processors")
        ]
    found: list[Finding] = []
    if driver is None:
        found.append(
            yellow(
                "GPUs", "nvidia-smi does not answer", "install the driver's tools, or ask the administrator"
            )
        )
    for name, memory, free in driver.gpus if driver else ():
        if free < memory // 2:
            found.append(
                yellow(
                    "GPUs",
                    f"{name}: {size(free)} of {size(memory)} are free",
                    "nvidia-smi shows who uses it; choose others by CUDA_VISIBLE_DEVICES",
                )
            )
    if not build:
        return found  # that torch cannot be asked is a finding of its own
    cuda = build.get("cuda")
    if cuda is None and build.get("hip") is None:
        found.append(
            yellow(
                "GPUs",
                f"torch {build.get('torch')} is built for processors alone: the GPUs stay unused",
                "install the CUDA build of torch and torchvision (pytorch.org, Get Started)",
            )
        )
    elif not usable:
        found.append(_unusable(driver, str(cuda)))
    for one in usable:
        major, minor = one["capability"]
        if not _covers(build.get("architectures", []), major, minor):
            found.append(
                red(
                    "GPUs",
                    f"{one['name']} is sm_{major}{minor}; torch {build.get('torch')} is built for "
                    f"{', '.join(build.get('architectures', []))}",
                    "install a build of torch that has this architecture: another CUDA version's, or an older torch",
                )
            )
    if not found:
        names = ", ".join(sorted({str(one["name"]) for one in usable}))
        of = f"; driver {driver.version}" if driver else ""
        found.append(green("GPUs", f"{len(usable)} x {names}, torch's CUDA {cuda}{of}"))
    return found


def _unusable(driver: Driver | None, cuda: str) -> Finding:
    newest = driver.cuda if driver else None
    major = cuda.split(".", maxsplit=1)[0]
    if newest is not None and major.isdigit() and newest[0] < int(major):
        return red(
            "GPUs",
            f"torch is built for CUDA {cuda}; driver {driver.version if driver else '?'} runs up to CUDA "
            f"{newest[0]}.{newest[1]}",
            f"a newer driver, or torch built for CUDA {newest[0]} (pip's --index-url .../whl/cu{newest[0]}...)",
        )
    return red(
        "GPUs",
        f"torch, built for CUDA {cuda}, finds no GPU that it can use",
        "nvidia-smi shows whether the driver runs; in a container, it has to be started with the GPUs",
    )


def _covers(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Return whether a build's kernels run on a GPU: binary for its major version, or PTX for it or an older one."""
    for one in architectures:
        kind, _, number = one.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        built = divmod(int(digits[0]), 10)
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return not architectures

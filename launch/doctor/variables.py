"""Variables of the environment that would have a say in a run without anybody's meaning it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from launch.doctor.finding import Finding, green, red, yellow


class _Rule(NamedTuple):
    names: str
    """A pattern for the whole name."""
    matters: Callable[[str], bool]
    """Whether a value does."""
    judge: Callable[[str, str, str], Finding]
    what: str
    remedy: str = ""
    """Empty: to unset it."""


def leaks(
    environment: Mapping[str, str], *, cores: int, devices: int, interfaces: Sequence[str]
) -> list[Finding]:
    """Return a finding for each variable that leaks.

    Args:
        environment: of this shell.
        cores: that a process may use.
        devices: GPUs of this machine.
        interfaces: names of its network interfaces.

    """
    found: list[Finding] = []
    rules = _rules(cores, devices, interfaces)
    for name in sorted(environment):
        value = environment[name]
        for rule in rules:
            if re.fullmatch(rule.names, name) and rule.matters(value):
                shown = ascii(value)[1:-1][:80]
                found.append(
                    rule.judge("variables", f"{name}={shown}: {rule.what}", rule.remedy or f"unset {name}")
                )
                break
    return found or [green("variables", "none that would leak into a run")]


def _rules(cores: int, devices: int, interfaces: Sequence[str]) -> tuple[_Rule, ...]:
    """Return the rules; the first that fits counts."""
    return (
        _Rule(
            "ACCELERATE_(GRADIENT_ACCUMULATION_STEPS|DYNAMO_BACKEND)",
            lambda value: value.lower() not in ("", "1", "no"),
            red,
            "set by accelerate's configuration; the trainer refuses it",
        ),
        _Rule(
            "PET_.*", _any, yellow, "sets an option of torchrun; `regraft train` drops it, torchrun does not"
        ),
        _Rule(
            "(TORCHELASTIC|ACCELERATE)_.*",
            _any,
            yellow,
            "left by another launcher; `regraft train` drops it, other starts do not",
        ),
        _Rule(
            "(LOCAL_|GROUP_|ROLE_)?RANK|(LOCAL_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)",
            _any,
            yellow,
            "makes a process part of a group that is not there; `regraft train` drops it, other starts do not",
        ),
        _Rule(
            "OMP_NUM_THREADS",
            lambda value: value == "1" and cores > 1,
            yellow,
            f"one thread where there are {cores} cores, for all but torch, whose threads the trainer sets",
        ),
        _Rule(
            "CUDA_VISIBLE_DEVICES",
            lambda value: devices > 0 and not value.strip(" ,"),
            yellow,
            f"hides all {devices} GPUs",
        ),
        _Rule(
            "NCCL_DEBUG",
            lambda value: value.upper() in ("INFO", "TRACE"),
            yellow,
            "fills the log of every process",
        ),
        _Rule("NCCL_(P2P|IB|SHM)_DISABLE", _is_on, yellow, "turns a fast way between GPUs off"),
        _Rule(
            "(NCCL|GLOO)_SOCKET_IFNAME",
            lambda value: not _names_one(value, interfaces),
            red,
            "there is no such network interface",
            f"name one of {', '.join(interfaces)}, or unset it",
        ),
        _Rule("CUDA_LAUNCH_BLOCKING", _is_on, yellow, "waits for every kernel: slow, for debugging alone"),
        _Rule(
            "TORCH_DISTRIBUTED_DEBUG",
            lambda value: value.upper() == "DETAIL",
            yellow,
            "checks every exchange: slow, for debugging alone",
        ),
        _Rule("PYTHON(PATH|HOME)", bool, yellow, "its modules come before the installed ones"),
        _Rule("MALLOC_.*", bool, yellow, "changes how every process takes memory; some of these are slow"),
        _Rule(
            "LD_PRELOAD", bool, yellow, "is loaded into every process", "unset LD_PRELOAD, unless it is meant"
        ),
    )


def _any(_: str) -> bool:
    return True


def _is_on(value: str) -> bool:
    return value not in ("", "0")


def _names_one(value: str, interfaces: Sequence[str]) -> bool:
    """Return whether an interface fits what NCCL takes: prefixes, `=` for whole names, `^` for all others."""
    if value.startswith("^") or not value:
        return True
    exactly = value.startswith("=")
    names = [name.partition(":")[0] for name in value.removeprefix("=").split(",")]
    return any(one == name or (not exactly and one.startswith(name)) for one in interfaces for name in names)

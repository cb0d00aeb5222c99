"""Record the environment of each start of a run in `RUN/environment/NNNN.json`, numbered by attempt.

The record holds command line, git commit, package versions, hardware, torch settings and environment variables.
Secrets are redacted. A failure to collect or to write the record never ends a run.
"""

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils import collect_env

from regraft.contract import available_cores
from trainer.distributed.context import DistributedContext
from trainer.run.atomic import remove_leftovers, write_text_atomically
from trainer.run.lock import RunLock
from trainer.run.versions import versions
from trainer.text import escape_unprintable

ENVIRONMENT = "environment"
COMMAND_TIMEOUT = 2.0
"""Seconds after which `git` or `lscpu` is killed."""
REDACTED = "***"

_VARIABLE = re.compile(
    r"(ACCELERATE|CUBLAS|CUDA|CUDNN|GLOO|KMP|MALLOC|MASTER|MKL|NCCL|NVIDIA|OMP|PET|REGRAFT|SLURM)_"
    r"|PYTHON|PYTORCH|TORCH|LD_PRELOAD|LD_LIBRARY_PATH|RANK|LOCAL_RANK|WORLD_SIZE"
)
_USER_NAME = re.compile(r"_(USER|UID|GID|GROUP)$")
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|JWT", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^\s/]*@")


def record_environment(
    folder: Path, attempt: RunLock | None, ctx: DistributedContext, options: Mapping[str, Any]
) -> str | None:
    """Write the record of this start; all ranks call it, and rank 0, which alone has an attempt, writes.

    Args:
        folder: the run folder.
        attempt: rank 0's lock of the run folder.
        ctx: the distributed context.
        options: the options of the command, before defaults that depend on the model are filled in.

    Returns:
        One line if something could not be collected or written, else None.

    """
    host = describe_host(ctx.accelerator.device)
    hosts = gather_object([host]) if ctx.world_size > 1 else [host]
    if attempt is None:
        return None
    path = folder / ENVIRONMENT / f"{attempt.record.attempt:04}.json"
    try:
        record = {
            "attempt": attempt.record.attempt,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "hosts": merge_by_host(hosts),
            "options": options,
        } | _collect(
            argv=lambda: redact_argv(sys.orig_argv),
            working_folder=lambda: str(Path.cwd()),
            executable=lambda: sys.executable,
            git=lambda: git_state(Path(__file__).resolve()),
            torch=torch_settings,
            variables=lambda: select_variables(os.environ),
            versions=versions,
            # Reversed, so that the first on `sys.path` wins, as in an import.
            packages=lambda: {one.name: one.version for one in reversed(list(distributions()))},
        )
        path.parent.mkdir(exist_ok=True)
        remove_leftovers(path.parent, "[0-9]*")
        attempt.check()
        write_text_atomically(path, json.dumps(record, indent=1) + "\n")
    except Exception as error:  # noqa: BLE001 (no record is worth the end of a run)
        return escape_unprintable(f"{path}: not written: {type(error).__name__}: {error}")
    errors = {name: error for part in (record, *hosts) for name, error in part["not_collected"].items()}
    reasons = "; ".join(f"{name} ({error})" for name, error in errors.items())
    return escape_unprintable(f"{path}: not collected: {reasons}") if errors else None


def _collect(**functions: Callable[[], Any]) -> dict[str, Any]:
    """Return name -> result; `not_collected` has name -> error message of the functions that raised."""
    results: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for name, function in functions.items():
        try:
            results[name] = function()
        except Exception as error:  # noqa: BLE001 (a record with a gap is better than none)
            errors[name] = f"{type(error).__name__}: {error}"
    return results | {"not_collected": errors}


def describe_host(device: torch.device) -> dict[str, Any]:
    """Return name, platform, CPU, cores, memory [bytes], GPUs and NVIDIA driver of this host."""
    gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
    driver = Path("/proc/driver/nvidia/version")  # not on WSL, nor with ROCm
    return _collect(
        host=socket.gethostname,
        platform=platform.platform,
        cpu=_cpu_model,
        cores=os.cpu_count,
        usable_cores=available_cores,
        memory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=lambda: [torch.cuda.get_device_name(index) for index in gpus],
        driver=lambda: driver.read_text() if gpus and driver.exists() else None,
    )


def _cpu_model() -> str:
    # The rest of `collect_env` is too slow for each start (0.7 s), and its `nvidia-smi` may hang.
    found = re.search(r"^Model name:\s*(.+)$", collect_env.get_cpu_info(_run), re.MULTILINE)
    return found[1] if found else platform.machine()


def merge_by_host(hosts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per host with its `ranks`; `hosts` has one record per rank, in rank order."""
    merged: dict[str, dict[str, Any]] = {}
    for rank, host in enumerate(hosts):
        merged.setdefault(str(host.get("host")), {**host, "ranks": []})["ranks"].append(rank)
    return list(merged.values())


def git_state(file: Path) -> dict[str, Any]:
    """Return commit and dirty flag of the repository that tracks `file`, or why they are unavailable."""
    git = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(file.parent))
    outputs = []
    # `ls-files` comes first: a package installed inside an unrelated repository is not tracked by it.
    for command in (
        ("ls-files", "--error-unmatch", "--", file.name),
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty"),
    ):
        code, output, error = _run([*git, *command])
        if code != 0:
            return {"unavailable": error.partition("\n")[0] or f"git {command[0]}: exit code {code}"}
        outputs.append(output)
    return {"commit": outputs[1], "dirty": bool(outputs[2])}


def _run(command: str | Sequence[str]) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) like `collect_env.run`, but with a timeout and without a shell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603
            shlex.split(command) if isinstance(command, str) else command,
            env=environment | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def torch_settings() -> dict[str, Any]:
    """Return torch's CUDA and cuDNN versions and the settings that change its results or its speed."""
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }


def select_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that may affect a run, secrets redacted, without names of users."""
    return {
        name: REDACTED if _SECRET_NAME.search(name) else _URL_CREDENTIALS.sub(f"{REDACTED}@", value)
        for name, value in sorted(variables.items())
        if _VARIABLE.match(name) and not _USER_NAME.search(name)
    }


def redact_argv(argv: Sequence[str]) -> list[str]:
    """Return a command line with its secrets redacted: `--token x`, `--token=x`, `TOKEN=x` and URLs."""
    redacted: list[str] = []
    for previous, argument in zip(["", *argv], argv, strict=False):
        name, equals, _ = argument.partition("=")
        is_value = previous.startswith("-") and "=" not in previous and not argument.startswith("--")
        if equals and _SECRET_NAME.search(name):
            redacted.append(f"{name}={REDACTED}")
        elif is_value and _SECRET_NAME.search(previous):
            redacted.append(REDACTED)
        else:
            redacted.append(_URL_CREDENTIALS.sub(f"{REDACTED}@", argument))
    return redacted

"""`environment/`: with what a start of a run was made, so that its result can be explained.

NNNN.json   of attempt NNNN: command, commit, packages, hardware, settings, variables; secrets masked
NNNN.diff   what was not committed of the code, where anything was

It is written by rank 0; nothing reads it but people, and the next start, which says what has changed. That it
cannot be written ends no run.
"""

import json
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from trainer import git
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.git import GitFailed, Repository
from trainer.hardware import hardware
from trainer.masking import masked_variables, masked_words
from trainer.run.atomic import remove_leftovers, write_atomically, write_text_atomically
from trainer.run.lock import RunLock
from trainer.run.versions import own_version
from trainer.text import escape_unprintable

ENVIRONMENT = "environment"
_PREFIXES = (
    "ACCELERATE_",
    "CUBLAS_",
    "CUDA_",
    "GLOO_",
    "KMP_",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "PET_",
    "PYTHON",
    "PYTORCH_",
    "REGRAFT_",
    "SLURM_",
    "TORCH",
)
_NAMES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
_OF_PERSONS = ("_USER", "_UID", "_GID", "_GROUP")
_LAUNCHERS = (
    "torchrun",
    "torch.distributed.run",
    "accelerate",
    "regraft",
    "launch.cli",
    "launch/cli.py",
    "srun",
)


def keep(folder: Path, attempt: RunLock | None, ctx: DistributedContext) -> str | None:
    """Write down what this start was made with; all processes call it, rank 0 with its attempt.

    Returns one line where something has changed since the attempt before, or it cannot be written.
    """
    here = _hardware(ctx)
    hosts = gather_object([here]) if ctx.world_size > 1 else [here]
    if attempt is None:
        return None
    try:
        return _write(folder, attempt, together(hosts))
    except UserError as error:  # taken over: the next thing that is written says so, on all processes
        return f"{folder / ENVIRONMENT}: not written: {error}"
    except Exception as error:  # noqa: BLE001 (whatever it is, it must not end a training)
        return f"{folder / ENVIRONMENT}: what this start was made with could not be written down: {_short(error)}"


def _write(folder: Path, attempt: RunLock, hosts: Sequence[Mapping[str, Any]]) -> str | None:
    number = attempt.record.attempt
    code, code_told = _repository(Path(__file__).with_name("main.py"))
    working, working_told = _repository(None)
    if code and working and code.root == working.root:
        working, working_told = None, {"same": "as that of the code"}
    facts = {
        "attempt": number,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": masked_words(sys.orig_argv),
        "launchers": [masked_words(words) for words in launchers(os.getppid())],
        "folder": str(Path.cwd()),
        "regraft": own_version(),
        "code": code_told,
        "working_folder": working_told,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": {
            "name": _system(),
            "kernel": platform.release(),
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "hosts": hosts,
        "torch": torch_settings(),
        "variables": masked_variables(chosen(os.environ)),
        "packages": packages(),
    }
    place = folder / ENVIRONMENT
    place.mkdir(exist_ok=True)
    remove_leftovers(place, "[0-9]*")
    attempt.check()
    diff = diffs([found for found in (code, working) if found is not None])
    if diff:
        write_atomically(place / f"{number:04}.diff", lambda temporary: temporary.write_bytes(diff))
    write_text_atomically(place / f"{number:04}.json", json.dumps(facts, indent=1) + "\n")
    changed = changes(_before(place, number), json.loads(json.dumps(facts)))
    return f"since the attempt before: {'; '.join(changed)}" if changed else None


def chosen(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have a say in a run; none that name a person."""
    return {
        name: escape_unprintable(value)
        for name, value in environment.items()
        if (name.startswith(_PREFIXES) or name in _NAMES) and not name.endswith(_OF_PERSONS)
    }


def packages() -> dict[str, str]:
    """Return name -> version of all that is installed; the first on the search path counts, as for an import."""
    found: dict[str, str] = {}
    for one in distributions():
        found.setdefault(str(one.metadata["Name"]), one.version)
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def torch_settings() -> dict[str, Any]:
    """Return torch's build and the settings that change what or how fast it computes."""
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def together(hosts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each host, with its ranks, of the processes' hardware in the order of their ranks."""
    found: dict[str, dict[str, Any]] = {}
    for rank, facts in enumerate(hosts):
        found.setdefault(str(facts.get("host")), dict(facts) | {"ranks": []})["ranks"].append(rank)
    return list(found.values())


def launchers(pid: int) -> list[list[str]]:
    """Return the command lines of a process and those above it, as far as they are launchers'; the nearest first."""
    found: list[list[str]] = []
    while pid > 1:
        try:
            words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).rstrip("\0").split("\0")
            parent = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if not any(Path(word).name in _LAUNCHERS or word.endswith(_LAUNCHERS) for word in words[:4]):
            break
        found.append(words)
        pid = parent
    return found


def diffs(repositories: Sequence[Repository]) -> bytes:
    """Return what is not committed of these, each under a line that names it; empty where all is."""
    parts: list[bytes] = []
    for one in repositories:
        if not one.diff:
            continue
        head = f"# {escape_unprintable(str(one.root))} at {one.commit}; what looked like a secret is masked\n"
        parts += [head.encode(), one.diff.rstrip(b"\n") + b"\n"]
        if one.cut:
            parts.append(f"# cut here: the first {len(one.diff):,} bytes are kept\n".encode())
    return b"".join(parts)


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return what is another between two attempts and no setting of the run: code and hardware.

    Versions of packages are compared where a run goes on (`resume.py`), with those of its checkpoint.
    """
    if before is None:
        return []
    found: list[str] = []
    then_code, code = before.get("code", {}), now.get("code", {})
    if then_code.get("commit") != code.get("commit"):
        then, commit = (str(of.get("commit") or "none")[:10] for of in (then_code, code))
        found.append(f"the code's commit was {escape_unprintable(then)}, is {escape_unprintable(commit)}")
    elif then_code.get("diff_sha256") != code.get("diff_sha256"):
        found.append("what is not committed of the code has changed")
    for key, what in (("cpu", "processor"), ("gpus", "GPUs"), ("driver", "NVIDIA driver")):
        then, this = (_said_of(facts, key) for facts in (before, now))
        if then != this:
            found.append(
                f"the {what}: {escape_unprintable(then or 'none')} then, {escape_unprintable(this or 'none')} now"
            )
    return found


def _said_of(facts: Mapping[str, Any], key: str) -> str:
    """Return the distinct values of `key` over the hosts; GPUs by their names."""
    values: list[str] = []
    for host in facts.get("hosts", []):
        value = host.get(key)
        if isinstance(value, list):
            values += [str(one.get("name")) for one in value]
        elif value is not None:
            values.append(str(value))
    return ", ".join(sorted(set(values)))


def _hardware(ctx: DistributedContext) -> dict[str, Any]:
    """Return this host's hardware, or why it cannot be told: the others wait for an answer."""
    try:
        return hardware(ctx.accelerator.device)
    except Exception as error:  # noqa: BLE001 (as above)
        return {"host": socket.gethostname(), "error": _short(error)}


def _repository(file: Path | None) -> tuple[Repository | None, dict[str, Any]]:
    """Return the repository that holds a file of the code (None: the working folder), and what is told of it."""
    folder = Path.cwd() if file is None else file.resolve().parent
    try:
        found = git.look(folder)
    except GitFailed as error:
        return None, {"git": str(error)}
    if file is not None and not git.is_tracked(file.resolve()):
        return None, {"git": "the code is installed; no repository tracks it"}
    return found, {
        "root": str(found.root),
        "commit": found.commit,
        "branch": found.branch,
        "remote": found.remote,
        "dirty": found.dirty,
        "changed": list(found.changed),
        "untracked": list(found.untracked),
        "diff_sha256": found.digest,
        "diff_cut": found.cut,
    }


def _before(place: Path, number: int) -> dict[str, Any] | None:
    """Return what the last attempt before this one has written, if it can be read."""
    for earlier in range(number - 1, 0, -1):
        path = place / f"{earlier:04}.json"
        if path.exists():
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return None
            return facts if _is_sound(facts) else None
    return None


def _is_sound(facts: object) -> bool:
    """Return whether a file holds what `changes` looks at: it may be damaged, or another version's."""
    if not isinstance(facts, dict) or not isinstance(facts.get("code"), dict):
        return False
    hosts = facts.get("hosts")
    return isinstance(hosts, list) and all(
        isinstance(host, dict) and all(isinstance(gpu, dict) for gpu in host.get("gpus") or ())
        for host in hosts
    )


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _short(error: Exception) -> str:
    return escape_unprintable(f"{type(error).__name__}: {error}")[:300]

"""What git says of a folder: commit, branch, what is not committed. It runs nothing that a repository names.

Hooks, pagers, file system monitors, external diffs and filters of a repository are programs that it chooses:
a checkout of somebody else's must not run them because a training was started in it.
"""

import hashlib
import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.masking import masked_text

SECONDS = 3.0
"""For all that is asked about one repository."""
MOST_BYTES = 1 << 20
"""Of a diff that are kept."""
_MOST_NAMES = 200
_MOST_SAID = 16 << 20
_SUBMODULES = "--ignore-submodules=dirty"
"""A submodule counts by its commit: to look into it, git would run with the submodule's own settings."""
_TRUSTED = ("-c", "core.fsmonitor=false", "-c", "core.pager=cat", "-c", "core.hooksPath=/dev/null")


class GitFailed(Exception):
    """There is no git, no repository, or it took too long; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A work tree as it stood."""

    root: Path
    commit: str
    """Empty before the first."""
    branch: str
    """Empty where none is checked out."""
    remote: str
    """URL of `origin`, without its credentials; empty where there is none."""
    changed: tuple[str, ...]
    """Names of files that differ from the commit."""
    untracked: tuple[str, ...]
    """Names of files and folders that git does not know; what is in them is not kept."""
    diff: bytes
    """Of what differs, its secrets masked."""
    cut: bool
    """The diff was longer than is kept."""

    @property
    def dirty(self) -> bool:
        """Return whether tracked files differ from the commit."""
        return bool(self.changed)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the diff as it is kept: with another one, other code has run."""
        return hashlib.sha256(self.diff).hexdigest()


def look(folder: Path, *, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> Repository:
    """Return the repository that a folder lies in.

    Raises:
        GitFailed: there is none, or git cannot tell in time.

    """
    ask = _Git(folder, until=time.monotonic() + seconds)
    root = Path(os.fsdecode(ask("rev-parse", "--show-toplevel").removesuffix(b"\n")))
    status = ask("status", "--porcelain=v2", "--branch", "-z", "--untracked-files=normal", _SUBMODULES)
    commit, branch, changed, untracked = _read_status(os.fsdecode(status))
    diff, cut = b"", False
    if changed and commit:
        raw = ask(
            "diff",
            "--no-ext-diff",
            "--no-textconv",
            "--no-color",
            "--submodule=short",
            _SUBMODULES,
            "HEAD",
            most=most_bytes + 1,
        )
        cut = len(raw) > most_bytes
        # Masked before it is cut: a private key has its end as well as its beginning.
        diff = masked_text(raw.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")[
            :most_bytes
        ]
    try:
        remote = os.fsdecode(ask("config", "--get", "remote.origin.url")).strip()
    except GitFailed:  # it has none
        remote = ""
    return Repository(
        root=root,
        commit=commit,
        branch=branch,
        remote=masked_text(remote),
        changed=_some(changed),
        untracked=_some(untracked),
        diff=diff,
        cut=cut,
    )


def is_tracked(file: Path, *, seconds: float = SECONDS) -> bool:
    """Return whether a repository has this very file: one installed below a work tree is not the repository's."""
    try:
        found = _Git(file.parent, until=time.monotonic() + seconds)("ls-files", "--", file.name)
    except GitFailed:
        return False
    return bool(found.strip())


def _some(names: list[str]) -> tuple[str, ...]:
    """Return names, and of many the first ones and how many more there are."""
    more = len(names) - _MOST_NAMES
    return (*names[:_MOST_NAMES], f"... and {more} more") if more > 0 else tuple(names)


def _read_status(text: str) -> tuple[str, str, list[str], list[str]]:
    """Return (commit, branch, changed, untracked) of `git status --porcelain=v2 --branch -z`; see git-status(1)."""
    commit, branch = "", ""
    changed: list[str] = []
    untracked: list[str] = []
    entries = iter(text.split("\0"))
    for entry in entries:
        kind, _, rest = entry.partition(" ")
        if entry.startswith("# branch.oid "):
            commit = entry.removeprefix("# branch.oid ").replace("(initial)", "")
        elif entry.startswith("# branch.head "):
            branch = entry.removeprefix("# branch.head ").replace("(detached)", "")
        elif kind == "1":
            changed.append(rest.split(" ", 7)[7])
        elif kind == "2":
            changed.append(rest.split(" ", 8)[8])
            next(entries, None)  # the name that it had before
        elif kind == "u":
            changed.append(rest.split(" ", 9)[9])
        elif kind == "?":
            untracked.append(rest)
    return commit, branch, changed, untracked


class _Git:
    """Asks git about one folder, until a moment."""

    def __init__(self, folder: Path, *, until: float) -> None:
        self._folder, self._until = folder, until
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        self._environment = inherited | {
            "LC_ALL": "C",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_LAZY_FETCH": "1",  # a partial clone would go to the network for what it lacks
        }
        self._environment |= self._without_filters()

    def __call__(self, *words: str, most: int | None = None) -> bytes:
        """Return what git says, or the first `most` bytes of it.

        Raises:
            GitFailed: it ended with an error, or not in time, or says more than anybody would read.

        """
        with tempfile.TemporaryFile() as complaints:  # not a pipe, which it could fill and wait
            try:
                process = subprocess.Popen(  # noqa: S603 (git by its own words, through no shell)
                    ["git", *_TRUSTED, "--no-optional-locks", "--no-pager", *words],  # noqa: S607
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                )
            except OSError as error:
                raise GitFailed(f"git cannot be started ({error.strerror})") from None
            late = threading.Timer(max(0.0, self._until - time.monotonic()), process.kill)
            late.start()
            try:
                assert process.stdout is not None  # for mypy: asked for above
                said = process.stdout.read(most or _MOST_SAID)
                if len(said) == most:
                    return said
                if len(said) == _MOST_SAID:
                    raise GitFailed(f"git {words[0]} says more than {_MOST_SAID:,} bytes")
                code = process.wait()
            finally:
                late.cancel()
                process.kill()
                process.communicate()
            if code == 0:
                return said
            if time.monotonic() >= self._until:
                raise GitFailed(f"git {words[0]} took too long")
            complaints.seek(0)
            complaint = complaints.read(2000).decode("utf-8", "replace").strip()
        raise GitFailed(
            masked_text(complaint.splitlines()[0]) if complaint else f"git {words[0]}: code {code}"
        )

    def _without_filters(self) -> dict[str, str]:
        """Return variables that turn off whatever filters the settings name; see git-config(1), GIT_CONFIG_COUNT."""
        try:
            named = self("config", "--name-only", "-z", "--get-regexp", r"^filter\.")
        except GitFailed:  # none; what else is wrong, the next question meets
            return {}
        names = {
            name.removeprefix("filter.").rpartition(".")[0] for name in os.fsdecode(named).split("\0") if name
        }
        off = (("clean", ""), ("smudge", ""), ("process", ""), ("required", "false"))
        settings = [(f"filter.{name}.{key}", value) for name in sorted(names) for key, value in off]
        variables = {"GIT_CONFIG_COUNT": str(len(settings))}
        for number, (key, value) in enumerate(settings):
            variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        return variables

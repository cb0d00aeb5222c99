"""Fixtures of the whole suite."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REGRAFT_SHARED", REPOSITORY.parent / "shared")).resolve()
WATCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_", "OMP_NUM_THREADS")


def pytest_configure() -> None:
    """Restore the signal handlers' defaults, and give each worker of pytest-xdist one thread.

    A background job ignores Ctrl-C, nohup ignores SIGHUP, and child processes inherit that. Threads that spin for each
    other's cores are slow; those of the started processes wait passively instead, which changes no result.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need the shared data if it is missing; `.ci/run` fails if a test was skipped."""
    if (SHARED / "data").is_dir():
        return
    reason = f"no shared data and weights at {SHARED}: set REGRAFT_SHARED to their folder"
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real images and weights; tests that use it are marked `pytest.mark.shared`."""
    return SHARED


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="module", autouse=True)
def _restore_threads() -> Iterator[None]:
    """Restore PyTorch's number of threads, which every run in this process sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's cache."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves environment variables of the launcher or of torch behind."""

    def watched() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(WATCHED)}

    before = watched()
    yield
    if (after := watched()) != before:
        pytest.fail(f"the test leaked environment variables: {sorted(after.items() ^ before.items())}")

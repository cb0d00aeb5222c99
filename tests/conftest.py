"""Fixtures shared by the whole suite."""

import os
import signal
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("REGRAFT_SHARED", REPOSITORY.parent / "shared")).resolve()


def pytest_configure() -> None:
    """Make the tests the same however they were started, and leave each of several workers (`pytest -n 2`) a core.

    In the background of a script Ctrl-C is ignored, under nohup a hang-up, and every process inherits that.
    Threads that wait for each other's cores are slow: one here, and those of the processes that the tests start wait
    asleep, which changes no result.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with a sentence, what needs the shared data where there is none (`.ci/run` fails if any was)."""
    if (SHARED / "data").is_dir():
        return
    skip = pytest.mark.skip(
        reason=f"no shared data and weights at {SHARED}: set REGRAFT_SHARED to their folder"
    )
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real images and weights; mark tests that use it with `pytest.mark.shared`."""
    return SHARED


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's cache and home."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_leaks() -> object:
    """Fail a test that leaves environment variables of the launcher or of torch behind."""
    watched = (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_",
        "OMP_NUM_THREADS",
    )

    def seen() -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if k.startswith(watched)}

    before = seen()
    yield
    after = seen()
    if after != before:
        pytest.fail(f"the test leaked environment variables: {sorted(after.items() ^ before.items())}")

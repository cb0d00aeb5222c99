"""One Slurm for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def running() -> Iterator[Cluster]:
    if lacking := module.missing():
        pytest.skip(
            f"no Slurm here ({', '.join(lacking)} not found): apt-get install {module.PACKAGES}, as .ci/run does"
        )
    with module.cluster(cpus=8) as found:
        yield found


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """Return a Slurm of two nodes without a job; what a test leaves on it ends with the test."""
    yield running
    running.clear()

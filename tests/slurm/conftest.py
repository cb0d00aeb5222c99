"""One Slurm cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if missing := slurm.missing():
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    with slurm.cluster(cpus=8) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """Return a cluster of two nodes without jobs."""
    yield running_cluster
    running_cluster.clear()

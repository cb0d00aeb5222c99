"""The process group that a launcher describes in the environment."""

from dataclasses import dataclass

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of a launcher."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """A process group of two processes or more."""

    rank: int
    world_size: int
    address: str
    """MASTER_ADDR: the host of rank 0."""
    port: int
    """MASTER_PORT: where rank 0 or its launcher listens."""
    description: str
    """The variables that describe the group, as `NAME=value`."""

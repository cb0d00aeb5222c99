"""The nodes' programs in a container: what stands around their command. Pure functions."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.errors import LaunchError
from launch.slurm.settings import Settings

PYTHON = "python3"
"""In the image, which has its own; it holds regraft, or the job was submitted from a checkout of it."""


def srun_words(settings: Settings, mounts: Sequence[Path], here: Path) -> list[str]:
    """Return what pyxis adds to `srun`."""
    if settings.container is None or settings.container_runtime != "pyxis":
        return []
    seen = ",".join(f"{path}:{path}" for path in mounts)
    return [
        f"--container-image={settings.container}",
        f"--container-mounts={seen}",
        f"--container-workdir={here}",
    ]


def prefix(settings: Settings, mounts: Sequence[Path], here: Path, *, gpus: bool) -> list[str]:
    """Return what Apptainer puts before the nodes' command."""
    if settings.container is None or settings.container_runtime != "apptainer":
        return []
    binds = [f"--bind={path}:{path}" for path in mounts]
    return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, f"--pwd={here}", settings.container]


def mounts_of(settings: Settings, folders: Iterable[Path | None]) -> list[Path]:
    """Return the folders that are to be seen in the container: those that are there, each once.

    Raises:
        LaunchError: one whose name holds what separates mounts.

    """
    if settings.container is None:
        return []
    wanted = dict.fromkeys(path for path in folders if path is not None and path.exists())
    for path in wanted:
        if set(str(path)) & set(",:"):
            raise LaunchError(
                f"{path}: a folder with a comma or a colon in its name cannot be mounted in a container: rename it"
            )
    return [*wanted, *(Path(mount) for mount in settings.mounts)]

"""Arguments that run the nodes' command in a container; pure functions."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.errors import LaunchError
from launch.slurm.settings import JobSettings

PYTHON = "python3"
"""Python of the image, which contains regraft unless the job was submitted from a checkout."""


def pyxis_options(settings: JobSettings, mounts: Sequence[Path], workdir: Path) -> list[str]:
    """Return the options that pyxis adds to `srun`; none without pyxis."""
    if settings.container is None or settings.container_runtime != "pyxis":
        return []
    return [
        f"--container-image={settings.container}",
        f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
        f"--container-workdir={workdir}",
    ]


def apptainer_argv(settings: JobSettings, mounts: Sequence[Path], workdir: Path, *, gpus: bool) -> list[str]:
    """Return the Apptainer command to put before the nodes' command; empty without Apptainer."""
    if settings.container is None or settings.container_runtime != "apptainer":
        return []
    binds = [f"--bind={path}:{path}" for path in mounts]
    return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, f"--pwd={workdir}", settings.container]


def mounted_folders(settings: JobSettings, folders: Iterable[Path | None]) -> list[Path]:
    """Return the folders to mount in the container: those of the given ones that exist, and `--mount`.

    Raises:
        LaunchError: a folder's name has a comma or a colon, which separate mounts.

    """
    if settings.container is None:
        return []
    existing = dict.fromkeys(path for path in folders if path is not None and path.exists())
    for path in existing:
        if set(str(path)) & set(",:"):
            raise LaunchError(
                f"{path}: a folder with a comma or a colon in its name cannot be mounted in a container: rename it"
            )
    return [*existing, *(Path(mount) for mount in settings.mounts)]

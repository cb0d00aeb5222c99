"""Files that come with regraft: `configs/` with recipes and strategies, and `slurm/` with batch scripts."""

import stat
from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("regraft")))
IS_CHECKOUT = not (_PACKAGE / "configs").is_dir()
"""Whether regraft runs from its repository, which has these folders beside the packages: a wheel has them within."""
FILES = _PACKAGE.parent if IS_CHECKOUT else _PACKAGE
CONFIGS = FILES / "configs"
MAX_CONFIG_BYTES = 1_000_000


def find_config(file: str) -> Path:
    """Return the path of a config file: a recipe such as `configs/hotdog.yaml` if there is no such file here."""
    path, recipe = Path(file), FILES / file
    return recipe if not path.exists() and CONFIGS in recipe.parents and recipe.is_file() else path


def read_config_text(path: Path) -> str:
    """Return the text of a config file.

    Raises:
        OSError: there is no such file, or it is not readable.
        ValueError: it is not a regular file, too large, or not UTF-8; a pipe or a device might never end.

    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ValueError(f"it is {kind}: expected a YAML file")
    with path.open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"it is larger than {MAX_CONFIG_BYTES / 1e6:g} MB: expected a YAML file of options")
    return content.decode("utf-8")

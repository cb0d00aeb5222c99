"""Files that come with regraft: `configs/` with recipes and strategies, and `slurm/` with batch scripts."""

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("regraft")))
IS_CHECKOUT = not (_PACKAGE / "configs").is_dir()
"""Whether regraft runs from its repository, which has these folders beside the packages: a wheel has them within."""
FILES = _PACKAGE.parent if IS_CHECKOUT else _PACKAGE
CONFIGS = FILES / "configs"


def find_config(file: str) -> Path:
    """Return the path of a config file: a recipe such as `configs/hotdog.yaml` if there is no such file here."""
    path, recipe = Path(file), FILES / file
    return recipe if not path.exists() and CONFIGS in recipe.parents and recipe.is_file() else path

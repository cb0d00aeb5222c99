"""Copy `configs/` and `slurm/` into the package `regraft` of a wheel; pyproject.toml has all other settings."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFiles(build_py):
    """Build the packages, and copy the files that regraft/files.py finds."""

    def run(self) -> None:
        """Build the packages."""
        super().run()
        if not self.editable_mode:  # an editable installation reads the folders of the checkout
            for folder in ("configs", "slurm"):
                shutil.copytree(folder, Path(self.build_lib, "regraft", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFiles})

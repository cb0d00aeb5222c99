"""A wheel in an empty folder runs what the checkout runs, and no module in the working folder breaks a command."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from regraft import search_path
from tests.launching import REPOSITORY, once, run

SHADOWING = ("launch", "trainer", "yaml", "rich", "torch", "signal", "json")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with regraft as pip installs its wheel, beside the packages of this environment."""

    def install(folder: Path) -> None:
        source = folder / "source"
        for name in ("trainer", "launch", "regraft", "configs", "slurm"):
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, source)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        run([*pip, "--target", folder / "site", source], cwd=folder)

    return once(tmp_path_factory, "wheel", install) / "site"


def regraft(installed: Path, *arguments: object, cwd: Path, code: int = 0) -> str:
    command = [sys.executable, installed / "bin" / "regraft", *arguments]
    return run(command, cwd=cwd, code=code, environment={"PYTHONPATH": str(installed)})


def test_wheel_has_the_files_of_the_checkout(installed: Path) -> None:
    def files(*roots: Path) -> list[str]:
        paths = [path for root in roots for path in root.rglob("*") if path.suffix in (".py", ".yaml", ".sh", ".typed")]
        return sorted(path.relative_to(roots[0].parent).as_posix() for path in paths)

    for package in ("trainer", "launch"):
        assert files(installed / package) == files(REPOSITORY / package)
    for folder in ("configs", "slurm"):
        assert files(installed / "regraft" / folder) == files(REPOSITORY / folder)


@pytest.mark.slow
def test_wheel_runs_in_a_folder_whose_modules_have_the_names_of_others(installed: Path, tmp_path: Path) -> None:
    for name in SHADOWING:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    config = ["--config", "configs/quickstart.yaml", "--run.dir=runs/quickstart"]  # the recipe of the wheel
    small = ["--data.image_size=32", "--train.epochs=1", "--pretrain.root=null", "--baseline.lr=null"]
    model = ["--transfer.strategy=from-scratch", "--run.threads=1", "--run.device=cpu", "--data.num_workers=0"]
    assert "test accuracy" in regraft(installed, "train", *config, *small, *model, cwd=tmp_path)
    assert "done" in regraft(installed, "status", "runs/quickstart", cwd=tmp_path)
    script = regraft(installed, "render", cwd=tmp_path)
    assert script == (installed / "regraft" / "slurm" / "finetune.sh").read_text()
    # What the script starts finds its modules too; here it fails because it is no Slurm job.
    (tmp_path / "job.sh").write_text(script)
    environment = {"PYTHONPATH": str(installed), "VIRTUAL_ENV": sys.prefix}
    assert "SLURM_JOB_ID" in run(["bash", "job.sh"], cwd=tmp_path, code=2, environment=environment)


@pytest.mark.parametrize("program", ["-m trainer.main", "-m launch.cli", "-m regraft", "-P -m regraft"])
def test_python_m_ignores_modules_of_the_working_folder(program: str, installed: Path, tmp_path: Path) -> None:
    for name in SHADOWING[2:]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    command = [sys.executable, *program.split(), "--help"]
    assert "usage: " in run(command, cwd=tmp_path, environment={"PYTHONPATH": str(installed)})


@pytest.mark.parametrize("package", search_path.PACKAGES)
def test_package_of_another_distribution_is_named(package: str, installed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / package
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    metadata = tmp_path / "other" / "their-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their\nVersion: 1.0\n")
    (metadata / "RECORD").write_text(f"{package}/__init__.py,,\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), str(installed)])}
    output = run([sys.executable, "-m", "regraft", "status"], cwd=tmp_path, code=2, environment=environment)
    assert f"error: the module '{package}' is {other}/__init__.py, which belongs to the distribution their" in output

from dataclasses import replace
from pathlib import Path

import pytest

from launch.trainer_options import choose_run_folder
from trainer.config.default_folder import default_run_folder
from trainer.config.parse import dump, parse
from trainer.config.resolve import resolve
from trainer.config.schema import Config
from trainer.run.folder import write_config

ARGV = ("--data.root=data", "--model.weights=null")


def chosen(*options: str) -> str:
    config = parse([*ARGV, *options])
    folder, message = default_run_folder(config, resolve(config))
    assert (message is None) == ("default-" not in folder)
    return str(Path(folder).relative_to(Path.cwd()))


def start_run(config: Config) -> None:
    """Leave what a run with results leaves."""
    resolved = resolve(config)
    folder = Path(default_run_folder(config, resolved)[0])
    run, train = replace(resolved.run, dir=str(folder)), replace(resolved.train, precision="fp32")
    write_config(folder, dump(replace(resolved, run=run, train=train)))
    (folder / "model.safetensors").touch()


def test_launcher_and_trainer_choose_the_same_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chosen() == "runs/default"
    assert choose_run_folder(ARGV) == tmp_path / "runs/default"
    start_run(parse(ARGV))
    start_run(parse([*ARGV, "--optim.lr=0.5"]))
    assert chosen() == "runs/default"
    assert chosen("--optim.lr=0.5", "--run.threads=1") == "runs/default-2"
    assert chosen("--optim.lr=0.6") == "runs/default-3"
    assert chosen("--optim.lr=0.6", "--debug") == "runs/default"
    assert chosen("--optim.lr=0.6", "--run.dir=mine") == "mine"

    capfd.readouterr()
    assert choose_run_folder([*ARGV, "--optim.lr=0.6"]) == tmp_path / "runs/default-3"
    assert "runs/default holds a run with other options (optim.lr: 0.001 there, 0.6 now)" in capfd.readouterr().err
    assert choose_run_folder([*ARGV, "--optim.lrr=1"]) is None
    assert capfd.readouterr().err.startswith("error: command line: there is no option 'optim.lrr'")
    assert choose_run_folder([*ARGV, "--optim.lrr=1", "--run.dir=mine"]) == tmp_path / "mine"

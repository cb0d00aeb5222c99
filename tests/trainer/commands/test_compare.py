import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from regraft.contract import read_attempts
from tests import runs
from tests.folders import image_folder
from tests.launching import rows
from trainer.commands import compare as module
from trainer.commands.compare import compare
from trainer.commands.variants import plan, variants
from trainer.config.config_files import known_strategies
from trainer.data.dataset import ImageReadError
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.report.logger import RunLogger
from trainer.report.summary import TrainResult
from trainer.transfer import wise_ft

Options = Callable[..., list[str]]


def test_variants_are_strategies_with_options() -> None:
    first, second, third = variants("d2l@optim.lr=5e-6@optim.momentum=0.5, lp-ft,my/own.yaml@optim.warmup=1 steps")
    assert (first.strategy, first.options) == ("d2l", ("--optim.lr=5e-6", "--optim.momentum=0.5"))
    assert (second.text, second.strategy, second.options) == ("lp-ft", "lp-ft", ())
    assert first.folder == "d2l@optim.lr=5e-6@optim.momentum=0.5"
    assert third.folder == "my_own.yaml@optim.warmup=1_steps"
    (bracketed,) = variants("d2l@data.mean=[0, 0.1, 0.2]@optim.lr_mult={'a@b': 1, c: 2}")
    assert bracketed.options == ("--data.mean=[0, 0.1, 0.2]", "--optim.lr_mult={'a@b': 1, c: 2}")
    assert "/" not in variants("../../../etc@optim.lr=1")[0].folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d2l,,lp-ft", "contains ''"),
        ("d2l@lr", "NAME@key=value"),
        ("@optim.lr=1", "NAME@key=value"),
        ("d2l@optim.lr=1@optim.momentum=0@optim.lr=2", "optim.lr is given 2 times; expected it once"),
        ("note", "transfer.strategy note was renamed to transfer.strategy d2l"),
        ("d2l@optim.lr=1 ,d2l@optim.lr=1", "share a folder"),
        ("pretrained-model", "pretrained-model would share a folder"),
        ("d2l@run.seed=1", "run.seed is the same for all"),
        ("d2l@data.val_fraction=0.5", "data.val_fraction is the same for all"),
        ("d2l@transfer.strategy=lp-ft", "transfer.strategy is the same for all"),
    ],
)
def test_invalid_variants_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        variants(text)
    assert message in str(error.value)


def test_strategy_wins_over_common_options_and_a_variants_options_win_over_it(options: Options, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    words = options(model__weights=weights, optim__weight_decay=0.25, optim__max_grad_norm=3, baseline__lr="null")
    plain, configs, messages = plan(words, variants("d2l@optim.lr=7,from-scratch@optim.weight_decay=0.5"))
    d2l, scratch = configs.values()
    assert (d2l.optim.lr, d2l.optim.weight_decay, d2l.optim.loss_reduction) == (7, 1e-3, "sum")
    assert (scratch.optim.lr, scratch.optim.weight_decay, scratch.optim.loss_reduction) == (1e-3, 0.5, "mean")
    assert (d2l.optim.max_grad_norm, scratch.optim.max_grad_norm) == (3, 3), "set by neither strategy"
    assert (d2l.model.weights, scratch.model.weights) == (str(weights), None)
    assert d2l.train == scratch.train == plain.train
    assert messages == [
        "strategy d2l@optim.lr=7: optim.weight_decay is 0.001, not 0.25 as on the command line",
        f"strategy from-scratch@optim.weight_decay=0.5: model.weights is None, not {weights} as on the command line",
    ]
    quickstart, configs, _ = plan([], variants("lp-ft,from-scratch"))
    assert quickstart.data.root == "synthetic-target"
    assert [config.pretrain.root for config in configs.values()] == ["synthetic-source", None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategies=fast"], "strategy fast: transfer.strategy 'fast': there is no such strategy"),
        (["--strategies=d2l,d2l@optim.lrr=1"], "strategy d2l@optim.lrr=1: command line: there is no option"),
        (["--strategies=d2l", "--transfer.strategy=d2l"], "from --strategies; leave it out"),
        (["--strategies=d2l", "--strategies", "lp-ft"], "--strategies is given more than once"),
        (["--strategies=d2l", "--debug"], "--debug cannot be compared"),
        (["--strategies=d2l", "--seeds=0"], "--seeds 0: expected 1 to 100"),
        (["--strategies=d2l", "--data.root=nowhere/at-all"], "nowhere/at-all"),
        (["--strategies=lp-ft"], "strategy lp-ft: model.head_init is linear-probe"),
        (["--strategies=d2l,d2l@transfer.trainable=from:nowhere"],
         "strategy d2l@transfer.trainable=from:nowhere: transfer.trainable"),
        (["--strategies=d2l,d2l@optim.warmup=9 epochs"],
         "strategy d2l@optim.warmup=9 epochs: optim.warmup is '9 epochs', 18 steps, but the run has 2"),
        (["--strategies=d2l,OWN"], "own.yaml have different data"),
    ],
)  # fmt: skip
def test_errors_are_reported_before_any_run(words: list[str], message: str, options: Options, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("data: {val_fraction: 0.5}")
    with pytest.raises(UserError) as error:
        compare([*options(), *(word.replace("OWN", str(own)) for word in words)], StopSignals())
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


# Runs that are replaced by a stub


class StubRun:
    """Replaces `run`: writes a metrics file instead of training, or raises the error of a strategy."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.errors: dict[str, BaseException] = {}

    def __call__(self, config: Any, signals: StopSignals) -> TrainResult:
        folder = Path(config.run.dir)
        self.configs.append(config)
        if folder.parent.name in self.errors:
            raise self.errors[folder.parent.name]
        metrics = {"test_accuracy": 0.5, "test_loss": 1.0, "seconds": 2.0, "train_seen": 8}
        row = {"kind": "epoch", "epoch": 1, **metrics}
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return TrainResult(folder=folder, rows=(row,), examples=(8, 4), val_split=None, seconds=3.0)


@pytest.fixture
def stub_run(monkeypatch: pytest.MonkeyPatch) -> StubRun:
    stub = StubRun()
    monkeypatch.setattr(module, "run", stub)
    return stub


def test_seeds_count_from_run_seed_and_the_split_is_the_same(
    options: Options, tmp_path: Path, stub_run: StubRun
) -> None:
    words = options(run__seed=5, data__seed=3, baseline__lr="null")
    summaries = compare([*words, "--strategies=d2l,from-scratch", "--seeds=2"], StopSignals())
    folders = [str(Path(config.run.dir).relative_to(tmp_path / "run")) for config in stub_run.configs]
    assert folders == [f"{strategy}/seed-{seed}" for seed in (5, 6) for strategy in ("d2l", "from-scratch")]
    assert [config.run.seed for config in stub_run.configs] == [5, 5, 6, 6]
    assert {(c.data.seed, c.train.epochs, c.train.batch_size) for c in stub_run.configs} == {(3, 1, 4)}
    assert summaries is not None
    assert [trial.seed for trial in summaries[0].trials] == [5, 6]


def test_failed_run_is_a_row_and_the_other_runs_continue(options: Options, tmp_path: Path, stub_run: StubRun) -> None:
    stub_run.errors["d2l"] = UserError("the loss is not finite: diverged")
    words = [*options(), "--seeds=1"]
    summaries = compare([*words, "--strategies=d2l,from-scratch"], StopSignals())
    assert summaries is not None
    d2l, scratch = summaries
    assert (d2l.accuracy, d2l.failures) == (None, {0: "the loss is not finite: diverged"})
    assert scratch.accuracy == 0.5
    assert "d2l, seed 0 failed: the loss is not finite" in (tmp_path / "run" / "compare.md").read_text()
    with pytest.raises(UserError, match="all 1 runs have failed; the first: the loss is not finite"):
        compare([*words, "--strategies=d2l"], StopSignals())
    # An error that only one process knows, or a stop, ends the comparison.
    for error in (ImageReadError("a.png: gone"), Stopped("SIGTERM")):
        stub_run.errors["d2l"] = error
        stub_run.configs.clear()
        with pytest.raises(type(error)):
            compare([*options("stopped"), "--strategies=d2l,from-scratch"], StopSignals())
        assert len(stub_run.configs) == 1


# Runs that train


@pytest.mark.slow
def test_pretraining_runs_once_for_all_strategies(
    options: Options, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Mock(side_effect=module.run)
    monkeypatch.setattr(module, "run", run)
    words = options(pretrain__root=images, pretrain__epochs=2, pretrain__lr=1e-3, baseline__lr=0.1)
    compare([*words, "--seeds=1", "--strategies=d2l,from-scratch"], StopSignals())
    configs = [call.args[0] for call in run.call_args_list]
    folder = tmp_path / "run"
    assert [
        (config.run.dir, config.model.weights, config.train.epochs, config.optim.loss_reduction) for config in configs
    ] == [
        (str(folder / "pretrained-model"), None, 2, "mean"),
        (str(folder / "d2l" / "seed-0"), str(folder / "pretrained-model" / "model.safetensors"), 1, "sum"),
        (str(folder / "from-scratch" / "seed-0"), None, 1, "mean"),
    ], "no strategy influences the pretraining"
    assert [config.pretrain.root for config in configs] == [None] * 3
    assert not (folder / "d2l" / "seed-0" / "baseline").exists()


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Return the metrics of a run without times, and the weights of its model file."""
    weights = load_file(folder / "model.safetensors")
    return runs.metrics_rows(folder), {name: tensor.tolist() for name, tensor in weights.items()}


@pytest.mark.slow
def test_stopped_comparison_resumes_to_identical_results(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rate of the one-cycle schedule depends on the step, in a resumed run too.
    cycle, other = "d2l@optim.lr=1e-4@optim.schedule=one-cycle", "from-scratch@optim.lr=1e-4"
    reference = options("reference", train__batch_size=2, run__seed=1)
    compare([*reference, "--seeds=1", f"--strategies={cycle}"], StopSignals())

    signals, steps = StopSignals(), 0
    log_progress = RunLogger.log_progress

    def stop_in_third_run(self: RunLogger, epoch: int, epoch_step: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 3 + 3 + 2:
            signals.received = signal.SIGTERM
        log_progress(self, epoch, epoch_step)

    monkeypatch.setattr(RunLogger, "log_progress", stop_in_third_run)
    words = [*options(train__batch_size=2), "--seeds=2", f"--strategies={cycle},{other}"]
    folder = tmp_path / "run"
    with pytest.raises(Stopped) as stopped:
        compare(words, signals)
    assert stopped.value.saved == "step 2 of 3, in epoch 1 of 1"
    assert not (folder / "compare.json").exists()
    resumed = compare(words, StopSignals())
    assert steps == 4 * 3, "no step is repeated"
    assert outcome(tmp_path / "reference" / cycle / "seed-1") == outcome(folder / cycle / "seed-1")
    assert resumed is not None
    written = json.loads((folder / "compare.json").read_text())["strategies"]
    assert [strategy["strategy"] for strategy in written] == [cycle, other]
    assert written[0]["accuracy"] == resumed[0].accuracy

    # Everything is finished: the same command changes no run, and gives the same table.
    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert compare(words, StopSignals()) == resumed
    assert {path: path.stat().st_mtime_ns for path in modified} == modified
    assert read_attempts(folder / other / "seed-1")[-1].state == "done"
    with pytest.raises(UserError, match=r"optim\.max_grad_norm: None there, 0\.5 now"):
        compare([*words, "--optim.max_grad_norm=0.5"], StopSignals())
    assert steps == 4 * 3


@pytest.mark.slow
def test_every_strategy_trains_and_wise_ft_reports_the_selected_model(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    weights = tmp_path / "source.safetensors"
    save_file(models.squeezenet1_1().state_dict(), weights)
    splits = {"train": {"a": 5, "b": 5}, "val": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}}
    root = image_folder(tmp_path / "images", splits)
    words = options(data__root=root, model__weights=weights, train__epochs=4, train__batch_size=8)
    # WiSE-FT selects the initial weights: the comparison must report their accuracy.
    monkeypatch.setattr(wise_ft, "best_alpha", lambda results: results[0])
    wise = "lp-ft@transfer.wise_ft=true"
    compare([*words, "--strategies", f"{','.join(known_strategies())},{wise}", "--seeds", "1"], StopSignals())
    strategies = json.loads((tmp_path / "run" / "compare.json").read_text())["strategies"]
    trials = {strategy["strategy"]: strategy["trials"] for strategy in strategies}
    assert list(trials) == [*known_strategies(), wise]
    assert all(len(of_strategy) == 1 for of_strategy in trials.values()), "no run failed"
    folder = tmp_path / "run" / wise / "seed-0"
    result = json.loads((folder / "wise.json").read_text())
    assert result["alpha"] == 0
    (start,) = rows(folder, "start")
    assert result["test_accuracy"] == start["test_accuracy"] == trials[wise][0]["accuracy"]

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.folders import image_folder
from tests.launching import rows
from trainer.commands import compare as verb
from trainer.commands.compare import compare, plan, variants
from trainer.config.strategies import known
from trainer.data.loader import ImageReadError
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.report.logger import RunLogger
from trainer.run.lock import read_attempts
from trainer.train_run import TrainResult
from trainer.transfer import wise_ft

TIMED = {"seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"train": {"a": 4, "b": 4}, "test": {"a": 2, "b": 2}}
    return image_folder(tmp_path_factory.mktemp("images"), parts)


def options(root: Path, folder: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "run.dir": folder, "run.device": "cpu", "run.threads": 1, "data.root": root, "data.image_size": 32,
        "data.num_workers": 0, "data.cache": folder.parent / "cache", "model.name": "squeezenet1_1",
        "model.weights": "null", "train.epochs": 1, "train.batch_size": 4,
    }  # fmt: skip
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


# --- what is compared


def test_variants_are_names_with_options_of_their_own() -> None:
    first, second, third = variants(
        "d2l@optim.lr=5e-6@optim.momentum=0.5, lp-ft,my/own.yaml@optim.warmup=1 steps"
    )
    assert (first.strategy, first.options) == ("d2l", ("--optim.lr=5e-6", "--optim.momentum=0.5"))
    assert (second.text, second.strategy, second.options) == ("lp-ft", "lp-ft", ())
    assert [v.folder for v in (first, second, third)] == [
        "d2l@optim.lr=5e-6@optim.momentum=0.5", "lp-ft", "my_own.yaml@optim.warmup=1_steps",
    ]  # fmt: skip
    (bracketed,) = variants("d2l@data.mean=[0, 0.1, 0.2]@optim.lr_mult={'a@b': 1, c: 2}")
    assert bracketed.options == ("--data.mean=[0, 0.1, 0.2]", "--optim.lr_mult={'a@b': 1, c: 2}")
    assert "/" not in variants("../../../etc@optim.lr=1")[0].folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("note,,lp-ft", "holds ''"),
        ("", "holds ''"),
        ("d2l@lr", "NAME@key=value"),
        ("@optim.lr=1", "NAME@key=value"),
        ("note,note", "note would share a folder"),
        ("d2l@optim.lr=1 ,d2l@optim.lr=1", "share a folder"),
        ("source-model", "source-model would share a folder"),
        ("d2l@run.seed=1", "run.seed is common to all"),
        ("d2l@data.val_fraction=0.5", "data.val_fraction is common to all"),
        ("d2l@pretrain.root=x", "pretrain.root is common"),
        ("d2l@transfer.strategy=lp-ft", "transfer.strategy is common"),
    ],
)
def test_what_cannot_be_compared_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        variants(text)
    assert expected in str(caught.value)


def test_a_strategy_wins_over_what_is_common_and_a_variants_options_over_it(
    root: Path, tmp_path: Path
) -> None:
    words = options(root, tmp_path / "c", optim__weight_decay=0.25, optim__clip_norm=3, scratch__lr="null")
    (tmp_path / "w.pth").touch()
    words[words.index("--model.weights=null")] = f"--model.weights={tmp_path / 'w.pth'}"
    plain, found, said = plan(words, variants("d2l@optim.lr=7,from-scratch@optim.weight_decay=0.5"))
    note, scratch = found.values()
    assert (note.optim.lr, note.optim.weight_decay, note.optim.loss_reduction) == (7, 1e-3, "sum")
    assert (scratch.optim.lr, scratch.optim.weight_decay, scratch.optim.loss_reduction) == (1e-3, 0.5, "mean")
    assert (note.optim.max_grad_norm, scratch.optim.max_grad_norm) == (3, 3), "where they say nothing"
    assert (note.model.weights, scratch.model.weights) == (str(tmp_path / "w.pth"), None)
    assert note.train == scratch.train == plain.train
    assert said == [
        "strategy d2l@optim.lr=7: optim.weight_decay is 0.001, not 0.25 as on the command line",
        f"strategy from-scratch@optim.weight_decay=0.5: model.weights is None, not {tmp_path / 'w.pth'} as on the "
        "command line",
    ]


def test_without_a_config_it_is_the_quickstart_that_is_compared() -> None:
    plain, found, _ = plan([], variants("lp-ft,from-scratch"))
    assert plain.data.root == "synthetic-target"
    assert [(c.data, c.train, c.run) for c in found.values()] == [(plain.data, plain.train, plain.run)] * 2
    assert [c.pretrain.root for c in found.values()] == ["synthetic-source", None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strategies=fast"], "strategy fast: transfer.strategy 'fast': there is no such strategy"),
        (
            ["--strategies=d2l,d2l@optim.lrr=1"],
            "strategy d2l@optim.lrr=1: command line: there is no option",
        ),
        (["--strategies=d2l", "--transfer.strategy=d2l"], "by --strategies; leave it out"),
        (["--strategies=d2l", "--debug"], "--debug is a run of its own"),
        (["--strategies=d2l", "--seeds=0"], "--seeds 0: expected 1 to 100"),
        (["--strategies=d2l", "--data.root=nowhere/at-all"], "nowhere/at-all"),
        (["--strategies=lp-ft"], "strategy lp-ft: model.head_init is linear-probe"),
        (
            ["--strategies=d2l,d2l@transfer.trainable=from:nowhere"],
            "strategy d2l@transfer.trainable=from:nowhere: transfer.trainable",
        ),
    ],
)
def test_what_is_wrong_is_said_before_any_run(
    words: list[str], expected: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        compare([*options(root, tmp_path / "c"), *words], StopSignals())
    assert expected in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_strategy_of_ones_own_may_not_bring_other_images_to_be_tested_on(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("data: {val_fraction: 0.5}")
    with pytest.raises(UserError, match=r"strategies d2l and .*own\.yaml have other data .*val_fraction"):
        plan(options(root, tmp_path / "c"), variants(f"note,{tmp_path / 'own.yaml'}"))


# --- what is made of the runs, which are not made here


class Ran:
    """Stands for `run`: trains nothing, and notes what it was asked for."""

    def __init__(self) -> None:
        self.configs: list[Any] = []
        self.fails: dict[str, BaseException] = {}

    def __call__(self, config: Any, signals: StopSignals) -> TrainResult:
        folder = Path(config.run.dir)
        self.configs.append(config)
        error = self.fails.get(folder.parent.name)
        if error is not None:
            raise error
        row = {
            "kind": "epoch", "epoch": 1, "test_accuracy": 0.5, "test_loss": 1.0, "seconds": 2.0, "train_seen": 8,
        }  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return TrainResult(folder=folder, rows=(row,), examples=(8, 4), selection=None, seconds=3.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    found = Ran()
    monkeypatch.setattr(verb, "run", found)
    return found


def test_seeds_follow_the_runs_own_and_the_split_stays(root: Path, tmp_path: Path, ran: Ran) -> None:
    words = options(root, tmp_path / "c", run__seed=5, data__seed=3, scratch__lr="null")
    summaries = compare([*words, "--strategies=d2l,from-scratch", "--seeds=2"], StopSignals())
    assert [(Path(c.run.dir).relative_to(tmp_path / "c").as_posix(), c.run.seed) for c in ran.configs] == [
        ("note/seed-5", 5), ("from-scratch/seed-5", 5), ("note/seed-6", 6), ("from-scratch/seed-6", 6),
    ]  # fmt: skip
    assert {(c.data.seed, c.train.epochs, c.train.batch_size) for c in ran.configs} == {(3, 1, 4)}
    assert summaries is not None
    assert [trial.seed for trial in summaries[0].trials] == [5, 6]


def test_a_run_that_fails_is_a_row_and_the_others_go_on(
    root: Path, tmp_path: Path, ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    ran.fails["d2l"] = UserError("the loss is not finite: diverged")
    words = [*options(root, tmp_path / "c"), "--seeds=1"]
    found = compare([*words, "--strategies=d2l,from-scratch"], StopSignals())
    assert found is not None
    note, scratch = found
    assert (note.accuracy, note.failures) == (None, {0: "the loss is not finite: diverged"})
    assert scratch.accuracy == 0.5
    assert "failed: the loss is not finite" in (tmp_path / "c" / "compare.md").read_text()
    assert "note, seed 0 failed: the loss is not finite: diverged" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 1 runs have failed; the first: the loss is not finite"):
        compare([*words, "--strategies=d2l"], StopSignals())


@pytest.mark.parametrize("error", [ImageReadError("a.png: gone"), Stopped("SIGTERM"), RuntimeError("no")])
def test_what_one_process_alone_may_meet_ends_the_comparison(
    error: BaseException, root: Path, tmp_path: Path, ran: Ran
) -> None:
    ran.fails["d2l"] = error
    with pytest.raises(type(error)):
        compare([*options(root, tmp_path / "c"), "--strategies=d2l,from-scratch"], StopSignals())
    assert len(ran.configs) == 1


@pytest.mark.slow
def test_a_source_model_is_trained_once_for_all_that_start_from_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str | None, str | None, int, str]] = []
    real = verb.run

    def run(config: Any, signals: StopSignals) -> TrainResult | None:
        name = Path(config.run.dir).relative_to(tmp_path / "c").as_posix()
        made.append(
            (name, config.model.weights, config.source.root, config.train.epochs, config.optim.loss_reduction)
        )
        return real(config, signals)

    monkeypatch.setattr(verb, "run", run)
    words = options(
        root, tmp_path / "c", source__root=root, source__epochs=2, source__lr=1e-3, scratch__lr=0.1
    )
    compare([*words, "--seeds=1", "--strategies=d2l,from-scratch"], StopSignals())
    source = str(tmp_path / "c" / "source-model" / "model.safetensors")
    assert made == [
        ("source-model", None, None, 2, "mean"),
        ("note/seed-0", source, None, 1, "sum"),
        ("from-scratch/seed-0", None, None, 1, "mean"),
    ], "the source by the config, in which no strategy has a say"
    assert not (tmp_path / "c" / "d2l" / "seed-0" / "baseline").exists(), "the comparison is this one"


# --- whole


def left(folder: Path) -> dict[str, Any]:
    """Return what a run has come to: its model's tensors and its figures but for the times."""
    figures = [{k: v for k, v in row.items() if k not in TIMED} for row in rows(folder, "epoch")]
    return {"figures": figures, "model": load_file(folder / "model.safetensors")}


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_and_ends_as_one_that_was_not(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of them by the one-cycle schedule, whose rate must be that of the step wherever the run goes on.
    cycled, other = "d2l@optim.lr=1e-4@optim.schedule=one-cycle", "from-scratch@optim.lr=1e-4"
    reference = options(root, tmp_path / "whole", train__batch_size=2, run__seed=1)
    compare([*reference, "--seeds=1", f"--strategies={cycled}"], StopSignals())

    signals, steps = StopSignals(), 0
    step = RunLogger.log_progress

    def asked(self: RunLogger, epoch: int, epoch_step: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 4 + 4 + 2:  # in the third of the four runs
            signals.received = signal.SIGTERM
        step(self, epoch, epoch_step)

    monkeypatch.setattr(RunLogger, "step", asked)
    again = options(root, tmp_path / "again", train__batch_size=2)
    again += ["--seeds=2", f"--strategies={cycled},{other}"]
    with pytest.raises(Stopped) as stopped:
        compare(again, signals)
    assert stopped.value.saved == "step 2 of 4, in epoch 1 of 1"
    assert not (tmp_path / "again" / "compare.json").exists()
    resumed = compare(again, StopSignals())
    assert steps == 4 * 4, "what was made is not made again"

    before, after = (left(tmp_path / name / cycled / "seed-1") for name in ("whole", "again"))
    assert before["figures"] == after["figures"]
    assert all(torch.equal(tensor, after["model"][name]) for name, tensor in before["model"].items())
    assert resumed is not None
    written = json.loads((tmp_path / "again" / "compare.json").read_text())
    assert [s["strategy"] for s in written["strategies"]] == [cycled, other]
    assert written["strategies"][0]["accuracy"] == resumed[0].accuracy

    # All of it is finished: once more changes none of the runs, and comes to the same table.
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("model.safetensors")}
    once_more = compare(again, StopSignals())
    assert once_more == resumed
    assert {path: path.stat().st_mtime_ns for path in models} == models
    assert read_attempts(tmp_path / "again" / other / "seed-1")[-1].state == "done"
    with pytest.raises(UserError, match=r"optim\.clip_norm: None there, 0\.5 now"):
        compare([*again, "--optim.max_grad_norm=0.5"], StopSignals())
    assert steps == 4 * 4


@pytest.mark.slow
def test_every_strategy_that_is_shipped_trains_and_wise_ft_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    save_file(models.squeezenet1_1().state_dict(), tmp_path / "source.safetensors")
    parts = {"train": {"a": 5, "b": 5}, "val": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}}
    root = image_folder(tmp_path / "images", parts)
    weights = tmp_path / "source.safetensors"
    words = options(root, tmp_path / "c", model__weights=weights, train__epochs=4, train__batch_size=8)
    # The line's best point is not the fine-tuned end: what is compared has to be the model that is kept.
    monkeypatch.setattr(wise_ft, "best_of", lambda points: points[0])
    chosen = f"{','.join(known())},lp-ft@transfer.wise_ft=true"
    compare([*words, "--strategies", chosen, "--seeds", "1"], StopSignals())
    found = json.loads((tmp_path / "c" / "compare.json").read_text())["strategies"]
    trials = {one["strategy"]: one["trials"] for one in found}
    assert list(trials) == chosen.split(",")
    assert all(len(each) == 1 for each in trials.values()), "none has failed"
    folder = tmp_path / "c" / "lp-ft@transfer.wise_ft=true" / "seed-0"
    kept = json.loads((folder / "wise.json").read_text())
    assert kept["alpha"] == 0
    (start,) = rows(folder, "start")
    assert (
        kept["test_accuracy"]
        == start["test_accuracy"]
        == trials["lp-ft@transfer.wise_ft=true"][0]["accuracy"]
    )

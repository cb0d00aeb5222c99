import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.commands.lr_find import lr_find, with_pretrained_weights
from trainer.config.parse import parse
from trainer.config.resolve import resolve
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.optim.train_step import TrainStep
from trainer.pipeline import run

Options = Callable[..., list[str]]


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[float], list[int]]]:
    """Return a list that each update extends by the rates of the groups and the examples of the batch."""
    recorded: list[tuple[list[float], list[int]]] = []
    original = TrainStep.__call__

    def record(self: TrainStep, model: Any, optimizer: Any, batch: Any, step: int, size: int) -> Any:
        recorded.append(([group["lr"] for group in optimizer.param_groups], batch.examples.tolist()))
        return original(self, model, optimizer, batch, step, size)

    monkeypatch.setattr(TrainStep, "__call__", record)
    return recorded


def test_range_test_scales_every_group_on_the_batches_of_the_run(
    options: Options, tmp_path: Path, updates: list[tuple[list[float], list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("of a run")
    words = options(optim__lr=0.01, optim__head_lr_scale=3, optim__loss_reduction="sum")
    result = lr_find(["--from=1e-6", "--to=1e-4", "--steps=11", *words], StopSignals())
    assert len(result.losses) == 11, "five epochs of two batches, and one batch of the sixth"
    for (rates, _), rate in zip(updates, result.rates, strict=True):
        assert rates == [pytest.approx(rate), pytest.approx(3 * rate)]
    assert (result.rates[0], result.rates[-1]) == (pytest.approx(1e-6), pytest.approx(1e-4))
    batches = [examples for _, examples in updates]
    assert [len(batch) for batch in batches] == [4, 2] * 5 + [4]
    for epoch in range(5):
        assert sorted(batches[2 * epoch] + batches[2 * epoch + 1]) == list(range(6))
    written = json.loads((tmp_path / "run" / "lr-find.json").read_text())
    assert (written["lr"], written["loss"]) == (list(result.rates), list(result.losses))
    assert written["loss_reduction"] == "sum"
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["lr-find.json", "lr-find.png", "model.safetensors"], "the run in this folder is not changed"
    assert (tmp_path / "run" / "model.safetensors").read_text() == "of a run"
    assert "--steps=11" not in capsys.readouterr().out, "in no command that is suggested"


def test_first_losses_are_those_of_the_run(options: Options, tmp_path: Path) -> None:
    result = lr_find(["--from=1e-9", "--to=2e-9", "--steps=10", *options()], StopSignals())
    run(parse(options(optim__lr=1e-9, train__logs_per_epoch=2)), StopSignals())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["train_loss"] for line in lines[:2])
    assert result.losses[0] == pytest.approx(first, rel=1e-6)
    assert (4 * result.losses[0] + 2 * result.losses[1]) / 6 == pytest.approx(second, rel=1e-5)


def test_range_test_stops_when_the_loss_diverges(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from=1e-6", "--to=1e6", "--steps=60", *options(optim__momentum=0)]
    result = lr_find(words, StopSignals())
    assert result.diverged
    assert len(result.losses) < 60
    written = json.loads((tmp_path / "run" / "lr-find.json").read_text())
    assert written["diverged"] is True
    assert max(written["loss"]) < float("inf")
    printed = capsys.readouterr().out
    assert "diverged" in printed
    lr = result.suggestion.lr
    assert ("no suggestion" if lr is None else f"--optim.lr {lr:.2g}") in printed


def test_signal_stops_the_test_between_updates_and_nothing_is_written(
    options: Options, tmp_path: Path, updates: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = StopSignals()
    original = TrainStep.__call__

    def stop_in_fourth_update(*arguments: Any) -> Any:
        if len(updates) == 3:
            signals.received = signal.SIGTERM
        return original(*arguments)

    monkeypatch.setattr(TrainStep, "__call__", stop_in_fourth_update)
    with pytest.raises(Stopped, match="SIGTERM"):
        lr_find([*options(), "--steps=10"], signals)
    assert len(updates) == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from=1", "--to=0.1"], "--from 1, --to 0.1: expected two learning rates"),
        (["--from=0"], "--from 0"),
        (["--to=inf"], "--to inf"),
        (["--steps=9"], "--steps 9: expected 10 or more"),
        (["--debug"], "--debug cannot be combined"),
        (["--optim.lrr=1"], "Did you mean --optim.lr"),
        (["--data.root=nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_invalid_options_are_reported_before_any_update(
    words: list[str], message: str, options: Options, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        lr_find([*options(), *words], StopSignals())
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_range_test_starts_from_the_pretrained_model(options: Options, images: Path, tmp_path: Path) -> None:
    words = options(pretrain__root=images)
    with pytest.raises(UserError, match=r"pretrain/model\.safetensors does not exist yet"):
        lr_find(words, StopSignals())
    model_file = tmp_path / "run" / "pretrain" / "model.safetensors"
    model_file.parent.mkdir(parents=True)
    model_file.touch()
    config = with_pretrained_weights(resolve(parse(words)))
    assert (config.model.weights, config.pretrain.root) == (str(model_file), None)

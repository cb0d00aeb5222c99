import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import image_folder
from trainer.commands import lr_find as verb
from trainer.commands.lr_find import lr_find
from trainer.config.parse import parse
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.pipeline import run


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}}
    return image_folder(tmp_path_factory.mktemp("images"), parts)


@pytest.fixture
def options(root: Path, tmp_path: Path) -> list[str]:
    settings = {
        "run.dir": tmp_path / "run", "run.device": "cpu", "run.threads": 1, "data.root": root, "data.image_size": 32,
        "data.num_workers": 0, "data.cache": tmp_path / "cache", "model.name": "squeezenet1_1", "model.weights": "null",
        "train.epochs": 1, "train.batch_size": 4,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]


def watched(monkeypatch: pytest.MonkeyPatch, each: Callable[[int, Any], None] = lambda *_: None) -> list[Any]:
    """Return what will hold, for each update, the groups' rates and the examples of its share."""
    seen: list[Any] = []

    def update(model: Any, optimizer: Any, share: Any, scale: float, **keywords: Any) -> Any:
        each(len(seen), model)
        rates = [group["lr"] for group in optimizer.param_groups]
        seen.append((rates, share[2].tolist(), scale))
        return verb_update(model, optimizer, share, scale, **keywords)

    verb_update = verb.update
    monkeypatch.setattr(verb, "update", update)
    return seen


def test_every_group_is_multiplied_alike_on_the_runs_own_batches(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = watched(monkeypatch)
    words = [*options, "--optim.lr=0.01", "--optim.head_lr_scale=3", "--optim.loss_reduction=sum"]
    found = lr_find(["--from=1e-6", "--to=1e-4", "--steps=11", *words], StopSignals())
    assert len(found.losses) == 11, "six epochs of two batches, the last of the sixth left out"
    for (backbone, head), rate in zip((rates for rates, _, _ in seen), found.rates, strict=True):
        assert (backbone, head) == (pytest.approx(rate), pytest.approx(3 * rate))
    assert found.rates[0] == pytest.approx(1e-6)
    assert found.rates[-1] == pytest.approx(1e-4)
    examples = [examples for _, examples, _ in seen]
    assert [len(some) for some in examples] == [4, 2] * 5 + [4], "ragged as the run's"
    for epoch in range(5):
        assert sorted(examples[2 * epoch] + examples[2 * epoch + 1]) == list(range(6))
    assert {scale for _, _, scale in seen} == {1.0}, "of the summed loss"
    written = json.loads((tmp_path / "run" / "lr-find.json").read_text())
    assert (written["lr"], written["loss"]) == (list(found.rates), list(found.losses))
    assert written["loss_reduction"] == "sum"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lr-find.json", "lr-find.png"]
    assert "--steps" not in capsys.readouterr().out.split("regraft train")[-1], "not the run's option"


def test_the_first_loss_is_that_of_the_runs_first_batch(options: list[str], tmp_path: Path) -> None:
    found = lr_find(["--from=1e-9", "--to=2e-9", "--steps=10", *options], StopSignals())
    run(parse([*options, "--optim.lr=1e-9", "--train.logs_per_epoch=2"]), StopSignals())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines[:2])
    assert found.losses[0] == pytest.approx(first["train_loss"], rel=1e-6), (
        "the same model, batch, crops and masks"
    )
    assert (4 * found.losses[0] + 2 * found.losses[1]) / 6 == pytest.approx(second["train_loss"], rel=1e-5)


def test_it_stops_where_it_diverges_and_suggests_a_rate_that_does_not(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lr_find(["--from=1e-6", "--to=1e6", "--steps=60", *options, "--optim.momentum=0"], StopSignals())
    assert found.diverged
    assert len(found.losses) < 60
    written = json.loads((tmp_path / "run" / "lr-find.json").read_text())
    assert written["diverged"] is True
    assert max(written["loss"]) < float("inf")
    said = capsys.readouterr().out
    assert "diverged" in said
    lr = found.suggestion.lr
    assert ("no suggestion" in said) == (lr is None)
    if lr is not None:
        assert lr < found.rates[-1]
        assert f"--optim.lr {lr:.2g}" in said


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_run_that_is_there_is_not_touched_and_one_that_comes_is_not_hindered(
    options: list[str], tmp_path: Path
) -> None:
    words = ["--from=1e-6", "--to=1e-5", "--steps=10", *options]
    lr_find(words, StopSignals())
    run(parse(options), StopSignals())
    before = contents(tmp_path / "run")
    lr_find([*words, "--optim.lr=0.3"], StopSignals())
    after = contents(tmp_path / "run")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"lr-find.json", "lr-find.png"}


def test_a_signal_ends_it_between_two_updates_and_nothing_is_written(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = StopSignals()

    def asked(step: int, _: object) -> None:
        if step == 3:
            signals.received = signal.SIGTERM

    seen = watched(monkeypatch, asked)
    with pytest.raises(Stopped, match="SIGTERM"):
        lr_find([*options, "--steps=10"], signals)
    assert len(seen) == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--from=1", "--to=0.1"], "--from 1, --to 0.1: expected two learning rates"),
        (["--from=0"], "--from 0"),
        (["--to=inf"], "--to inf"),
        (["--from=nan"], "--from nan"),
        (["--steps=9"], "--steps 9: expected 10 or more"),
        (["--debug"], "--debug is a run of its own"),
        (["--optim.lrr=1"], "Did you mean optim.lr"),
        (["--data.root=nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_what_is_wrong_is_said_before_any_update(
    words: list[str], expected: str, options: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        lr_find([*options, *words], StopSignals())
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_source_model_of_ones_own_has_to_be_trained_first(
    options: list[str], tmp_path: Path, root: Path
) -> None:
    words = [*options, f"--pretrain.root={root}", "--pretrain.epochs=1", "--optim.name=adamw"]
    with pytest.raises(UserError, match=r"source/model\.safetensors is not there yet: train it"):
        lr_find(words, StopSignals())
    run(parse(words), StopSignals())
    found = lr_find([*words, "--from=1e-6", "--to=1e-5", "--steps=10"], StopSignals())
    scratch = lr_find([*options, "--from=1e-6", "--to=1e-5", "--steps=10"], StopSignals())
    assert found.losses[0] != pytest.approx(scratch.losses[0], rel=1e-3), (
        "it starts from the source's weights"
    )

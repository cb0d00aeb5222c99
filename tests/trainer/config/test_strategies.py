from pathlib import Path

import pytest
import yaml

from trainer.config.parse import QUICKSTART, dump, parse
from trainer.config.schema import Config
from trainer.config.strategies import FOLDER, known, path_of
from trainer.errors import UserError
from trainer.run.folder import MARK, check_resumable

NAMES = ("d2l", "from-scratch", "gradual-unfreezing", "head-only", "lp-ft", "strong-regularization")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return a config that names a strategy and sets one of its options otherwise."""
    return write(
        tmp_path / "run.yaml", "data: {root: x}\ntransfer: {strategy: note}\noptim: {lr: 1, clip_norm: 7}"
    )


def test_each_layer_wins_over_the_one_before_it(file: str) -> None:
    defaults = parse(["--data.root=x"]).optim
    assert (defaults.momentum, defaults.loss_reduction, defaults.head_lr_scale) == (0.9, "mean", 10)
    from_file = parse(["--config", file])
    assert from_file.optim.loss_reduction == "sum", "the file's strategy, over the default"
    assert from_file.optim.lr == 1, "the file, over its strategy"
    on_line = parse(["--config", file, "--transfer.strategy", "lp-ft"])
    assert (on_line.optim.lr, on_line.optim.loss_reduction) == (3e-5, "mean"), "another one, over the file"
    assert on_line.optim.max_grad_norm == 7, "the file, where that one says nothing"
    assert on_line.optim.momentum == 0.9, "the file's own strategy is not beneath it"
    last = parse(["--config", file, "--optim.lr=5", "--transfer.strategy=lp-ft", "--optim.warmup", "3 steps"])
    assert (last.optim.lr, last.optim.warmup) == (5, "3 steps"), "options of the line, on either side of it"
    assert (last.transfer.strategy, last.model.head_init) == ("lp-ft", "linear-probe")


def test_a_strategy_comes_behind_the_last_of_several_files(file: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.yaml", "optim: {lr: 2, momentum: 0.5}")
    found = parse(["--config", file, "--transfer.strategy", "d2l", "--config", other])
    assert (found.optim.lr, found.optim.momentum) == (5e-5, 0)


@pytest.mark.parametrize("words", [["--transfer.strategy", "null"], ["--transfer", "{strategy: null}"]])
def test_null_on_the_command_line_takes_the_files_strategy_away(file: str, words: list[str]) -> None:
    found = parse(["--config", file, *words])
    assert (found.optim.loss_reduction, found.optim.lr, found.transfer.strategy) == ("mean", 1, None)


def test_a_strategy_may_be_named_in_a_whole_section() -> None:
    found = parse(["--data.root=x", "--transfer", "{strategy: head-only}"])
    assert (found.transfer.trainable, found.transfer.strategy) == ("head", "head-only")


def test_a_strategy_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    own = write(tmp_path / "own.yaml", "optim: {lr: 0.125}")
    found = parse(["--data.root=x", "--transfer.strategy", own])
    assert (found.optim.lr, found.transfer.strategy) == (0.125, own)


def test_the_quickstart_takes_a_strategy_too() -> None:
    found = parse(["--transfer.strategy=lp-ft"])
    plain = parse(["--config", str(QUICKSTART)])
    assert (found.data, found.train, found.pretrain) == (plain.data, plain.train, plain.pretrain)
    assert found.optim.lr == 3e-5
    scratch = parse(["--transfer.strategy=from-scratch"])
    assert (scratch.pretrain.root, scratch.model.weights, scratch.baseline.lr) == (None, None, None)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("fast", ["'fast'", *NAMES, "YAML file"]),
        ("here/fast.yaml", ["here/fast.yaml", "no such file", *NAMES]),
    ],
)
def test_an_unknown_strategy_lists_the_known_ones(strategy: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--data.root=x", "--transfer.strategy", strategy])
    for word in ["transfer.strategy", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("transfer: {strategy: note}", ["own.yaml sets transfer.strategy"]),
        ("train: {epochs: 3, accumulation: 2, batch_size: 8}", ["sets train.epochs, train.batch_size"]),
        ("run: {threads: 1}", ["sets run"]),
        ("data: {root: x}", ["sets data.root"]),
        ("optim: {lrr: 1}", ["own.yaml", "optim.lrr", "Did you mean optim.lr"]),
        ("optim: [", ["own.yaml", "not a readable YAML"]),
        ("optim: {lr: -1}", ["optim.lr", "above 0"]),
        ("optim: {lr: fast}", ["optim.lr", "fast"]),
    ],
)
def test_a_wrong_strategy_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    own = write(tmp_path / "own.yaml", text)
    for argv in (
        ["--data.root=x", "--transfer.strategy", own],
        ["--config", write(tmp_path / "run.yaml", f"data: {{root: x}}\ntransfer: {{strategy: {own}}}")],
    ):
        with pytest.raises(UserError) as caught:
            parse(argv)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_says_what_it_is_and_leaves_the_budget_alone(name: str, tmp_path: Path) -> None:
    assert known() == NAMES
    text = path_of(name).read_text(encoding="utf-8")
    assert text.startswith("# "), "headed by what it is"
    assert f"--transfer.strategy {name}\n" in text, "and by how to run it"
    base = ["--data.root=x", "--run.seed=3", "--train.epochs=7", "--train.batch_size=24"]
    found, plain = parse([*base, f"--transfer.strategy={name}"]), parse(base)
    assert (found.run, found.train, found.data.root) == (plain.run, plain.train, "x")
    assert parse(["--config", write(tmp_path / "config.yaml", dump(found))]) == found


@pytest.mark.parametrize("name", NAMES)
def test_strategies_hide_nothing_of_one_another(name: str, tmp_path: Path) -> None:
    # What one says of the optimizer, every other says too: none is another one for what stood below it.
    said = set(yaml.safe_load(path_of(name).read_text(encoding="utf-8"))["optim"])
    assert said >= {
        "name", "lr", "head_lr_scale", "weight_decay", "layer_decay", "loss_reduction", "schedule", "warmup",
    }  # fmt: skip


def test_a_run_gone_on_with_needs_nothing_of_a_strategy_that_has_moved(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    write(own, "optim: {lr: 0.125, lr_scales: {layer1: 0.5}}")
    config = parse(["--data.root=x", f"--transfer.strategy={own}", "--optim.lr_mult={}"])
    own.unlink()
    assert parse(["--config", write(tmp_path / "config.yaml", MARK + dump(config))]) == config


def test_a_strategy_is_a_name_for_its_options_when_a_run_goes_on(tmp_path: Path) -> None:
    named = parse(["--data.root=x", "--transfer.strategy=head-only"])
    write(tmp_path / "config.yaml", MARK + dump(named))
    (tmp_path / "model.safetensors").touch()
    normalize_name = yaml.safe_load((FOLDER / "head-only.yaml").read_text(encoding="utf-8"))
    words = [f"--{s}.{k}={v}" for s, values in normalize_name.items() for k, v in values.items()]
    same = parse(["--data.root=x", *words])
    assert same.transfer.strategy is None
    assert check_resumable(tmp_path, dump(same), resume="auto") is not None
    with pytest.raises(UserError, match=r"optim\.lr: 0\.01 there, 3e-05 now"):
        check_resumable(tmp_path, dump(parse(["--data.root=x", "--transfer.strategy=lp-ft"])), resume="auto")


def test_print_config_shows_the_strategys_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--data.root=x", "--transfer.strategy=d2l", "--optim.lr=2", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["transfer"]["strategy"] == "d2l"
    assert (shown["optim"]["loss_reduction"], shown["optim"]["lr"]) == ("sum", 2)
    assert Config().optim.loss_reduction == "mean"

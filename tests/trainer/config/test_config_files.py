from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trainer.config.config_files import STRATEGIES, known_strategies, strategy_file
from trainer.config.parse import QUICKSTART, dump, parse
from trainer.errors import UserError

NAMES = ("d2l", "from-scratch", "gradual-unfreezing", "head-only", "lp-ft", "strong-regularization")


@pytest.fixture
def file(write_yaml: Callable[..., str]) -> str:
    """Return a config that names a strategy and overrides one of its options."""
    return write_yaml("data: {root: x}\ntransfer: {strategy: d2l}\noptim: {lr: 1, max_grad_norm: 7}")


def test_precedence_of_strategies_files_and_options(file: str) -> None:
    defaults = parse(["--data.root=x"]).optim
    assert (defaults.momentum, defaults.loss_reduction, defaults.head_lr_scale) == (0.9, "mean", 10)
    of_file = parse(["--config", file])
    assert of_file.optim.loss_reduction == "sum", "the file's strategy wins over the default"
    assert of_file.optim.lr == 1, "the file wins over its strategy"
    named = parse(["--config", file, "--transfer.strategy", "lp-ft"])
    assert (named.optim.lr, named.optim.loss_reduction) == (3e-5, "mean"), "the named strategy wins over the file"
    assert named.optim.max_grad_norm == 7, "an option of the file that the named strategy does not set"
    assert named.optim.momentum == 0.9, "the file's own strategy does not apply"
    config = parse(["--config", file, "--optim.lr=5", "--transfer.strategy=lp-ft", "--optim.warmup", "3 steps"])
    assert (config.optim.lr, config.optim.warmup) == (5, "3 steps"), "options win, before and after the strategy"
    assert (config.transfer.strategy, config.model.head_init) == ("lp-ft", "linear-probe")
    config = parse(["--config", file, "--transfer.strategy", "null"])
    assert (config.optim.loss_reduction, config.optim.lr, config.transfer.strategy) == ("mean", 1, None)


def test_strategy_of_the_command_line_comes_after_the_last_file(file: str, write_yaml: Callable[..., str]) -> None:
    other = write_yaml("optim: {lr: 2, momentum: 0.5}", "other.yaml")
    optim = parse(["--config", file, "--transfer.strategy", "d2l", "--config", other]).optim
    assert (optim.lr, optim.momentum) == (5e-5, 0)
    plain = parse(["--config", file, "--config", str(STRATEGIES / "lp-ft.yaml")])
    assert plain.optim.lr == 3e-5, "a strategy is a config file"


def test_strategy_applies_to_the_quickstart() -> None:
    config, plain = parse(["--transfer.strategy=lp-ft"]), parse(["--config", str(QUICKSTART)])
    assert (config.data, config.train, config.pretrain) == (plain.data, plain.train, plain.pretrain)
    assert config.optim.lr == 3e-5
    scratch = parse(["--transfer.strategy=from-scratch"])
    assert (scratch.pretrain.root, scratch.model.weights, scratch.baseline.lr) == (None, None, None)


@pytest.mark.parametrize("strategy", ["fast", "here/fast.yaml", "", "configs"])
def test_unknown_strategy_lists_the_known_ones(strategy: str) -> None:
    with pytest.raises(UserError, match=r"transfer\.strategy .*no such strategy or file") as error:
        parse(["--data.root=x", f"--transfer.strategy={strategy}"])
    for word in (repr(strategy), *NAMES):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("transfer: {strategy: d2l}", ["own.yaml sets transfer.strategy"]),
        ("train: {epochs: 3, grad_accum_steps: 2, batch_size: 8}", ["sets train.epochs, train.batch_size"]),
        ("run: {threads: 1}", ["sets run.threads"]),
        ("debug: true", ["sets debug"]),
        ("data: {root: x}", ["sets data.root"]),
        ("optim: {lrr: 1}", ["own.yaml", "optim.lrr", "Did you mean optim.lr"]),
        ("optim: {clip_norm: 1}", ["own.yaml", "optim.clip_norm was renamed to optim.max_grad_norm"]),
        ("optim: [", ["own.yaml", "not a readable YAML"]),
        ("optim: {lr: -1}", ["optim.lr", "above 0"]),
        ("optim: {lr: fast}", ["optim.lr", "fast"]),
    ],
)
def test_invalid_strategy_file_is_reported(text: str, words: list[str], write_yaml: Callable[..., str]) -> None:
    own = write_yaml(text, "own.yaml")
    for argv in (
        ["--data.root=x", "--transfer.strategy", own],
        ["--config", write_yaml(f"data: {{root: x}}\ntransfer: {{strategy: {own}}}")],
    ):
        with pytest.raises(UserError) as error:
            parse(argv)
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_strategy_is_documented_and_leaves_the_budget_unchanged(name: str, write_yaml: Callable[..., str]) -> None:
    assert known_strategies() == NAMES
    text = strategy_file(name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"--transfer.strategy {name}\n" in text
    # Each strategy sets these options: it does not depend on a strategy or on options below it.
    assert set(yaml.safe_load(text)["optim"]) >= {
        "name", "lr", "head_lr_scale", "weight_decay", "layer_decay", "loss_reduction", "schedule", "warmup",
    }  # fmt: skip
    base = ["--data.root=x", "--run.seed=3", "--train.epochs=7", "--train.batch_size=24"]
    config, plain = parse([*base, f"--transfer.strategy={name}"]), parse(base)
    assert (config.run, config.train, config.data.root) == (plain.run, plain.train, "x")
    assert parse(["--config", write_yaml(dump(config))]) == config


def test_config_of_a_run_does_not_need_its_strategy(write_yaml: Callable[..., str]) -> None:
    own = write_yaml("optim: {lr: 0.125, lr_mult: {layer1: 0.5}}", "own.yaml")
    config = parse(["--data.root=x", f"--transfer.strategy={own}", "--optim.lr_mult={}"])
    assert (config.optim.lr, config.transfer.strategy) == (0.125, own)
    Path(own).unlink()
    assert parse(["--config", write_yaml(dump(config))]) == config

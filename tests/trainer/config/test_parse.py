from pathlib import Path

import pytest

from trainer.config.parse import QUICKSTART, dump, keys, parse
from trainer.errors import UserError


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "optim: {lr: 0.5, weight_decay: 0.25}")
    config = parse(["--config", file, "--optim.lr", "0.125"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.head_lr_scale) == (0.125, 0.25, 10)


def test_a_command_line_before_the_file_wins_too(tmp_path: Path) -> None:
    file = write(tmp_path, "optim: {lr: 0.5}")
    assert parse(["--config", file, "--optim.lr=0.125"]).optim.lr == 0.125


def test_without_config_and_data_it_is_the_quickstart() -> None:
    assert parse([]) == parse(["--config", str(QUICKSTART)])
    assert parse(["--data.root", "x"]).pretrain.root is None


def test_what_is_dumped_is_read_again_to_the_same(tmp_path: Path) -> None:
    config = parse(
        ["--data.root", "päth mit 图片", "--data.mean", "[0.1, 0.2, 0.3]", "--data.std", "[1, 1, 1]"]
    )
    assert parse(["--config", write(tmp_path, dump(config))]) == config


@pytest.mark.parametrize("basic", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(recipe: Path) -> None:
    config = parse(["--config", str(recipe)])
    assert config.run.dir == f"runs/{recipe.stem}"
    assert f"--config configs/{recipe.name}" in recipe.read_text(encoding="utf-8"), "headed by its command"


def test_the_hotdog_recipe_is_the_notes() -> None:
    config = parse(["--config", str(QUICKSTART.with_name("hotdog.yaml"))])
    assert (config.model.name, config.optim.loss_reduction, config.optim.name) == ("resnet18", "sum", "sgd")
    assert (config.optim.lr, config.optim.head_lr_scale, config.optim.weight_decay) == (5e-5, 10, 1e-3)
    assert (config.optim.momentum, config.optim.schedule, config.model.head_init) == (0, "constant", "xavier")
    assert (config.train.batch_size, config.train.epochs) == (128, 5)
    assert (config.data.resize, config.data.resize_size, config.data.image_size) == ("squash", 256, 224)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr", "1"], ["optim.lrr", "Did you mean optim.lr", "optim.head_lr_scale"]),
        (["--lr", "1"], ["'lr'", "optim.lr"]),
        (["--optim.lr", "fast"], ["optim.lr", "fast"]),
        (["--optim.lr", "-1"], ["optim.lr", "above 0"]),
        (["--optim.lr", ".nan"], ["optim.lr", "above 0"]),
        (["--data.mean", "[0, .nan, 0]", "--data.std", "[1, 1, 1]"], ["data.mean", "finite"]),
        (["--data.mean", "[0, 0, 0]", "--data.std", "[1, .inf, 1]"], ["data.std", "finite"]),
        (["--pretrain.lr", ".inf"], ["pretrain.lr", "above 0"]),
        (["--optim.name", "adam"], ["optim.name", "sgd", "adamw"]),
        (["--train.epochs", "0"], ["train.epochs", "1 or more"]),
        (["--train.epochs", "1.5"], ["train.epochs"]),
        (["--train.grad_accum_steps", "64"], ["train.grad_accum_steps", "train.batch_size"]),
        (["--data.mean", "[0, 0, 0]"], ["data.mean", "data.std"]),
        (["--data.mean", "[0, 0]", "--data.std", "[1, 1]"], ["data.mean"]),
        (["--data.val_fraction", "1"], ["data.val_fraction"]),
        (["--data.crop_scale", "[0.5, 0.2]"], ["data.crop_scale"]),
        (["--data.extensions", "[jpg]"], ["data.extensions", "dot"]),
        (["--optim.warmup", "5 minutes"], ["optim.warmup", "5 minutes", "steps"]),
        (["--train.precision", "fp16", "--run.device", "cpu"], ["train.precision", "run.device"]),
        (["--pretrain.root", "x"], ["pretrain.root", "model.weights"]),
        (["--model.weights", "null", "--baseline.lr", "0.1"], ["baseline.lr"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "quickstart.yaml"]),
        (["stray"], ["stray"]),
    ],
)
def test_what_is_wrong_is_named_before_any_work(argv: list[str], words: list[str]) -> None:
    if "--config" not in argv:
        argv = ["--data.root", "images", *argv]
    with pytest.raises(UserError) as caught:
        parse(argv)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "optim.lr"]),
        ("optimizer: {lr: 1}", ["optimizer", "Valid"]),
        ("optim: 5", ["optim", "5"]),
        ("optim: {lr: 1, lr: 2}", ["lr", "twice"]),
        ("- a list", ["sections"]),
        ("", ["sections"]),
        ("optim: {lr: [", ["not a readable YAML"]),
        ("run: !!python/object/apply:os.system ['true']", ["not a readable YAML"]),
        ("train: {epochs: many}", ["train.epochs", "many"]),
        ("run: {dir: 2024-13-45}", ["not a readable YAML"]),
        ("run: {dir: 0x_}", ["not a readable YAML"]),
        ("[" * 2000, ["not a readable YAML"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(["--config", write(tmp_path, text)])
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"x\.yaml"):
        parse(["--config", str(tmp_path / "x.yaml")])


def test_help_shows_every_key_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for key in keys():
        assert f"--{key}" in shown
    assert "pixels" in " ".join(shown.split())


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--data.root", "x", "--optim.lr", "0.125", "--print_config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert parse(["--config", write(tmp_path, printed)]).optim.lr == 0.125


def test_debug_needs_no_value() -> None:
    assert parse(["--data.root", "x", "--debug"]).debug
    assert parse(["--debug", "--data.root", "x"]).debug
    assert not parse(["--data.root", "x", "--debug", "false"]).debug

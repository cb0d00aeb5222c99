import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from launch.trainer_options import run_folder
from regraft.files import CONFIGS
from trainer.config.options import OPTIONS, RENAMED
from trainer.config.parse import QUICKSTART, parse
from trainer.errors import UserError

BOMB = "x-a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x-{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghij")
)
"""Ten lines that stand for ten billion values."""


def test_later_options_win(write_yaml: Callable[..., str]) -> None:
    one = write_yaml("optim: {lr: 0.5, weight_decay: 0.25, lr_mult: {layer1: 2}}", "one.yaml")
    two = write_yaml("optim: {lr: 0.75, momentum: 0.5}\ntrain: {epochs: 7}", "two.yaml")
    optim = parse([f"--config={one}", "--config", two, "--optim.momentum", "0.25"]).optim
    assert (optim.lr, optim.weight_decay, optim.momentum) == (0.75, 0.25, 0.25)
    assert (optim.lr_mult, optim.head_lr_scale) == ({"layer1": 2}, 10), "the first file and the default"
    assert parse([f"--config={two}", f"--config={one}"]).optim.lr == 0.5
    assert parse(["--optim.lr=0.125", f"--config={one}"]).optim.lr == 0.5, "a file after an option"


def test_word_alone_is_the_dataset() -> None:
    assert parse(["my folder", "--train.epochs", "3"]) == parse(["--data.root=my folder", "--train.epochs=3"])
    assert parse(["--debug", "x"]).data.root == "x"
    assert parse(["x", "--data.root=x"]).data.root == "x"
    with pytest.raises(UserError, match=r"did you mean --config my\.yaml\?"):
        parse(["my.yaml"])
    with pytest.raises(UserError, match=r"Did you mean --data\.root FOLDER"):
        parse(["--data", "FOLDER"])


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("run.trackers", "tensorboard", ("tensorboard",)),
        ("run.trackers", "tensorboard,mlflow", ("tensorboard", "mlflow")),
        ("run.trackers", "tensorboard, mlflow", ("tensorboard", "mlflow")),
        ("run.trackers", "[tensorboard, mlflow]", ("tensorboard", "mlflow")),
        ("run.trackers", "[]", ()),
        ("data.extensions", ".jpg,.PNG", (".jpg", ".PNG")),
        ("data.crop_scale", "0.5,1", (0.5, 1.0)),
        ("data.mean", "null", None),
        ("run.dir", "a,b", "a,b"),
    ],
)
def test_a_list_needs_no_brackets(option: str, text: str, expected: object, write_yaml: Callable[..., str]) -> None:
    section, _, name = option.partition(".")
    for argv in ([f"--{option}", text], ["--config", write_yaml(f"{section}:\n  {name}: {text}")]):
        assert getattr(getattr(parse(["--data.root=x", *argv]), section), name) == expected, argv


def test_recipe_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "configs/hotdog.yaml"]) == parse(["--config", str(CONFIGS / "hotdog.yaml")])
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "hotdog.yaml").write_text("data: {root: own}")
    assert parse(["--config", "configs/hotdog.yaml"]).data.root == "own"


def test_quickstart_is_the_default_config() -> None:
    assert parse([]) == parse(["--config", str(QUICKSTART)])
    assert parse(["--train.epochs=1"]).pretrain.root == "synthetic-source"
    assert parse(["--data.root", "x"]).pretrain.root is None


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_recipe_is_valid_and_headed_by_its_command(recipe: Path) -> None:
    assert parse(["--config", str(recipe)]).run.dir == f"runs/{recipe.stem}"
    assert f"--config configs/{recipe.name}" in recipe.read_text(encoding="utf-8")


def test_hotdog_recipe_has_the_values_of_the_d2l_recipe() -> None:
    config = parse(["--config", str(CONFIGS / "hotdog.yaml")])
    assert (config.model.name, config.optim.loss_reduction, config.optim.name) == ("resnet18", "sum", "sgd")
    assert (config.optim.lr, config.optim.head_lr_scale, config.optim.weight_decay) == (5e-5, 10, 1e-3)
    assert (config.optim.momentum, config.optim.schedule, config.model.head_init) == (0, "constant", "xavier")
    assert (config.train.batch_size, config.train.epochs) == (128, 5)
    assert (config.data.resize, config.data.resize_size, config.data.image_size) == ("squash", 256, 224)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--optim.lrr 1", ["optim.lrr", "Did you mean --optim.lr 1?", "--help optim"]),
        ("--lr 1", ["'lr'", "Did you mean --optim.lr 1? Near: pretrain.lr, baseline.lr"]),
        ("--optim {}", ["'optim'", "Did you mean --optim.name"]),
        ("--model resnet50", ["Did you mean --model.name resnet50?"]),
        ("--epochs=3", ["Did you mean --train.epochs 3? Near: pretrain.epochs"]),
        ("--batch-size 8", ["Did you mean --train.batch_size 8?"]),
        ("--train.batch-size 8", ["Did you mean --train.batch_size 8?"]),
        ("--data.img_size 8", ["Did you mean --data.image_size 8?"]),
        ("--learning_rate 1", ["Did you mean --optim.lr 1?"]),
        ("--mixup 1", ["Did you mean --regularization.mixup 1?"]),
        ("--gpus 2", ["--nproc"]),
        ("-b 8", ["Did you mean --train.batch_size?"]),
        ("--cfg x.yaml", ["Did you mean --config x.yaml?"]),
        ("--num_classes 3", ["The classes are those of the dataset"]),
        ("--val_split 0.2", ["Did you mean --data.val_fraction 0.2?"]),
        ("\N{EM DASH}optim.lr 0.1", ["another character than the hyphen", "did you mean --optim.lr?"]),
        ("optim.lr=0.1", ["did you mean --optim.lr=0.1?"]),
        ("--config=", ["--config is empty"]),
        ("--data.image_size 224x224", ["data.image_size is 224x224: expected INT|null"]),
        ("-lr 1", ["Did you mean --optim.lr"]),
        ("--qwertz 1", ["The sections are run, data, model"]),
        ("my.yaml", ["'my.yaml' is not an option, and the dataset is 'images'"]),
        ("--optim.lr", ["optim.lr", "expected one argument"]),
        ("--optim.lr fast", ["optim.lr", "fast"]),
        ("--optim.lr -1", ["optim.lr is -1.0", "above 0"]),
        ("--optim.lr .nan", ["optim.lr", "above 0"]),
        ("--optim.lr_mult {fc:0}", ["optim.lr_mult", "fc"]),
        ("--optim.name adam", ["optim.name", "sgd", "adamw"]),
        ("--optim.warmup 5minutes", ["optim.warmup", "5minutes", "steps"]),
        ("--data.mean [124,116,104]", ["data.mean is [124, 116, 104]", "divide by 255: [0.486, 0.455, 0.408]"]),
        ("--data.mean [.5,.5,.5] --data.std [58.4,57.1,57.4]", ["data.std is [58.4,", "255: [0.229, 0.224, 0.225]"]),
        ("--data.mean [0,.nan,0] --data.std [1,1,1]", ["data.mean is [0, nan, 0]", "three numbers from 0 to 1"]),
        ("--data.mean [-0.1,0,0] --data.std [1,1,1]", ["data.mean is [-0.1, 0, 0]", "three numbers from 0 to 1"]),
        ("--data.mean [0,0,0] --data.std [1,.inf,1]", ["data.std", "three numbers from 0.001 to 1"]),
        ("--data.mean [0,0,0] --data.std [1,0,1]", ["data.std", "three numbers from 0.001 to 1"]),
        ("--data.mean [0,0] --data.std [1,1,1]", ["data.mean is [0, 0]", "three numbers from 0 to 1"]),
        ("--data.mean [0,0,0]", ["data.mean", "data.std"]),
        ("--data.val_fraction 1", ["data.val_fraction", "below 1"]),
        ("--data.crop_scale [0.5,0.2]", ["data.crop_scale", "smallest <= largest"]),
        ("--data.extensions [jpg]", ["data.extensions", "dot"]),
        ("--data.random_erasing 1.1", ["data.random_erasing is 1.1", "a probability"]),
        ("--data.cache_images device --data.augment augmix", ["augment is augmix", "expected basic"]),
        (
            "--data.cache_images device --data.augment none --data.random_erasing 0.5",
            ["none with data.random_erasing 0.5", "none without random erasing"],
        ),
        ("--pretrain.lr .inf", ["pretrain.lr", "above 0"]),
        ("--regularization.label_smoothing 1", ["regularization.label_smoothing is 1.0", "0 to below 1"]),
        ("--regularization.mixup -0.1", ["regularization.mixup is -0.1", "0 or more"]),
        ("--regularization.cutmix .inf", ["regularization.cutmix is inf", "0 or more"]),
        ("--train.epochs 0", ["train.epochs", "1 or more"]),
        ("--train.epochs 1.5", ["train.epochs"]),
        ("--checkpoint.every often", ["checkpoint.every is 'often'", "expected an interval"]),
        ("--checkpoint.every 0steps", ["checkpoint.every is '0steps'", "expected more than"]),
        ("--checkpoint.keep_every 10min", ["checkpoint.keep_every is '10min'", "steps, epochs or a percentage"]),
        ("--checkpoint.keep_last 0 --checkpoint.every null", ["checkpoint.keep_last is 0", "1 or more"]),
        ("--transfer.trainable {'1':all}", ["transfer.trainable", "start with epoch 0"]),
        ("--train.grad_accum_steps 64", ["train.grad_accum_steps is 64", "train.batch_size is 32"]),
        ("--train.compile true --train.gradient_checkpointing true", ["train.compile", "set one of them to false"]),
        ("--train.micro_batch_size 0", ["train.micro_batch_size is 0", "1 or more, auto, or null"]),
        ("--train.micro_batch_size half", ["train.micro_batch_size"]),
        ("--train.micro_batch_size 8 --train.grad_accum_steps 2", ["train.micro_batch_size is 8", "to null"]),
        ("--train.precision fp16 --run.device cpu", ["train.precision", "run.device"]),
        ("--pretrain.root x", ["pretrain.root", "model.weights"]),
        ("--model.weights=", ["model.weights is empty"]),
        ("--model.weights_key=", ["model.weights_key is empty"]),
        ("--model.weights null --baseline.lr 0.1", ["baseline.lr"]),
        ("--model.weights null --transfer.l2_sp 0.1", ["transfer.l2_sp is 0.1", "pretrained weights"]),
        ("--model.weights null --transfer.wise_ft true", ["transfer.wise_ft is True", "pretrained weights"]),
        ("--model.weights null --model.head_init linear-probe", ["model.head_init", "pretrained weights"]),
        ("--data.sampling balanced --regularization.class_weights balanced", ["data.sampling", "class_weights"]),
        ("--regularization.mixup 0.2 --train.batch_size 1", ["regularization.mixup", "train.batch_size is 1"]),
        ("--config nowhere.yaml", ["nowhere.yaml", "quickstart.yaml"]),
        ("stray", ["'stray' is not an option"]),
    ],
)  # fmt: skip
def test_invalid_option_is_named(options: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(["--data.root", "images", *options.split()])
    for word in words:
        assert word in str(error.value)


def test_valid_combinations_are_accepted() -> None:
    for options in (
        "--checkpoint.every null --checkpoint.keep_best false --checkpoint.keep_last 1",
        "--checkpoint.every 10min --checkpoint.keep_every 10epochs",
        "--checkpoint.every 3steps --checkpoint.keep_every 25%",
        "--model.weights null --pretrain.root images --transfer.l2_sp 0.1 --transfer.wise_ft true",
        "--data.sampling balanced --data.extensions [.gif] --regularization.mixup 0.2",
    ):
        parse(["--data.root", "images", *options.split()])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lrr: 1}", ["optim.lrr", "optim.lr"]),
        ("optimizer: {lr: 1}", ["optimizer", "Did you mean optim.lr?"]),
        ("optim: 5", ["optim", "5"]),
        ("optim:\n\tlr: 1", ["line 2 is indented with a tab"]),
        ("optim:\nlr: 1", ["section 'optim' is empty"]),
        ("run: {seed: 0755}", ["line 1: 0755 is a number of another base"]),
        ("train: {batch_size: 1:30}", ["line 1: 1:30 is a number of another base"]),
        ("optim: {lr: 1, lr: 2}", ["line 1", "duplicate keys: lr"]),
        ("", ["sections"]),
        ("optim: {lr: [", ["not a readable YAML"]),
        ("run: !!python/object/apply:os.system ['true']", ["not a readable YAML"]),
        ("train: {epochs: many}", ["train.epochs", "many"]),
        ("run: {dir: 2024-13-45}", ["not a readable YAML"]),
        ("run: {dir: 0x_}", ["not a readable YAML"]),
        ("[" * 500, ["not a readable YAML"]),
        (b"\xff\xfe\x00\x81", ["run.yaml", "not a readable YAML"]),
        (b"\x89PNG\r\n\x1a\n\0", ["run.yaml", "not a readable YAML"]),
        ("optim: {" + "".join(f"k{i}: 1, " for i in range(60_000)) + "}", ["there is no option 'optim.k0'"]),
        ("optim: {" + "lr: 1, " * 60_000 + "}", ["line 1: duplicate keys: lr"]),
        ("optim:\n  lr_mult: &a {<<: *a}", ["line 2: values are nested deeper"]),
        ("optim:\n  lr_mult: &a {b: *a}", ["line 2: values are nested deeper"]),
        (BOMB, ["more than 250,000 values, aliases included"]),
        ("#" * 1_000_001, ["larger than 1 MB"]),
        ("defaults: &d {lr: 1}\noptim: *d", ["there is no option 'defaults.lr'"]),
    ],
)
def test_invalid_config_file_is_reported(text: str | bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        parse(["--config", str(tmp_path / "run.yaml")])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("folder", "it is a folder"), ("pipe", "not a regular file"), ("/dev/zero", "not a regular file")],
)
def test_config_that_is_no_regular_file_is_refused_at_once(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{path}: not a readable YAML file: it is .*{message.removeprefix('it is ')}"):
        parse(["--config", str(tmp_path / path)])
    assert run_folder(["--config", str(tmp_path / path)]).name == "default", "the launcher does not wait for it either"


def test_merge_keys_and_anchors(write_yaml: Callable[..., str]) -> None:
    text = """
x-common: &common {lr: 0.5, weight_decay: 0.25}
optim: {<<: *common, lr: 0.125, momentum: 0}
pretrain: {root: x, <<: {lr: 1, epochs: 3}}
model: {weights: null}
transfer: {<<: [{l2_sp: 0.5}, {l2_sp: 0.25, wise_ft: true}]}
"""
    config = parse(["--data.root=x", "--config", write_yaml(text)])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.momentum) == (0.125, 0.25, 0)
    assert (config.pretrain.lr, config.pretrain.epochs) == (1, 3)
    assert (config.transfer.l2_sp, config.transfer.wise_ft) == (0.5, True), "the first of several"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_is_refused_with_the_new_name(old: str, new: str, write_yaml: Callable[..., str]) -> None:
    key, _, value = old.partition(" ")
    if "." not in key:  # a section
        new = next(option for option in sorted(OPTIONS) if option.startswith(f"{new}."))
        key = f"{key}.{new.partition('.')[2]}"
    section, _, name = key.partition(".")
    assert new.partition(" ")[0] in OPTIONS
    for words in (["--config", write_yaml(f"{section}: {{{name}: {value or 1}}}")], [f"--{key}", value or "1"]):
        with pytest.raises(UserError, match=f"was renamed to {new}"):
            parse(words)


def test_printed_config_is_parsed_to_the_same_config(
    write_yaml: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.root", "päth mit 图片", "--data.mean", "[0.1, 0.2, 0.3]", "--data.std", "[1, 1, 1]"]
    options += ["--optim.lr", "0.125", "--transfer.strategy=head-only"]
    with pytest.raises(SystemExit) as exit_:
        parse([*options, "--print_config"])
    assert exit_.value.code == 0
    assert parse(["--config", write_yaml(capsys.readouterr().out)]) == parse(options)


def test_debug_needs_no_value() -> None:
    assert parse(["--debug", "--data.root", "x"]).debug
    assert not parse(["--data.root", "x", "--debug", "false"]).debug

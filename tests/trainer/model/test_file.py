import dataclasses
import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import functional

import regraft
from tests.folders import picture
from trainer.data import augment
from trainer.data.augment import Normalize, Preprocessing
from trainer.data.loader import ImageDataset, SampleKey
from trainer.errors import UserError
from trainer.model.batch_norm import freeze_batch_norm
from trainer.model.create import build_model
from trainer.model.file import load
from trainer.model.head import find_heads, replace_head
from trainer.model.metadata import ModelMetadata, read_metadata, write_model

PREPROCESSING = Preprocessing(
    image_size=64,
    resize_size=72,
    resize="squash",
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
CLASSES = (
    "ant",
    "bee",
    "猫 🐈",
    'it\'s "quoted"',
    "two\nlines\t\\n",
    "../../etc/passwd",
    "e\u0301",
    "broken \udcff bytes",
)


def describe(architecture: str = "resnet18", **changes: Any) -> ModelMetadata:
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "architecture": architecture,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "source": "torchvision ResNet18_Weights.IMAGENET1K_V1",
        "metrics": {"epoch": 3, "test_accuracy": 0.875, "selected_on": "test"},
    }
    return ModelMetadata(**fields | changes)


def trained(
    architecture: str, *, size: int = 64, classes: int = len(CLASSES), frozen: bool = False
) -> nn.Module:
    """Return a model as a run leaves it: grafted, trained for a step, with statistics of its own."""
    torch.manual_seed(11)
    model = build_model(
        architecture,
        image_size=size,
        num_classes=classes,
        weights=None,
        head_init="xavier",
    ).model
    if frozen:
        freeze_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = model(torch.randn(2, 3, size, size))
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().sum().backward()
    optimizer.step()
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good file of a small model."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    write_model(path, trained("shufflenet_v2_x0_5").state_dict(), describe("shufflenet_v2_x0_5"))
    return path


# What is written is what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["resnet18", "squeezenet1_1", "googlenet", "densenet121", "swin_t", "vit_b_32"]
)
def test_the_loaded_model_is_the_trained_one(architecture: str, tmp_path: Path) -> None:
    model = trained(architecture).eval()
    path = tmp_path / "model.safetensors"
    description = describe(architecture)
    write_model(path, model.state_dict(), description)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]

    random = torch.get_rng_state()
    loaded, preprocess, classes = regraft.load(path)
    assert torch.equal(torch.get_rng_state(), random)

    assert classes == CLASSES
    assert preprocess.preprocessing == PREPROCESSING
    assert not any(module.training for module in loaded.modules())
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
        assert (tensor.dtype, tensor.device.type) == (state[key].dtype, "cpu")
    # The layout decides the order of additions: both run in the same one.
    images = preprocess(picture(1))[None].repeat(2, 1, 1, 1)
    model = model.to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, len(CLASSES))
        assert logits.std() > 0
        assert (loaded(images) - logits).abs().max() == 0


def test_a_frozen_and_guarded_model_is_loaded_plain_and_trains_on(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, trained("resnet18", frozen=True).state_dict(), describe())
    loaded = load(path).model
    assert not any({"train", "forward"} & vars(module).keys() for module in loaded.modules())
    loaded.train()
    loaded(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_the_header_alone_describes_everything(small: Path) -> None:
    with small.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header["__metadata__"]
    assert metadata["format"] == "pt"
    fields = json.loads(metadata["regraft"])
    assert fields == {
        "format": 1,
        "version": "0.1.0",
        "architecture": "shufflenet_v2_x0_5",
        "classes": list(CLASSES),
        "preprocessing": {
            "image_size": 64,
            "resize_size": 72,
            "resize": "squash",
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "source": "torchvision ResNet18_Weights.IMAGENET1K_V1",
        "metrics": {"epoch": 3, "test_accuracy": 0.875, "selected_on": "test"},
    }
    assert read_metadata(small) == describe("shufflenet_v2_x0_5")
    # any other program reads the tensors
    assert load_file(small)["fc.weight"].shape == (len(CLASSES), 1024)


def test_a_file_of_someone_else_has_no_description(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"fc.weight": torch.zeros(2)}, path)
    assert read_metadata(path) is None
    save_file({"fc.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert read_metadata(path) is None
    with pytest.raises(
        UserError, match=r"plain.safetensors: holds weights but not regraft's description; expected a run"
    ):
        load(path)


def test_a_failed_write_leaves_the_earlier_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small.read_bytes())

    def breaks(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", breaks)
    with pytest.raises(OSError, match="No space left"):
        write_model(path, {"fc.weight": torch.zeros(2)}, describe())
    assert path.read_bytes() == small.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_16_bit_files_load_as_32_bits(small: Path, tmp_path: Path) -> None:
    state = load_file(small)
    halved = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    path = tmp_path / "half.safetensors"
    write_model(path, halved, describe("shufflenet_v2_x0_5"))
    loaded = load(path).model.state_dict()
    assert all(torch.equal(loaded[key], halved[key].to(loaded[key].dtype)) for key in state)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32, torch.int64}


def test_the_model_does_not_look_into_the_file_any_more(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small.read_bytes())
    model = load(path).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not any(path.read_bytes())


def test_large_models_are_loaded_without_drawing_them(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    def drawn(tensor: Tensor, *args: object, **settings: object) -> Tensor:
        if not tensor.is_meta and tensor.numel() > 100_000:
            pytest.fail(f"{list(tensor.shape)} was drawn to be overwritten")
        return tensor

    for name in (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "uniform_",
        "trunc_normal_",
        "xavier_uniform_",
    ):
        monkeypatch.setattr(nn.init, name, drawn)
    assert len(load(small).classes) == len(CLASSES)


# Preprocessing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "shorter"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_preprocessing_is_that_of_the_runs_evaluation(
    small: Path, tmp_path: Path, resize: str, interpolation: str
) -> None:
    preprocessing = dataclasses.replace(PREPROCESSING, resize=resize, interpolation=interpolation)  # type: ignore[arg-type]
    path = tmp_path / "model.safetensors"
    write_model(path, load_file(small), describe("shufflenet_v2_x0_5", preprocessing=preprocessing))
    preprocess = load(path).preprocess
    image = picture(5, size=(100, 80))
    image.save(tmp_path / "picture.png")

    found = preprocess(tmp_path / "picture.png")

    assert (found.shape, found.dtype) == ((3, 64, 64), torch.float32)
    assert torch.equal(found, preprocess(image))
    assert torch.equal(found, preprocess(str(tmp_path / "picture.png")))
    # as the run's loader and loop do
    images = ImageDataset([(str(tmp_path / "picture.png"), 0)], augment.eval_transform(preprocessing), seed=0)
    array, _, _ = images[SampleKey(0, 0)]
    batch = torch.from_numpy(np.stack([array])).permute(0, 3, 1, 2)
    assert torch.equal(found, Normalize(preprocessing, torch.device("cpu"))(batch)[0])
    # and by hand
    side = [72, 72] if resize == "squash" else [72]
    resized = functional.resize(image, side, functional.InterpolationMode(interpolation), antialias=True)
    cropped = functional.to_tensor(functional.center_crop(resized, [64]))
    by_hand = functional.normalize(cropped, list(PREPROCESSING.mean), list(PREPROCESSING.std))
    torch.testing.assert_close(found, by_hand, rtol=0, atol=2e-6)


PICTURES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda image: image.convert("L"),
    "palette": lambda image: image.quantize(16),
    "alpha": lambda image: Image.merge("RGBA", (*image.split(), image.convert("L"))),
    "16 bits": lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_in_memory_is_read_as_its_file_would_be(small: Path, tmp_path: Path, kind: str) -> None:
    image = PICTURES[kind](picture(6))
    image.save(tmp_path / "picture.png")
    preprocess = load(small).preprocess
    before = (image.mode, image.tobytes())
    assert torch.equal(preprocess(image), preprocess(tmp_path / "picture.png"))
    with Image.open(tmp_path / "picture.png") as opened:
        assert torch.equal(preprocess(opened), preprocess(tmp_path / "picture.png"))
    assert (image.mode, image.tobytes()) == before


def test_a_photograph_on_its_side_is_turned(small: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn right to see it upright
    upright = picture(7, size=(30, 50))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    preprocess = load(small).preprocess
    expected = preprocess(upright)
    assert torch.equal(preprocess(tmp_path / "turned.png"), expected)
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(preprocess(opened), expected)


def test_what_is_no_picture_is_an_error_with_its_path(small: Path, tmp_path: Path) -> None:
    preprocess = load(small).preprocess
    (tmp_path / "text.jpg").write_text("hello")
    for name, words in (
        ("text.jpg", "a text file, not an image"),
        ("none.jpg", "no such file"),
        ("", "a folder, not a file"),
    ):
        with pytest.raises(UserError) as info:
            preprocess(tmp_path / name)
        assert str(info.value) == f"{tmp_path / name}: {words}; expected an image file"
    with pytest.raises(UserError, match="the picture: floating-point values"):
        preprocess(Image.fromarray(np.full((4, 4), 7.0, dtype=np.float32)))


# As the source of another run -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "googlenet"])
def test_a_model_file_is_the_source_of_another_run(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = trained(architecture).state_dict()
    write_model(path, state, describe(architecture))
    created = build_model(
        architecture,
        image_size=96,
        num_classes=3,
        weights=str(path),
        head_init="xavier",
    )
    heads = tuple(f"{head}." for head in created.heads)
    total = len([key for key in state if not key.startswith(heads)])
    assert created.summary[-1] == (
        f"{total} of the backbone's {total} tensors from file {path}; the output layer starts anew"
    )
    for key, tensor in created.model.state_dict().items():
        if key.startswith(heads):
            assert tensor.shape[0] == 3
        else:
            assert torch.equal(tensor, state[key]), key


# Hostile files ----------------------------------------------------------------------------------------------


def rewritten(small: Path, path: Path, **fields: object) -> Path:
    """Write the good file's tensors under a description with other fields; None leaves a field out."""
    with safe_open(small, framework="pt") as file:
        description = json.loads(file.metadata()["regraft"])
    description = {key: value for key, value in {**description, **fields}.items() if value is not None}
    save_file(load_file(small), path, metadata={"regraft": json.dumps(description)})
    return path


def preprocessing(**changes: object) -> dict[str, object]:
    return {**dataclasses.asdict(PREPROCESSING), **changes}


DAMAGED: dict[str, tuple[dict[str, object], str]] = {
    "later format": ({"format": 2}, "format 2, this version of regraft reads 1"),
    "no format": ({"format": None}, "no 'format'"),
    "no classes": ({"classes": None}, "no 'classes'"),
    "no metrics": ({"metrics": None}, "no 'metrics'"),
    "one class": ({"classes": ["a"]}, "1 classes, 1 different ones; expected two or more"),
    "a class twice": ({"classes": ["a", "b", "a"]}, "3 classes, 2 different ones"),
    "classes are no list": ({"classes": "ab"}, "classes are not a list of names"),
    "classes are an object": ({"classes": {"a": 0, "b": 1}}, "classes are not a list of names"),
    "classes are numbers": ({"classes": [1, 2, 3]}, "classes are not a list of names"),
    "classes are lists": ({"classes": [["a"], ["b"]]}, "classes are not a list of names"),
    "unknown architecture": (
        {"architecture": "resnet19"},
        "architecture 'resnet19' is not one of torchvision's",
    ),
    "a detector": ({"architecture": "fasterrcnn_resnet50_fpn"}, "is not one of torchvision's"),
    "a path": ({"architecture": "../../evil.py"}, "architecture '../../evil.py' is not one of torchvision's"),
    "architecture is a list": ({"architecture": ["resnet18"]}, "is not one of torchvision's"),
    "a very long name": ({"architecture": "x" * 10**6}, "architecture 'xxx"),
    "escapes": ({"architecture": "\x1b[31m\n"}, r"architecture '\x1b[31m\n' is not one of torchvision's"),
    "no preprocessing": ({"preprocessing": None}, "no 'preprocessing'"),
    "preprocessing is text": ({"preprocessing": "usual"}, "string indices must be integers"),
    "preprocessing is a list": ({"preprocessing": [224]}, "list indices must be integers"),
    "huge image": (
        {"preprocessing": preprocessing(image_size=10**9)},
        "image_size is 1000000000, expected 1 to 8192",
    ),
    "no image": ({"preprocessing": preprocessing(image_size=0)}, "image_size is 0, expected 1 to 8192"),
    "image size is text": ({"preprocessing": preprocessing(image_size="224")}, "image_size is '224'"),
    "huge resize": ({"preprocessing": preprocessing(resize_size=10**9)}, "resize_size is 1000000000"),
    "two means": (
        {"preprocessing": preprocessing(mean=[0.1, 0.2])},
        "mean and std are not three finite numbers",
    ),
    "means are words": (
        {"preprocessing": preprocessing(mean=["a", "b", "c"])},
        "could not convert string to float",
    ),
    "mean is null": ({"preprocessing": preprocessing(mean=[None] * 3)}, "float() argument must be"),
    "mean is infinite": (
        {"preprocessing": preprocessing(mean=[float("inf")] * 3)},
        "not three finite numbers",
    ),
    "mean is endless": (
        {"preprocessing": preprocessing(mean=[10**400] * 3)},
        "int too large to convert to float",
    ),
    "std is 0": ({"preprocessing": preprocessing(std=[0, 1, 1])}, "std is not above 0"),
    "unknown resize": ({"preprocessing": preprocessing(resize="stretch")}, "resize is 'stretch'"),
    "unknown interpolation": ({"preprocessing": preprocessing(interpolation="magic")}, "'magic'"),
    "metrics are a number": ({"metrics": 3}, "'int' object is not iterable"),
    "metrics are text": ({"metrics": "good"}, "dictionary update sequence"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_description_is_an_error_with_the_path(small: Path, tmp_path: Path, case: str) -> None:
    fields, words = DAMAGED[case]
    path = rewritten(small, tmp_path / "hostile.safetensors", **fields)
    for read in (read_metadata, load, regraft.load):
        with pytest.raises(UserError) as info:
            read(path)
        text = str(info.value)
        assert text.startswith(f"{path}: its description is damaged (")
        assert words in text
        assert text.endswith("; expected a run's model.safetensors as it was written")
        assert len(text) < 600
        assert text.isprintable()


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[]", '"text"', "[" * 100_000, '{"format": 1}', '{"format": NaN}', "1" * 5000],
)
def test_a_description_that_is_no_json_object(small: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostile.safetensors"
    save_file(load_file(small), path, metadata={"regraft": text})
    with pytest.raises(UserError, match=r"hostile.safetensors: its description is damaged"):
        load(path)


def test_an_image_size_that_the_architecture_cannot_take(small: Path, tmp_path: Path) -> None:
    fields = preprocessing(image_size=50, resize_size=50)
    path = rewritten(small, tmp_path / "hostile.safetensors", architecture="alexnet", preprocessing=fields)
    with pytest.raises(
        UserError, match=r"hostile.safetensors: alexnet cannot be trained on images of 50 x 50 px"
    ):
        load(path)


def changed(small: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    state = load_file(small)
    change(state)
    write_model(path, state, describe("shufflenet_v2_x0_5"))
    return path


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda s: s.pop("conv1.0.weight"), "conv1.0.weight is missing"),
    "no head": (lambda s: [s.pop("fc.weight"), s.pop("fc.bias")], "fc.weight is missing, fc.bias is missing"),
    "extra": (lambda s: s.update({"evil.weight": torch.zeros(1)}), "evil.weight is not of this model"),
    "an extra name that clears the screen": (
        lambda s: s.update({"\x1b[2J\n": torch.zeros(1)}),
        r"\x1b[2J\n is not of this model",
    ),
    "another shape": (lambda s: s.update({"fc.bias": torch.zeros(3)}), "fc.bias is [3], expected [8]"),
    "a scalar": (lambda s: s.update({"fc.bias": torch.zeros(())}), "fc.bias is [], expected [8]"),
    "NaN": (
        lambda s: s["fc.weight"].view(-1)[5:6].fill_(torch.nan),
        "fc.weight holds NaN or infinite values",
    ),
    "infinite": (lambda s: s["fc.bias"].fill_(torch.inf), "fc.bias holds NaN or infinite values"),
    "whole numbers": (
        lambda s: s.update({"fc.bias": torch.zeros(8, dtype=torch.int64)}),
        "fc.bias holds torch.int64",
    ),
    "truth values": (
        lambda s: s.update({"fc.bias": torch.zeros(8, dtype=torch.bool)}),
        "fc.bias holds torch.bool",
    ),
    "complex": (
        lambda s: s.update({"fc.bias": torch.zeros(8, dtype=torch.complex64)}),
        "fc.bias holds torch.complex64",
    ),
    "a counter that counts in halves": (
        lambda s: s.update({"conv1.1.num_batches_tracked": torch.tensor(0.5)}),
        "conv1.1.num_batches_tracked holds torch.float32",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_the_description(small: Path, tmp_path: Path, case: str) -> None:
    change, words = TENSORS[case]
    path = changed(small, tmp_path / "hostile.safetensors", change)
    with pytest.raises(UserError) as info:
        load(path)
    assert str(info.value).startswith(f"{path}: its weights do not fit its description: ")
    assert words in str(info.value)
    assert str(info.value).isprintable()


def test_another_architecture_lists_the_first_few_tensors(small: Path, tmp_path: Path) -> None:
    path = rewritten(small, tmp_path / "hostile.safetensors", architecture="alexnet")
    with pytest.raises(UserError, match=r"features.0.weight is missing, .* and \d{3} more$"):
        load(path)


def test_swins_indices_are_not_taken_from_a_file(tmp_path: Path) -> None:
    state = models.swin_t(num_classes=len(CLASSES)).state_dict()
    key = next(key for key in state if key.endswith("relative_position_index"))
    path = tmp_path / "hostile.safetensors"
    write_model(path, {**state, key: state[key] + 10**6}, describe("swin_t"))
    with pytest.raises(UserError, match=rf"{re.escape(key)} holds torch.int64, or indices of another model"):
        load(path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        # a head of 1.2 GB
        (
            {"classes": [f"{number}" for number in range(300_000)]},
            "fc.weight is [8, 1024], expected [300000, 1024]",
        ),
        # positions of 0.8 GB, an attention of petabytes
        (
            {"architecture": "vit_b_16", "preprocessing": preprocessing(image_size=8192)},
            "encoder.pos_embedding is missing",
        ),
    ],
    ids=["classes", "image size"],
)
def test_a_small_file_that_describes_a_huge_model_takes_no_memory(
    small: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    path = rewritten(small, tmp_path / "hostile.safetensors", **fields)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    began, before = time.monotonic(), _peak_memory()
    with pytest.raises(UserError) as info:
        load(path)
    assert words in str(info.value)
    assert _peak_memory() - before < 300_000_000
    assert time.monotonic() - began < 30


def _peak_memory() -> int:
    """Return the most memory that this process has had since it was last asked to forget that, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_files_that_are_no_safetensors(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    path = tmp_path / "broken.safetensors"
    for content in (
        b"",
        b"text" * 9,
        whole[:100],
        whole[:-1],
        struct.pack("<Q", 2**60) + b"{}",
        b"PK\x03\x04" + whole,
    ):
        path.write_bytes(content)
        for read in (read_metadata, load):
            with pytest.raises(UserError, match=r"broken.safetensors: not a readable safetensors file"):
                read(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path, str(tmp_path / "none")):
        with pytest.raises(UserError) as info:
            regraft.load(path)
        assert str(info.value) == f"{path}: there is no such file; expected a run's model.safetensors"


def test_random_damage_never_escapes_as_another_error(small: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    whole = small.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    path = tmp_path / "damaged.safetensors"
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(8, 8 + length, size=random.integers(1, 4)):
            damaged[place] = random.integers(32, 127)
        path.write_bytes(damaged)
        try:
            read_metadata(path)
        except UserError as error:
            text = str(error)
        else:
            text = f"{path}: read"
        assert text.startswith(f"{path}: ")


def test_graft_finds_the_same_head_again_in_a_loaded_model(small: Path) -> None:
    """A loaded model is an ordinary one: it can be grafted for other classes."""
    model = load(small).model
    heads = find_heads(model, 64)
    replace_head(model, heads, 4, "torch")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert type(model) is type(models.shufflenet_v2_x0_5())

import dataclasses
import json
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

import regraft
from trainer.data.preprocessing import Preprocessing
from trainer.distributed.precision import Execution
from trainer.errors import UserError
from trainer.model.batch_norm import freeze_batch_norm
from trainer.model.create import build_model
from trainer.model.file import load
from trainer.model.metadata import ModelMetadata, UnknownThreshold, read_metadata, update_metadata, write_model

State = dict[str, Tensor]
SMALL = "shufflenet_v2_x0_5"
PREPROCESSING = Preprocessing(
    image_size=64,
    resize_size=72,
    resize="squash",
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
CLASSES = (
    *("ant", "bee", "猫 🐈", 'it\'s "quoted"', "two\nlines\t\\n"),
    *("../../etc/passwd", "e\u0301", "broken \udcff bytes"),
)


def make_metadata(architecture: str = SMALL, **changes: Any) -> ModelMetadata:
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "architecture": architecture,
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
        "source": "torchvision ResNet18_Weights.IMAGENET1K_V1",
        "metrics": {"epoch": 3, "test_accuracy": 0.875, "selected_on": "test"},
    }
    return ModelMetadata(**fields | changes)


def train_model(architecture: str, *, frozen: bool = False) -> nn.Module:
    """Return a model as a run leaves it: with a new head and after an update, in channels_last."""
    torch.manual_seed(11)
    model = build_model(architecture, image_size=64, num_classes=len(CLASSES), weights=None, head_init="xavier").model
    if frozen:
        freeze_batch_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = model(torch.randn(2, 3, 64, 64))
    (outputs if isinstance(outputs, Tensor) else outputs[0]).square().sum().backward()
    optimizer.step()
    return model.to(memory_format=torch.channels_last)


def make_image(seed: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid file of a small model."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    write_model(path, train_model(SMALL).state_dict(), make_metadata())
    return path


# Write and load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "googlenet", "swin_t", "vit_b_32"])
def test_the_loaded_model_equals_the_trained_one(architecture: str, tmp_path: Path) -> None:
    model = train_model(architecture).eval()
    path = tmp_path / "model.safetensors"
    write_model(path, model.state_dict(), make_metadata(architecture))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]

    random_state = torch.get_rng_state()
    loaded, preprocess, classes = regraft.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)

    assert classes == CLASSES
    assert preprocess.preprocessing == PREPROCESSING
    assert not any(module.training for module in loaded.modules())
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
        assert (tensor.dtype, tensor.device.type) == (state[key].dtype, "cpu")
    # The memory layout changes the order of additions, so both must have the same.
    model = model.to(memory_format=torch.contiguous_format)
    images = preprocess(make_image(1))[None].repeat(2, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_model_with_frozen_batch_norm_is_loaded_unfrozen_and_can_train(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, train_model("resnet18", frozen=True).state_dict(), make_metadata("resnet18"))
    loaded = load(path).module
    assert not any({"train", "forward"} & vars(module).keys() for module in loaded.modules())
    loaded.train()
    loaded(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and not p.is_meta for p in loaded.parameters())


def test_the_header_is_json(model_file: Path) -> None:
    with model_file.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))["__metadata__"]
    assert header["format"] == "pt"
    metadata = make_metadata()
    optional = ("execution", "temperature", "unknown")  # earlier versions did not write these
    fields = {key: value for key, value in dataclasses.asdict(metadata).items() if key not in optional}
    assert json.loads(header["regraft"]) == json.loads(json.dumps({"format": 1, **fields}))
    assert read_metadata(model_file) == metadata


def test_update_metadata_changes_the_header_and_no_bit_of_the_weights(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file.read_bytes())
    changes: dict[str, Any] = {
        "execution": Execution("bf16", channels_last=True),
        "temperature": 1.5,
        "unknown": UnknownThreshold(score="energy", threshold=-2.25),
    }
    updated = update_metadata(path, **changes)
    assert updated == read_metadata(path) == make_metadata(**changes)
    before, after = load_file(model_file), load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert update_metadata(path, execution=None, temperature=None, unknown=None) == make_metadata()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    save_file({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds weights but no regraft header"):
        update_metadata(path, temperature=1.0)


def test_a_safetensors_file_of_another_program_has_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    for header in (None, {"format": "pt"}):
        save_file({"fc.weight": torch.zeros(2)}, path, metadata=header)
        assert read_metadata(path) is None
        with pytest.raises(UserError, match=r"plain.safetensors: holds weights but no regraft header; expected a run"):
            load(path)


def test_the_loaded_model_is_fp32_and_independent_of_the_file(model_file: Path, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(model_file).items()}
    path = tmp_path / "half.safetensors"
    write_model(path, state, make_metadata())
    model = load(path).module
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], state[key].to(loaded[key].dtype)) for key in state)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32, torch.int64}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not any(path.read_bytes())


# Hostile files --------------------------------------------------------------------------------------------------


def write_changed(model_file: Path, path: Path, change: Callable[[State], object], **fields: object) -> Path:
    """Write the file with changed tensors, and with changed fields in the header; None removes a field."""
    with safe_open(model_file, framework="pt") as file:
        header = json.loads(file.metadata()["regraft"]) | fields
    state = load_file(model_file)
    change(state)
    header = {key: value for key, value in header.items() if value is not None}
    save_file(state, path, metadata={"regraft": json.dumps(header)})
    return path


def preprocessing(**changes: object) -> dict[str, object]:
    return {"preprocessing": {**dataclasses.asdict(PREPROCESSING), **changes}}


DAMAGED_FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "later format": ({"format": 2}, "format 2, this version of regraft reads 1"),
    "no format": ({"format": None}, "no 'format'"),
    "no classes": ({"classes": None}, "no 'classes'"),
    "one class": ({"classes": ["a"]}, "1 classes, 1 different ones; expected two or more"),
    "classes are text": ({"classes": "ab"}, "classes are not a list of names"),
    "classes are lists": ({"classes": [["a"], ["b"]]}, "classes are not a list of names"),
    "classes are not Unicode": ({"classes": ["a", "\ud800"]}, "surrogates not allowed"),
    "unknown architecture": ({"architecture": "resnet19"}, "architecture 'resnet19' is not one of torchvision's"),
    "a long name": ({"architecture": "x" * 10**6}, "architecture 'xxx"),
    "escapes": ({"architecture": "../\x1b[31m\n"}, r"architecture '../\x1b[31m\n' is not one of torchvision's"),
    "preprocessing is text": ({"preprocessing": "usual"}, "string indices must be integers"),
    "huge image size": (preprocessing(image_size=10**9), "image_size is 1000000000, expected 1 to 8192"),
    "mean of 0 to 255": (preprocessing(mean=[124, 116, 104]), "mean is [124, 116, 104]: expected three numbers from 0"),
    "negative mean": (preprocessing(mean=[-0.1, 0.5, 0.5]), "mean is [-0.1, 0.5, 0.5]: expected three numbers from 0"),
    "std of zero": (preprocessing(std=[0.2, 0, 0.2]), "std is [0.2, 0, 0.2]: expected three numbers from 0.001 to 1"),
    "std of NaN": (preprocessing(std=[float("nan")] * 3), "std is [nan, nan, nan]: expected"),
    "two means": (preprocessing(mean=[0.5, 0.5]), "mean is [0.5, 0.5]: expected three numbers"),
    "mean is text": (preprocessing(mean=["a", "b", "c"]), "could not convert string to float"),
    "mean is a huge integer": (preprocessing(mean=[10**400] * 3), "int too large to convert to float"),
    "unknown interpolation": (preprocessing(interpolation="magic"), "'magic'"),
    "metrics are a number": ({"metrics": 3}, "'int' object is not iterable"),
    "unknown precision": ({"execution": {"precision": "int4", "channels_last": True}}, "expected a precision (fp32"),
    "channels_last is a number": ({"execution": {"precision": "fp32", "channels_last": 1}}, "expected a precision"),
    "temperature of zero": ({"temperature": 0}, "temperature is 0, expected a number from 0.001 to 1000"),
    "temperature of NaN": ({"temperature": float("nan")}, "temperature is nan, expected a number from 0.001 to 1000"),
    "temperature is text": ({"temperature": "warm"}, "temperature is 'warm', expected a number from 0.001 to 1000"),
    "unknown score": ({"unknown": {"score": "luck", "threshold": 0.5}}, "expected a score (max_logit, energy)"),
    "no threshold": ({"unknown": {"score": "energy"}}, "no 'threshold'"),
    "a threshold that is true": ({"unknown": {"score": "energy", "threshold": True}}, "and a threshold"),
}


@pytest.mark.parametrize("case", DAMAGED_FIELDS)
def test_a_damaged_header_is_an_error_with_the_path(model_file: Path, tmp_path: Path, case: str) -> None:
    changes, reason = DAMAGED_FIELDS[case]
    path = write_changed(model_file, tmp_path / "hostile.safetensors", dict, **changes)
    for read in (read_metadata, regraft.load):
        with pytest.raises(UserError) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(f"{path}: its header is damaged (")
        assert reason in text
        assert text.endswith("; expected a run's model.safetensors as it was written")
        assert len(text) < 600
        assert text.isprintable()


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"text"', "[" * 100_000, '{"format": 1}', '{"format": NaN}', "1" * 5000]
)
def test_a_header_that_is_no_json_object_is_damaged(model_file: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostile.safetensors"
    save_file(load_file(model_file), path, metadata={"regraft": text})
    with pytest.raises(UserError, match=r"hostile.safetensors: its header is damaged"):
        load(path)


DAMAGED_TENSORS: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: s.pop("conv1.0.weight"), "conv1.0.weight is missing"),
    "no head": (lambda s: [s.pop("fc.weight"), s.pop("fc.bias")], "fc.weight is missing, fc.bias is missing"),
    "extra": (lambda s: s.update({"\x1b[2J\n": torch.zeros(1)}), r"\x1b[2J\n does not belong to this model"),
    "another shape": (lambda s: s.update({"fc.bias": torch.zeros(3)}), "fc.bias is [3], expected [8]"),
    "NaN": (lambda s: s["fc.weight"].view(-1)[5:6].fill_(torch.nan), "fc.weight holds NaN or infinite values"),
    "integers": (lambda s: s.update({"fc.bias": s["fc.bias"].long()}), "fc.bias holds torch.int64"),
    "complex": (lambda s: s.update({"fc.bias": torch.zeros(8).cfloat()}), "fc.bias holds torch.complex64"),
    "a floating-point counter": (
        lambda s: s.update({"conv1.1.num_batches_tracked": torch.tensor(0.5)}),
        "conv1.1.num_batches_tracked holds torch.float32",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_TENSORS)
def test_tensors_that_do_not_fit_the_header_are_an_error(model_file: Path, tmp_path: Path, case: str) -> None:
    change, reason = DAMAGED_TENSORS[case]
    path = write_changed(model_file, tmp_path / "hostile.safetensors", change)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: its weights do not fit its header: ")
    assert reason in str(error.value)
    assert str(error.value).isprintable()


def test_constants_of_the_architecture_are_not_loaded(tmp_path: Path) -> None:
    state = models.swin_t(num_classes=len(CLASSES)).state_dict()
    key = next(key for key in state if key.endswith("relative_position_index"))
    path = tmp_path / "hostile.safetensors"
    write_model(path, {**state, key: state[key] + 10**6}, make_metadata("swin_t"))
    with pytest.raises(UserError, match=rf"{re.escape(key)} holds torch.int64, or indices that differ"):
        load(path)


IMPOSSIBLE: dict[str, tuple[dict[str, object], str]] = {
    "another architecture": ({"architecture": "alexnet"}, "features.0.weight is missing, "),
    "an unsuitable image size": (
        {"architecture": "alexnet", **preprocessing(image_size=50, resize_size=50)},
        "hostile.safetensors: alexnet cannot be trained on images of 50 x 50 px",
    ),
    "a head of 1.2 GB": (
        {"classes": [f"{number}" for number in range(300_000)]},
        "fc.weight is [8, 1024], expected [300000, 1024]",
    ),
    "positions of 0.8 GB": (
        {"architecture": "vit_b_16", **preprocessing(image_size=8192)},
        "encoder.pos_embedding is missing",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_header_of_another_or_a_huge_model_takes_no_memory(model_file: Path, tmp_path: Path, case: str) -> None:
    changes, reason = IMPOSSIBLE[case]
    path = write_changed(model_file, tmp_path / "hostile.safetensors", dict, **changes)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    start, before = time.monotonic(), peak_memory()
    with pytest.raises(UserError, match=re.escape(reason)):
        load(path)
    assert peak_memory() - before < 300_000_000, "bytes"
    assert time.monotonic() - start < 60


def peak_memory() -> int:
    """Return the peak memory of this process since its last reset, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_files_in_other_formats_are_not_readable(model_file: Path, tmp_path: Path) -> None:
    valid = model_file.read_bytes()
    path = tmp_path / "broken.safetensors"
    for content in (b"", b"text" * 9, valid[:100], valid[:-1], struct.pack("<Q", 2**60) + b"{}", b"PK\x03\x04" + valid):
        path.write_bytes(content)
        for read in (read_metadata, load):
            with pytest.raises(UserError, match=r"broken.safetensors: not a readable safetensors file"):
                read(path)


def test_a_run_folder_is_loaded_and_a_wrong_path_is_an_error(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_file.parent.parent))
    folder = model_file.parent
    for path in (folder, str(folder), f"~/{folder.name}", f"~/{folder.name}/model.safetensors"):
        assert regraft.load(path).classes == CLASSES
    expected = "expected a run folder or its model.safetensors"
    for missing, file in ((tmp_path / "none", "none"), (tmp_path, "model.safetensors"), ("~/none", "none")):
        with pytest.raises(UserError, match=f"/{file}: there is no such file; {expected}"):
            regraft.load(missing)
    for other, kind in ((3, "int"), (b"x", "bytes"), (None, "NoneType"), ([model_file], "list")):
        with pytest.raises(UserError, match=f"^regraft.load was given a {kind}: {expected}, as str or Path$"):
            regraft.load(other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"~nobody-here/x: cannot be read .*; {expected}"):
        regraft.load("~nobody-here/x")

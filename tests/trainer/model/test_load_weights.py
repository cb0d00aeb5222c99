import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from trainer.errors import UserError
from trainer.model.create import build_model, check_weights
from trainer.model.head import Head, find_heads, replace_head
from trainer.model.load_weights import LoadReport, load_weights
from trainer.model.state_dict import select_state
from trainer.model.weights import SourceWeights, read_weights

State = dict[str, Tensor]


def with_new_head(model: nn.Module, *, size: int = 64, classes: int = 5) -> tuple[nn.Module, tuple[Head, ...]]:
    heads = find_heads(model, size)
    replace_head(model, heads, classes, "xavier")
    return model, heads


def load(
    model: nn.Module, heads: tuple[Head, ...], state: State, *, name: str = "net", size: int = 64, partial: bool = False
) -> LoadReport:
    weights = SourceWeights(state, "the file")
    return load_weights(model, heads, weights, name=name, image_size=size, allow_partial=partial)


def assert_loaded(model: nn.Module, heads: tuple[Head, ...], state: State, *, size: int = 64) -> LoadReport:
    """Load a state, and check that every tensor of the backbone was copied and the heads were not."""
    in_heads = tuple(f"{head.name}." for head in heads)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load(model, heads, state, size=size)
    assert report.missing == report.mismatched == report.unexpected == ()
    for key, tensor in model.state_dict().items():
        if key in state or key.startswith(in_heads):
            assert torch.equal(tensor, before[key] if key.startswith(in_heads) else state[key]), key
    return report


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return models.squeezenet1_1().state_dict()


def test_the_backbone_is_copied_and_the_head_is_not(state: State) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    without_head = {key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
    head = {"classifier.1.weight": torch.zeros(5, 512, 1, 1), "classifier.1.bias": torch.zeros(5)}
    for saved in (state, without_head, without_head | head):
        report = assert_loaded(model, heads, saved)
        assert report.lines() == ["50 of the backbone's 50 tensors from the file; the output layer is new"]


def test_a_missing_or_mismatched_tensor_is_an_error_unless_it_is_allowed(state: State) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    saved = dict(state)
    del saved["features.0.weight"]
    saved["features.0.bias"] = torch.zeros(65)
    saved["features.3.squeeze.bias"] = torch.zeros(16, dtype=torch.int64)
    saved |= {"evil\n\x1b[31m": torch.zeros(1)} | {f"extra.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(UserError) as error:
        load(model, heads, saved, name="squeezenet1_1")
    assert str(error.value) == (
        "the file does not fit squeezenet1_1: 3 of the backbone's 50 tensors differ.\n"
        "  1 missing: features.0.weight\n"
        "  2 of another shape or dtype: features.0.bias [65], expected [64], "
        "features.3.squeeze.bias torch.int64, expected torch.float32\n"
        "  --model.allow_partial_weights true leaves these tensors random."
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    report = load(model, heads, saved, partial=True)
    assert report.lines() == [
        "47 of the backbone's 50 tensors from the file; the output layer is new",
        "1 NOT IN THE FILE, left random: features.0.weight",
        "2 OF ANOTHER SHAPE OR DTYPE, left random: features.0.bias [65], expected [64], "
        "features.3.squeeze.bias torch.int64, expected torch.float32",
        r"13 in the file but not in the model, ignored: evil\n\x1b[31m, "
        "extra.0, extra.1, extra.2, extra.3, extra.4, extra.5, extra.6, extra.7, extra.8 and 3 more",
    ]
    after = model.state_dict()
    for key in ("features.0.weight", "features.0.bias", "features.3.squeeze.bias"):
        assert torch.equal(after[key], before[key])
    assert torch.equal(after["features.3.squeeze.weight"], state["features.3.squeeze.weight"])


@pytest.mark.parametrize(
    ("saved", "name", "message"),
    [
        ("resnet50", "resnet18", "23 of the backbone's 120 tensors differ.*contains a resnet50: set model.name"),
        ("resnet18", "resnet50", "missing: .*The file contains a resnet18: set model.name to resnet18"),
        ("resnet34", "resnet18", "contains a resnet34, not a resnet18: 96 of its tensors would be ignored"),
        ("squeezenet1_0", "squeezenet1_1", "of another shape.*The file contains a squeezenet1_0"),
        ("vgg11", "resnet18", "no tensor in file .* fits resnet18.*it contains: features.0.*contains a vgg11"),
    ],
)
def test_weights_of_another_architecture_are_refused_before_they_are_read(
    saved: str, name: str, message: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        shapes = models.get_model(saved, num_classes=7).state_dict()
    path = tmp_path / "weights.pth"
    torch.save({key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in shapes.items()}, path)
    for run in (
        lambda: check_weights(name, image_size=64, weights=str(path)),
        lambda: build_model(name, image_size=64, num_classes=2, weights=str(path), head_init="xavier"),
    ):
        with pytest.raises(UserError, match=f"(?s){message}"):
            run()
    if not message.startswith("no tensor"):
        check_weights(name, image_size=64, weights=str(path), allow_partial_weights=True)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "it contains: conv1.weight\n  net has: features.0.weight, "),
        ({"features.0.weight": torch.zeros(1)}, "shape or dtype: features.0.weight [1], expected [64, 3, 3, 3]"),
        ({"classifier.1.weight": torch.zeros(5, 512, 1, 1)}, "it contains: classifier.1.weight\n"),
    ],
)
def test_a_file_without_a_fitting_tensor_is_an_error(saved: State, message: str) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    for partial in (False, True):
        with pytest.raises(UserError) as error:
            load(model, heads, saved, partial=partial)
        assert str(error.value).startswith("no tensor in the file fits net.\n")
        assert str(error.value).endswith("Is model.name the architecture that the file was saved from?")
        assert message in str(error.value)


def test_batch_counters_are_optional_and_not_enough() -> None:
    model, heads = with_new_head(models.shufflenet_v2_x0_5())
    state = models.shufflenet_v2_x0_5().state_dict()
    counters = {key: tensor for key, tensor in state.items() if key.endswith("num_batches_tracked")}
    with pytest.raises(UserError, match="no tensor in the file fits"):
        load(model, heads, counters)
    # torchvision's older files have no counters.
    report = assert_loaded(model, heads, {key: tensor for key, tensor in state.items() if key not in counters})
    assert assert_loaded(model, heads, state).copied == report.copied + len(counters)


def test_densenets_old_keys_are_renamed() -> None:
    state = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): tensor for key, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    model, heads = with_new_head(models.densenet121())
    assert_loaded(model, heads, select_state(old, list(state), key="auto", path="").tensors)
    after = model.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state if not key.startswith("classifier"))


def small_vit(size: int) -> VisionTransformer:
    return VisionTransformer(
        image_size=size, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=10
    )


@pytest.mark.parametrize("size", [16, 32, 48])
def test_position_embeddings_are_interpolated_by_torchvisions_function(size: int) -> None:
    state = small_vit(32).state_dict()
    model, heads = with_new_head(small_vit(size), size=size)
    report = load(model, heads, state, size=size)
    assert report.missing == report.mismatched == report.unexpected == ()
    expected = state["encoder.pos_embedding"]
    if size != 32:
        expected = interpolate_embeddings(size, 8, OrderedDict(state))["encoder.pos_embedding"]
    assert expected.shape == (1, 1 + (size // 8) ** 2, 16)
    assert torch.equal(model.state_dict()["encoder.pos_embedding"], expected)
    line = f"position embedding interpolated from 4 x 4 to {size // 8} x {size // 8} patches"
    assert report.lines()[1:] == ([line] if size != 32 else [])


def test_position_embeddings_that_cannot_be_interpolated_are_an_error() -> None:
    model, heads = with_new_head(small_vit(48), size=48)
    for shape in ((1, 7, 16), (1, 1, 16), (17, 16), (2, 17, 16), ()):
        message = (
            f"the file: its position embedding {list(shape)} cannot be interpolated to [1, 37, 16], which images of "
            "48 px need: expected [1, 1 + n x n patches, 16]"
        )
        with pytest.raises(UserError, match=re.escape(message)):
            load(model, heads, {**small_vit(32).state_dict(), "encoder.pos_embedding": torch.zeros(shape)}, size=48)
    with pytest.raises(UserError, match=r"encoder.pos_embedding \[1, 17, 8\], expected \[1, 37, 16\]"):
        load(model, heads, {**small_vit(32).state_dict(), "encoder.pos_embedding": torch.zeros(1, 17, 8)}, size=48)


def test_positions_in_half_precision_are_interpolated() -> None:
    model, heads = with_new_head(small_vit(48), size=48)
    report = load(model, heads, {key: tensor.half() for key, tensor in small_vit(32).state_dict().items()}, size=48)
    assert (report.missing, report.mismatched) == ((), ())
    assert report.interpolated


@pytest.mark.parametrize(
    ("name", "size", "options"), [("swin_t", 96, {}), ("maxvit_t", 448, {"input_size": (448, 448)})]
)
def test_window_models_load_weights_of_another_image_size(name: str, size: int, options: dict[str, Any]) -> None:
    model, heads = with_new_head(models.get_model(name, weights=None, **options), size=size)
    assert_loaded(model, heads, models.get_model(name, weights=None).state_dict(), size=size)


@pytest.mark.shared
def test_the_shared_imagenet_weights_are_loaded(shared: Path) -> None:
    path = shared / "weights" / "squeezenet1_1-imagenet1k-fp16.safetensors"
    saved = load_file(path)
    assert torch.float16 in {tensor.dtype for tensor in saved.values()}
    loaded = read_weights("squeezenet1_1", str(path), list(saved)).tensors
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in saved.items())
    assert_loaded(*with_new_head(models.squeezenet1_1(), classes=2), loaded)

import pytest
import torch
from torchvision import models

from trainer.errors import UserError
from trainer.model import build as build_module
from trainer.model.architectures import architectures, check_architecture
from trainer.model.build import build, preset

# From torchvision's documentation: image size, resize size, interpolation.
PUBLISHED = {
    ("resnet18", "DEFAULT"): (224, 256, "bilinear"),
    ("resnet50", "IMAGENET1K_V1"): (224, 256, "bilinear"),
    ("resnet50", "ResNet50_Weights.IMAGENET1K_V2"): (224, 232, "bilinear"),
    ("efficientnet_b0", "DEFAULT"): (224, 256, "bicubic"),
    ("inception_v3", None): (299, 342, "bilinear"),
    ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"): (384, 384, "bicubic"),
    ("vit_h_14", "folder/mine.pth"): (518, 518, "bicubic"),
}


def test_architectures_are_torchvisions_classification_models() -> None:
    names = architectures()
    assert len(names) >= 80
    assert names == sorted(set(names))
    assert {"alexnet", "googlenet", "inception_v3", "maxvit_t", "squeezenet1_1", "swin_v2_b", "vit_h_14"} <= {*names}
    others = {"deeplabv3_resnet50", "mvit_v2_s", "quantized_resnet18", "raft_large"}
    assert others <= set(models.list_models())
    assert not others & set(names)


def test_an_unknown_architecture_is_an_error_with_suggestions() -> None:
    check_architecture("resnet18")
    message = r"there is no model 'ResNet_18'. Did you mean .*resnet18.*The models are:"
    with pytest.raises(UserError, match=message) as error:
        check_architecture("ResNet_18")
    assert all(name in str(error.value) for name in architectures())
    with pytest.raises(UserError, match=r"there is no model 'r3d_18'"):
        build("r3d_18", image_size=64)


def test_presets_equal_the_published_transforms() -> None:
    for name in architectures():
        for entry in models.get_model_weights(name):
            found, transforms = preset(name, entry.name), entry.transforms()
            assert [found.image_size] == transforms.crop_size
            assert [found.resize_size] == transforms.resize_size
            assert found.interpolation == transforms.interpolation.value
            assert (list(found.mean), list(found.std)) == (transforms.mean, transforms.std)
        default = preset(name, "DEFAULT")
        assert preset(name, None) == preset(name, "folder/file.safetensors") == preset(name, "file.pth") == default
    for (name, weights), expected in PUBLISHED.items():
        found = preset(name, weights)
        assert (found.image_size, found.resize_size, found.interpolation) == expected


def test_the_random_weights_are_torchvisions() -> None:
    build_module._why_unsuitable.cache_clear()
    states = []
    for _ in range(2):  # the second call finds the result of the trial forward in the cache
        torch.manual_seed(3)
        states.append((build("shufflenet_v2_x0_5", image_size=64).state_dict(), torch.rand(1)))
    torch.manual_seed(3)
    expected, expected_next = models.shufflenet_v2_x0_5(weights=None).state_dict(), torch.rand(1)
    for state, next_number in states:
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert torch.equal(next_number, expected_next)
    assert build("resnet18", image_size=32, num_classes=3).fc.out_features == 3


def test_checking_an_image_size_does_not_change_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    construct = build_module._construct

    def construct_with_random_numbers(*args: object) -> object:
        torch.rand(3)  # some layers draw before they register their parameters
        return construct(*args)  # type: ignore[arg-type]

    build_module._why_unsuitable.cache_clear()
    monkeypatch.setattr(build_module, "_construct", construct_with_random_numbers)
    before = torch.get_rng_state()
    build("squeezenet1_1", image_size=32, empty=True)
    with pytest.raises(UserError):
        build("squeezenet1_1", image_size=16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 63), ("convnext_tiny", 32), ("densenet121", 29), ("googlenet", 15), ("inception_v3", 75),
        ("resnet18", 1), ("squeezenet1_0", 21), ("squeezenet1_1", 17), ("vgg11", 32),
    ],
)  # fmt: skip
def test_the_smallest_image_size_is_torchvisions(name: str, size: int) -> None:
    assert models.get_model_weights(name).DEFAULT.meta["min_size"] == (size, size)
    build(name, image_size=size, empty=True)
    if size > 1:
        with pytest.raises(UserError, match=rf"^{name} cannot be trained on images of {size - 1} x") as error:
            build(name, image_size=size - 1, empty=True)
        assert f"Set data.image_size to {-(-size // 32) * 32};" in str(error.value)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_b_16", 100, "its patches are 16 x 16 px, and the image size must be a multiple of 16. "
                          "Set data.image_size to 96 or 112; its published weights take 224"),
        ("vit_h_14", 5, "Set data.image_size to 14; its published weights take 518"),
        ("maxvit_t", 256, "is not divisible by partition size 7"),
        ("maxvit_t", 300, "Set data.image_size to 224 or 448;"),
        ("resnet18", 0, "expected 1 to 8192 px. Set data.image_size to 32;"),
        ("resnet18", 10**12, "expected 1 to 8192 px"),
        ("vit_b_16", 10**9, "its published weights take 224"),
    ],
)  # fmt: skip
def test_an_unsuitable_image_size_is_an_error_with_suitable_ones(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        build(name, image_size=size)
    assert str(error.value).startswith(f"{name} cannot be trained on images of {size} x {size} px: ")
    assert message in str(error.value)


def test_inception_has_an_auxiliary_head_for_large_images_only() -> None:
    assert build("inception_v3", image_size=299, empty=True).AuxLogits is not None
    assert build("inception_v3", image_size=298, empty=True).AuxLogits is None
    for name in ("inception_v3", "googlenet"):
        assert build(name, image_size=299, empty=True).transform_input, "as its published weights"


@pytest.mark.parametrize("name", ["resnet18", "swin_v2_t", "vit_b_32", "regnet_y_400mf", "maxvit_t"])
def test_an_empty_model_has_no_weights_but_its_constants(name: str) -> None:
    before = torch.get_rng_state()
    empty = build(name, image_size=224, empty=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.training
    full = models.get_model(name, weights=None)
    shapes = [{key: tensor.shape for key, tensor in m.state_dict().items()} for m in (empty, full)]
    assert shapes[0] == shapes[1]
    buffers = dict(full.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in empty.named_buffers())

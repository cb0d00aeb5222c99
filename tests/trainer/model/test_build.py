import time

import pytest
import torch
from torchvision import models

from trainer.errors import UserError
from trainer.model import build as build_module
from trainer.model.architectures import architectures, check_architecture
from trainer.model.build import build, preset

# What torchvision's own pages say: side, resize, interpolation.
PUBLISHED = {
    ("resnet18", "DEFAULT"): (224, 256, "bilinear"),
    ("resnet50", "IMAGENET1K_V1"): (224, 256, "bilinear"),
    ("resnet50", "IMAGENET1K_V2"): (224, 232, "bilinear"),
    ("resnet50", "ResNet50_Weights.IMAGENET1K_V2"): (224, 232, "bilinear"),
    ("efficientnet_b0", "DEFAULT"): (224, 256, "bicubic"),
    ("inception_v3", None): (299, 342, "bilinear"),
    ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"): (384, 384, "bicubic"),
    ("vit_h_14", "/anywhere/mine.pth"): (518, 518, "bicubic"),
    ("swin_v2_t", "DEFAULT"): (256, 260, "bicubic"),
}


def test_all_of_torchvisions_classification_models_and_nothing_else() -> None:
    known = architectures()
    assert len(known) >= 80
    assert known == sorted(set(known))
    assert {
        "alexnet",
        "googlenet",
        "inception_v3",
        "maxvit_t",
        "squeezenet1_1",
        "swin_v2_b",
        "vit_h_14",
    } <= set(known)
    others = {
        "deeplabv3_resnet50", "fasterrcnn_resnet50_fpn", "mvit_v2_s", "quantized_resnet18", "raft_large",
        "r3d_18",
    }  # fmt: skip
    assert others <= set(models.list_models())
    assert not others & set(known)


def test_an_unknown_model_lists_the_known_ones_and_what_was_meant() -> None:
    check_architecture("resnet18")
    with pytest.raises(
        UserError, match=r"there is no model 'ResNet_18'. Did you mean .*resnet18.*The models are:"
    ) as info:
        check_architecture("ResNet_18")
    assert all(name in str(info.value) for name in architectures())
    with pytest.raises(UserError, match=r"there is no model 'r3d_18'"):
        build("r3d_18", image_size=64)


@pytest.mark.parametrize("name", architectures())
def test_the_preset_is_that_of_the_published_transforms(name: str) -> None:
    entries = models.get_model_weights(name)
    assert len(entries) >= 1
    for entry in entries:
        found, transforms = preset(name, entry.name), entry.transforms()
        assert [found.image_size] == transforms.crop_size
        assert [found.resize_size] == transforms.resize_size
        assert found.interpolation == transforms.interpolation.value
        assert (list(found.mean), list(found.std)) == (transforms.mean, transforms.std)
    usual = preset(name, "DEFAULT")
    assert preset(name, None) == preset(name, "some/file.safetensors") == preset(name, "file.pth") == usual


@pytest.mark.parametrize(("name", "weights"), PUBLISHED)
def test_presets_by_hand(name: str, weights: str | None) -> None:
    found = preset(name, weights)
    assert (found.image_size, found.resize_size, found.interpolation) == PUBLISHED[name, weights]


def test_a_model_is_torchvisions_own_whatever_was_tried_before() -> None:
    build_module._misfit.cache_clear()
    states = []
    for _ in range(2):  # the second time the trial is remembered, and draws nothing
        torch.manual_seed(3)
        states.append((build("shufflenet_v2_x0_5", image_size=64).state_dict(), torch.rand(1)))
    torch.manual_seed(3)
    states.append((models.shufflenet_v2_x0_5(weights=None).state_dict(), torch.rand(1)))
    (first, first_draw), *others = states
    for state, draw in others:
        assert list(state) == list(first)
        assert all(torch.equal(state[key], first[key]) for key in first)
        assert torch.equal(draw, first_draw)
    assert build("resnet18", image_size=32, num_classes=3).fc.out_features == 3


def test_trying_a_size_leaves_random_numbers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    construct = build_module._construct

    def drawing(*args: object) -> object:
        torch.rand(3)  # as layers may that draw before they are registered
        return construct(*args)  # type: ignore[arg-type]

    build_module._misfit.cache_clear()
    monkeypatch.setattr(build_module, "_construct", drawing)
    before = torch.get_rng_state()
    assert build_module._misfit("squeezenet1_1", 32) is None
    assert build_module._misfit("squeezenet1_1", 16) is not None
    build("squeezenet1_1", image_size=32, empty=True)
    assert torch.equal(torch.get_rng_state(), before)


# The smallest picture of each design, as torchvision publishes it (meta["min_size"]) and as a forward shows.
SMALLEST = {
    "alexnet": 63, "convnext_tiny": 32, "densenet121": 29, "googlenet": 15, "inception_v3": 75, "resnet18": 1,
    "squeezenet1_0": 21, "squeezenet1_1": 17, "vgg11": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_image_is_found_without_memory(name: str) -> None:
    smallest = SMALLEST[name]
    assert models.get_model_weights(name).DEFAULT.meta["min_size"] == (smallest, smallest)
    build(name, image_size=smallest, empty=True)
    if smallest > 1:
        with pytest.raises(
            UserError, match=rf"^{name} cannot be trained on images of {smallest - 1} x"
        ) as info:
            build(name, image_size=smallest - 1, empty=True)
        above = -(-smallest // 32) * 32
        assert f"data.image_size {above} would do" in str(info.value)


@pytest.mark.parametrize(
    ("name", "smallest"), [("squeezenet1_1", 17), ("googlenet", 15), ("shufflenet_v2_x0_5", 1)]
)
def test_what_is_said_to_fit_does_and_what_is_not_does_not(name: str, smallest: int) -> None:
    model = build(name, image_size=smallest)
    model(torch.randn(2, 3, smallest, smallest))
    if smallest > 1:
        with pytest.raises(RuntimeError, match="Output size is too small"):
            model(torch.randn(2, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_b_16", 100, "its patches are 16 x 16 px, and the side must be a multiple of that. "
                          "data.image_size 96 or 112 would do; its published weights take 224"),
        ("vit_h_14", 5, "data.image_size 14 would do; its published weights take 518"),
        ("maxvit_t", 256, "is not divisible by partition size 7"),
        ("maxvit_t", 300, "data.image_size 224 or 448 would do"),
        ("resnet18", 0, "a side has 1 to 8192 pixels. data.image_size 32 would do"),
        ("resnet18", -3, "a side has 1 to 8192 pixels"),
        ("resnet18", 10**12, "a side has 1 to 8192 pixels"),
        ("vit_b_16", 10**9, "its published weights take 224"),
    ],
)  # fmt: skip
def test_an_impossible_image_size_names_one_that_would_do(name: str, size: int, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as info:
        build(name, image_size=size)
    assert str(info.value).startswith(f"{name} cannot be trained on images of {size} x {size} px: ")
    assert words in str(info.value)
    assert time.monotonic() - began < 20


def test_inception_has_its_auxiliary_head_where_the_images_are_large_enough_for_it() -> None:
    assert build("inception_v3", image_size=299, empty=True).AuxLogits is not None
    small = build("inception_v3", image_size=298, empty=True)
    assert small.AuxLogits is None
    for name in ("inception_v3", "googlenet"):  # both as their published weights were trained
        assert build(name, image_size=299, empty=True).transform_input


@pytest.mark.parametrize("name", ["resnet18", "swin_v2_t", "vit_b_32", "regnet_y_400mf", "maxvit_t"])
def test_an_empty_model_draws_nothing_and_has_its_constants(name: str) -> None:
    before = torch.get_rng_state()
    empty = build(name, image_size=224, empty=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.training
    full = models.get_model(name, weights=None)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }
    buffers = dict(full.named_buffers())
    for key, buffer in empty.named_buffers():
        assert torch.equal(buffer, buffers[key])

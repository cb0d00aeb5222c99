from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from trainer.model.batch_norm import freeze_batch_norm
from trainer.model.gradient_checkpointing import enable_gradient_checkpointing
from trainer.model.head import split_outputs
from trainer.transfer.frozen_prefix import split_at, split_frozen

# Name, output layer, first layer after the frozen ones in training and in evaluation. Dropout and stochastic depth of
# frozen layers are active in training.
FAMILIES = [
    ("alexnet", "classifier.6", "classifier.0", "classifier.6"),
    ("convnext_tiny", "classifier.2", "features.1.1", "classifier.2"),
    ("densenet121", "classifier", "classifier", "classifier"),
    ("efficientnet_b0", "classifier.1", "features.2.1.block.0.0", "classifier.1"),
    ("googlenet", "fc", "aux1.conv.conv", "fc"),
    ("inception_v3", "fc", "AuxLogits.conv0.conv", "fc"),
    ("maxvit_t", "classifier.5", "blocks.0.layers.1.layers.MBconv.proj", "classifier.5"),
    ("mnasnet0_5", "classifier.1", "classifier.0", "classifier.1"),
    ("mobilenet_v2", "classifier.1", "classifier.0", "classifier.1"),
    ("mobilenet_v3_small", "classifier.3", "classifier.2", "classifier.3"),
    ("regnet_y_400mf", "fc", "fc", "fc"),
    ("resnet18", "fc", "fc", "fc"),
    ("shufflenet_v2_x0_5", "fc", "fc", "fc"),
    ("squeezenet1_1", "classifier.1", "classifier.0", "classifier.1"),
    ("swin_t", "head", "features.1.1.norm1", "head"),
    ("swin_v2_t", "head", "features.1.1.attn", "head"),
    ("vgg11", "classifier.6", "classifier.2", "classifier.6"),
    ("vit_b_16", "heads.head", "heads.head", "heads.head"),
]


def make_model(name: str, trained: str) -> nn.Module:
    """Return a model of which one module trains, without values where torch allows it."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with nullcontext() if "regnet" in name else torch.device("meta"):
        model = models.get_model(name, **options)
    freeze(model, trained)
    return model


def ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters()}


def freeze(model: nn.Module, trained: str) -> None:
    model.requires_grad_(False)
    freeze_batch_norm(model)
    model.get_submodule(trained).requires_grad_(True)


@pytest.mark.parametrize(("name", "head", "in_training", "in_evaluation"), FAMILIES)
def test_every_family_is_split_where_its_output_layer_trains(
    name: str, head: str, in_training: str, in_evaluation: str
) -> None:
    model = make_model(name, head)
    for training, layer in ((True, in_training), (False, in_evaluation)):
        split = split_frozen(model, training=training)
        assert split is not None
        assert split.layer == layer
        assert not any(parameter.requires_grad for parameter in split.prefix.parameters())
        assert ids(split.prefix) | ids(split.rest) <= ids(model)
        assert ids(model.get_submodule(head)) <= ids(split.rest)


class Vit(models.VisionTransformer):
    def __init__(self) -> None:
        super().__init__(image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16)


SMALL = [
    (models.resnet18, "layer4", "layer4.0.conv1"),
    (models.densenet121, "features.denseblock4", "features.denseblock4.denselayer1.norm1"),
    (models.squeezenet1_1, "features.12", "features.12.squeeze"),
    (models.mobilenet_v3_small, "features.12", "features.12.0"),
    (models.shufflenet_v2_x0_5, "stage4", "stage4.0.branch1.0"),
    (Vit, "encoder.layers.encoder_layer_2", "encoder.layers.encoder_layer_2.ln_1"),
]


@pytest.mark.parametrize(("make", "trained", "layer"), SMALL, ids=[name for _, name, _ in SMALL])
@pytest.mark.parametrize("training", [True, False])
def test_both_parts_together_are_the_model(make: type[nn.Module], trained: str, layer: str, training: bool) -> None:
    torch.manual_seed(0)
    model = make().train(training)
    freeze(model, trained)
    images = torch.randn(3, 3, 16 if make is Vit else 48, 16 if make is Vit else 48)
    split = split_frozen(model, training=training)
    assert split is not None
    assert split.layer == layer

    def run(forward: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(1)  # of dropout
        logits, _ = split_outputs(forward(inputs))
        model.zero_grad()
        logits.square().sum().backward()
        return logits, [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    expected, gradients = run(model, images)
    actual, actual_gradients = run(split.rest, split.prefix(images))
    assert torch.equal(actual, expected)
    for gradient, other in zip(gradients, actual_gradients, strict=True):
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other)


def test_a_copy_of_a_model_is_split_at_the_same_place() -> None:
    model, other = models.resnet18(), models.resnet18()
    freeze(model, "layer3")
    split = split_frozen(model, training=False)
    assert split is not None
    copied = split_at(other, split.node, training=False)
    assert copied.layer == split.layer == "layer3.0.conv1"
    assert ids(copied.prefix) | ids(copied.rest) == ids(other)


class Layers(nn.Sequential):
    """Convolution, another layer, convolution, output layer."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))


class DropoutFunction(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(images, 0.5, self.training)


class Attribute(nn.Module):
    def __init__(self, *, trains: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=trains)

    def forward(self, images: Tensor) -> Tensor:
        return images * (2 * self.scale)


@pytest.mark.parametrize(
    ("middle", "is_frozen"),
    [
        (nn.Dropout(0.5), {True: False, False: True}),
        (nn.Dropout(0.0), {True: True, False: True}),
        (DropoutFunction(), {True: False, False: True}),
        (nn.BatchNorm2d(4), {True: False, False: False}),
        (nn.BatchNorm2d(4, track_running_stats=False), {True: False, False: False}),
        (nn.InstanceNorm2d(4), {True: True, False: True}),
        (nn.RReLU(), {True: False, False: True}),
        (Attribute(trains=True), {True: False, False: False}),
        (Attribute(trains=False), {True: True, False: True}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_may_change_ends_the_frozen_layers(middle: nn.Module, is_frozen: dict[bool, bool]) -> None:
    model = Layers(middle)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("4.") or (name == "1.scale" and parameter.requires_grad))
    for training, expected in is_frozen.items():
        split = split_frozen(model, training=training)
        assert split is not None
        # A function is no layer: the next one is named.
        assert split.layer == ("4" if expected else "2" if isinstance(middle, DropoutFunction) else "1")


@pytest.mark.parametrize("first", ["0", "", "4"])
def test_a_model_whose_first_layer_trains_is_not_split(first: str) -> None:
    model = Layers(nn.Identity())
    model.requires_grad_(False)
    model.get_submodule(first).requires_grad_(True)
    assert (split_frozen(model, training=True) is None) == (first != "4")


def test_a_frozen_layer_saves_nothing_for_the_backward_pass() -> None:
    """The first tensors that autograd saves are those of the first layer that trains."""
    model = models.resnet18().train()
    freeze(model, "layer4")
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(torch.randn(2, 3, 64, 64))
    assert (2, 256, 4, 4) in saved, "the input of layer4"
    assert not {(2, channels, size, size) for channels, size in ((3, 64), (64, 32), (64, 16), (128, 8))}.intersection(
        saved
    )
    nodes: list[Any] = [logits.grad_fn]
    for node in nodes:
        nodes += [following for following, _ in node.next_functions if following and following not in nodes]
    leaves = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    assert leaves == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_checkpointed_block_that_trains_stays_one_module() -> None:
    """Gradient checkpointing replaces the forward of blocks, the frozen ones too."""
    model = models.resnet18().train()
    freeze(model, "layer4")
    enable_gradient_checkpointing(model, ["layer1", "layer2", "layer3", "layer4"], ["fc"])
    split = split_frozen(model, training=True)
    assert split is not None
    assert split.layer == "layer4.0"
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(split.rest(split.prefix(images)), model(images))
    assert split.rest.get_submodule("layer4.0") is model.layer4[0]

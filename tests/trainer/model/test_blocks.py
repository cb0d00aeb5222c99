import re

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from trainer.errors import UserError
from trainer.model.blocks import LayerOrder, analyze_blocks, execution_order, trainable_parameters
from trainer.model.build import build

RESNET = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, LayerOrder]:
    model = models.resnet18()
    return model, analyze_blocks(model, 64)


class Reversed(nn.Module):
    """Calls its modules in another order than it registers them; `early` is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.late = nn.Linear(4, 4)
        self.early = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.late(self.early(images).mean((2, 3)) * self.scale))
        return logits


def test_the_execution_order_is_that_of_the_forward_pass() -> None:
    order = execution_order(Reversed(), 8)
    assert sorted((position, name) for name, position in order.items()) == [
        (0, "scale"), (1, "early.bias"), (1, "early.weight"), (2, "late.bias"), (2, "late.weight"),
        (3, "head.bias"), (3, "head.weight"),
    ]  # fmt: skip
    assert [block.name for block in analyze_blocks(Reversed(), 8).blocks] == ["early", "late", "head"]


BLOCKS = {
    "resnet18": RESNET,
    "squeezenet1_1": [*(f"features.{i}" for i in (0, 3, 4, 6, 7, 9, 10, 11, 12)), "classifier"],
    "convnext_tiny": [*(f"features.{i}" for i in range(8)), "classifier"],
    "vit_b_32": ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "heads"],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_the_expected_names(name: str) -> None:
    model = build(name, image_size=64, empty=True)
    assert [block.name for block in analyze_blocks(model, 64).blocks] == BLOCKS[name]


def test_norms_belong_to_the_block_before(resnet: tuple[nn.Module, LayerOrder]) -> None:
    assert resnet[1].blocks[0].parameters == ("conv1.weight", "bn1.weight", "bn1.bias")
    assert resnet[1].depth["bn1.weight"] == 5
    assert resnet[1].depth["fc.weight"] == 0


SELECTIONS = {
    "all": RESNET,
    "head": ["fc"],
    "from:layer3": ["layer3", "layer4", "fc"],
    "last:2": ["layer4", "fc"],
    "last:6": RESNET,
    "layer1": ["layer1", "fc"],
    "layer1, layer4.*": ["layer1", "layer4", "fc"],
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_of_blocks(selection: str, resnet: tuple[nn.Module, LayerOrder]) -> None:
    model, layer_order = resnet
    blocks = [block for block in layer_order.blocks if block.name in SELECTIONS[selection]]
    expected = {name for block in blocks for name in block.parameters}
    assert trainable_parameters(selection, model, ["fc"], layer_order) == expected


def test_a_selection_of_patterns_and_inner_modules(resnet: tuple[nn.Module, LayerOrder]) -> None:
    model, layer_order = resnet
    head = {"fc.weight", "fc.bias"}
    biases = {name for name in layer_order.order if name.endswith(".bias")}
    assert trainable_parameters("*.bias", model, ["fc"], layer_order) == biases | head
    inner = trainable_parameters("from:layer4.1.conv2", model, ["fc"], layer_order)
    assert inner == {"layer4.1.conv2.weight", "layer4.1.bn2.weight", "layer4.1.bn2.bias"} | head


WRONG = {
    "from:layer5": "no module 'layer5' with parameters. Did you mean layer4 or",
    "from:": "no module '' with parameters",
    "from:relu": "no module 'relu'",
    "last:0": "expected last:1 to last:6; the blocks of this model are conv1, layer1",
    "last:7": "expected last:1 to last:6",
    "last:two": "expected last:1 to last:6",
    "lastly": "'lastly' matches no parameter of this model, such as conv1.weight, bn1.weight",
    "layer1, layre2": "'layre2' matches no parameter",
    "layer1,": "'' matches no parameter",
}


@pytest.mark.parametrize("selection", WRONG)
def test_a_wrong_selection_is_an_error_with_alternatives(selection: str, resnet: tuple[nn.Module, LayerOrder]) -> None:
    model, layer_order = resnet
    with pytest.raises(UserError, match=re.escape(WRONG[selection])) as error:
        trainable_parameters(selection, model, ["fc"], layer_order)
    assert f"transfer.trainable is '{selection}'" in str(error.value)

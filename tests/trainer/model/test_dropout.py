from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from trainer.errors import UserError
from trainer.model.create import build_model
from trainer.model.dropout import set_dropout, set_stochastic_depth

# Model -> torchvision's arguments that set its dropout.
WITH_DROPOUT = {
    "alexnet": ["dropout"],
    "densenet121": ["drop_rate"],
    "efficientnet_b0": ["dropout"],
    "googlenet": ["dropout"],
    "inception_v3": ["dropout"],
    "maxvit_t": ["attention_dropout", "mlp_dropout"],
    "mnasnet0_5": ["dropout"],
    "mobilenet_v2": ["dropout"],
    "mobilenet_v3_small": ["dropout"],
    "squeezenet1_1": ["dropout"],
    "swin_t": ["dropout"],
    "swin_v2_t": ["dropout"],
    "vgg11": ["dropout"],
    "vit_b_32": ["dropout"],
}


def make_empty(name: str, **settings: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": True, "init_weights": False}
    with init_empty_weights():
        return models.get_model(name, weights=None, **settings)


def probabilities(model: nn.Module) -> list[tuple[str, str, float]]:
    """Return (layer, attribute, value) of every probability."""
    return [
        (name, key, round(float(getattr(module, key)), 9))
        for name, module in model.named_modules()
        for key in ("p", "dropout", "drop_rate", "attention_dropout")
        if name
        and isinstance(getattr(module, key, None), float)  # not of the model itself, which does not use it
    ]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_equals_that_of_torchvisions_argument(name: str) -> None:
    model = make_empty(name)
    line = set_dropout(model, name, 0.3)
    expected = make_empty(name, **dict.fromkeys(WITH_DROPOUT[name], 0.3))
    assert probabilities(model) == probabilities(expected) != probabilities(make_empty(name))
    assert line.startswith("dropout 0.3 in ")


def test_stochastic_depth_equals_that_of_torchvisions_argument() -> None:
    model = make_empty("convnext_tiny")
    line = set_stochastic_depth(model, "convnext_tiny", 0.5)
    expected = make_empty("convnext_tiny", stochastic_depth_prob=0.5)
    assert probabilities(model) == probabilities(expected) != probabilities(make_empty("convnext_tiny"))
    assert line == "stochastic depth from 0 to 0.5 in 18 layers"


@pytest.mark.parametrize("name", ["swin_t", "maxvit_t"])
def test_stochastic_depth_grows_linearly_with_the_depth(name: str) -> None:
    model = make_empty(name)
    set_stochastic_depth(model, name, 0.5)
    values = [layer.p for layer in model.modules() if isinstance(layer, StochasticDepth)]
    blocks = sorted(set(values))
    assert values == sorted(values)
    assert len(blocks) == {"swin_t": 12, "maxvit_t": 11}[name]
    assert blocks == pytest.approx([0.5 * i / (len(blocks) - 1) for i in range(len(blocks))])


def test_unused_stochastic_depth_of_efficientnet_is_ignored() -> None:
    model = make_empty("efficientnet_b0")
    set_stochastic_depth(model, "efficientnet_b0", 0.9)
    used = [
        block.stochastic_depth.p
        for block in model.modules()
        if getattr(block, "use_res_connect", False) and block.stochastic_depth.p
    ]
    assert used == sorted(used)
    assert used[-1] == pytest.approx(0.9)


def test_a_model_without_dropout_or_stochastic_depth_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model.dropout is 0.1, but resnet18 has no dropout layers"):
        set_dropout(make_empty("resnet18"), "resnet18", 0.1)
    for name in ("resnet18", "vgg11"):
        with pytest.raises(
            UserError, match=f"model.stochastic_depth is 0, but {name} has no stochastic depth"
        ):
            set_stochastic_depth(make_empty(name), name, 0)


@pytest.mark.slow
def test_dropout_and_stochastic_depth_are_applied_in_training_only() -> None:
    torch.manual_seed(5)
    built = build_model(
        "efficientnet_b0",
        image_size=32,
        num_classes=3,
        weights=None,
        head_init="xavier",
        dropout=0.6,
        stochastic_depth=0.3,
    )
    model = built.model.train()
    assert built.summary[1:] == (
        "dropout 0.6 in 1 layers",
        "stochastic depth from 0.0429 to 0.3 in 9 layers",
    )
    layers = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    last = max((m for m in layers if m.p <= 0.3), key=lambda m: m.p)
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[module] = (before.pop(module), output.clone())

    before: dict[nn.Module, Tensor] = {}
    for layer in (last, dropout):
        # Dropout may work in place.
        layer.register_forward_pre_hook(lambda m, args: before.__setitem__(m, args[0].clone()))
        layer.register_forward_hook(record)
    images = torch.randn(200, 3, 32, 32)
    with torch.no_grad():
        model(images)
        inputs, outputs = seen[last]
        skipped = (outputs.flatten(1) == 0).all(1)
        assert skipped.float().mean().item() == pytest.approx(0.3, abs=0.13)  # 4 standard deviations
        torch.testing.assert_close(outputs[~skipped], inputs[~skipped] / 0.7)
        inputs, outputs = seen[dropout]
        kept = outputs != 0
        assert kept.float().mean().item() == pytest.approx(0.4, abs=0.01)
        torch.testing.assert_close(outputs[kept], inputs[kept] / 0.4)
        model.eval()(images[:4])
        for layer in (last, dropout):
            assert torch.equal(*seen[layer])

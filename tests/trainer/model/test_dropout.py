from typing import Any

import pytest
from accelerate import init_empty_weights
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from trainer.errors import UserError
from trainer.model.dropout import set_dropout, set_stochastic_depth

# Model -> torchvision's arguments that set its dropout.
WITH_DROPOUT = {
    "densenet121": ["drop_rate"],
    "googlenet": ["dropout"],
    "inception_v3": ["dropout"],
    "maxvit_t": ["attention_dropout", "mlp_dropout"],
    "squeezenet1_1": ["dropout"],
    "swin_t": ["dropout"],
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
        if name and isinstance(getattr(module, key, None), float)  # not of the model itself, which does not use it
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
    for name, count in (("swin_t", 12), ("maxvit_t", 11)):  # it grows linearly with the depth
        model = make_empty(name)
        set_stochastic_depth(model, name, 0.5)
        values = [layer.p for layer in model.modules() if isinstance(layer, StochasticDepth)]
        assert values == sorted(values)
        assert sorted(set(values)) == pytest.approx([0.5 * i / (count - 1) for i in range(count)])


def test_unused_stochastic_depth_of_efficientnet_is_ignored() -> None:
    model = make_empty("efficientnet_b0")
    set_stochastic_depth(model, "efficientnet_b0", 0.9)
    blocks = [block for block in model.modules() if getattr(block, "use_res_connect", False)]
    used = [block.stochastic_depth.p for block in blocks if block.stochastic_depth.p]
    assert used == sorted(used)
    assert used[-1] == pytest.approx(0.9)


def test_a_model_without_dropout_or_stochastic_depth_is_an_error() -> None:
    with pytest.raises(UserError, match=r"model.dropout is 0.1, but resnet18 has no dropout layers"):
        set_dropout(make_empty("resnet18"), "resnet18", 0.1)
    for name in ("resnet18", "vgg11"):
        with pytest.raises(UserError, match=f"model.stochastic_depth is 0, but {name} has no stochastic depth"):
            set_stochastic_depth(make_empty(name), name, 0)

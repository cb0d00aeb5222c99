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

# Model -> torchvision's own arguments for a dropout of 0.3.
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


def built(name: str, **settings: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": True, "init_weights": False}
    with init_empty_weights():
        return models.get_model(name, weights=None, **settings)


def probabilities(model: nn.Module) -> list[tuple[str, str, float]]:
    """Return every setting of a layer by which something is left out."""
    return [
        (name, key, round(float(getattr(module, key)), 9))
        for name, module in model.named_modules()
        for key in ("p", "dropout", "drop_rate", "attention_dropout")
        if name and isinstance(getattr(module, key, None), float)  # the model itself only remembers it
    ]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_is_what_torchvisions_own_argument_sets(name: str) -> None:
    ours = built(name)
    line = set_dropout(ours, name, 0.3)
    theirs = built(name, **dict.fromkeys(WITH_DROPOUT[name], 0.3))
    assert probabilities(ours) == probabilities(theirs) != probabilities(built(name))
    assert line.startswith("dropout 0.3 in ")


def test_stochastic_depth_is_what_torchvisions_own_argument_sets() -> None:
    ours = built("convnext_tiny")
    line = set_stochastic_depth(ours, "convnext_tiny", 0.5)
    theirs = built("convnext_tiny", stochastic_depth_prob=0.5)
    assert probabilities(ours) == probabilities(theirs) != probabilities(built("convnext_tiny"))
    assert line == "stochastic depth from 0 to 0.5 in 18 layers"


@pytest.mark.parametrize("name", ["swin_t", "maxvit_t"])
def test_stochastic_depth_grows_evenly_to_what_the_last_block_has(name: str) -> None:
    model = built(name)
    set_stochastic_depth(model, name, 0.5)
    found = [layer.p for layer in model.modules() if isinstance(layer, StochasticDepth)]
    blocks = sorted(set(found))
    assert found == sorted(found)
    assert len(blocks) == {"swin_t": 12, "maxvit_t": 11}[name]
    assert blocks == pytest.approx([0.5 * i / (len(blocks) - 1) for i in range(len(blocks))])


def test_efficientnets_last_block_with_a_shortcut_has_the_given_probability() -> None:
    model = built("efficientnet_b0")
    set_stochastic_depth(model, "efficientnet_b0", 0.9)
    used = [
        block.stochastic_depth.p
        for block in model.modules()
        if getattr(block, "use_res_connect", False) and block.stochastic_depth.p
    ]
    assert used == sorted(used)
    assert used[-1] == pytest.approx(0.9)


def test_a_model_without_is_named() -> None:
    with pytest.raises(UserError, match=r"model.dropout is 0.1, but resnet18 has no dropout layers"):
        set_dropout(built("resnet18"), "resnet18", 0.1)
    for name in ("resnet18", "vgg11"):
        with pytest.raises(UserError, match=f"model.stochastic_depth is 0, but {name} has no blocks"):
            set_stochastic_depth(built(name), name, 0)


@pytest.mark.slow
def test_as_many_are_left_out_as_was_asked_for_in_training_and_none_in_evaluation() -> None:
    torch.manual_seed(5)
    created = build_model(
        "efficientnet_b0",
        image_size=32,
        num_classes=3,
        weights=None,
        head_init="xavier",
        dropout=0.6,
        stochastic_depth=0.3,
    )
    model = created.model.train()
    assert created.summary[1:] == (
        "dropout 0.6 in 1 layers",
        "stochastic depth from 0.0429 to 0.3 in 9 layers",
    )
    layers = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    last = max((m for m in layers if m.p <= 0.3), key=lambda m: m.p)
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[module] = (before.pop(module), output.clone())

    before: dict[nn.Module, Tensor] = {}
    for layer in (last, dropout):
        # Ahead of it: dropout works in place.
        layer.register_forward_pre_hook(lambda m, args: before.__setitem__(m, args[0].clone()))
        layer.register_forward_hook(note)
    images = torch.randn(200, 3, 32, 32)
    with torch.no_grad():
        model(images)
        whole, left = seen[last]
        skipped = (left.flatten(1) == 0).all(1)
        assert skipped.float().mean().item() == pytest.approx(0.3, abs=0.13)  # 4 standard deviations
        torch.testing.assert_close(left[~skipped], whole[~skipped] / 0.7)
        whole, left = seen[dropout]
        kept = left != 0
        assert kept.float().mean().item() == pytest.approx(0.4, abs=0.01)
        torch.testing.assert_close(left[kept], whole[kept] / 0.4)
        model.eval()(images[:4])
        for layer in (last, dropout):
            assert torch.equal(*seen[layer])

import math
from collections.abc import Callable

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchvision import models
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from trainer.errors import UserError
from trainer.model.blocks import analyze_blocks
from trainer.model.head import Head, find_heads, replace_head, split_outputs
from trainer.transfer.linear_probe import require_linear

CLASSES = 7

# Output layer -> families, from torchvision's sources; find_heads has no such table.
HEADS = {
    "classifier": ("densenet",),
    "classifier.1": ("efficientnet", "mnasnet", "mobilenet_v2", "squeezenet"),
    "classifier.2": ("convnext",),
    "classifier.3": ("mobilenet_v3",),
    "classifier.5": ("maxvit",),
    "classifier.6": ("alexnet", "vgg"),
    "fc": ("googlenet", "inception", "regnet", "resnet", "resnext", "shufflenet", "wide_resnet"),
    "head": ("swin",),
    "heads.head": ("vit",),
}
AUXILIARY = {"googlenet": ["aux1.fc2", "aux2.fc2"], "inception_v3": ["AuxLogits.fc"]}
SIZES = {"inception_v3": 299, "vit_h_14": 56, "maxvit_t": 224}

Snapshot = tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, bool]]


def snapshot(model: nn.Module) -> Snapshot:
    """Return the modules, the parameters and buffers, their shapes, and the modes; none of them copied."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return dict(model.named_modules()), tensors, shapes, {name: m.training for name, m in model.named_modules()}


def torchvision_model(name: str, **options: object) -> nn.Module:
    if name in AUXILIARY:
        options = {"aux_logits": True, "init_weights": False} | options
    elif name.startswith("vit_"):
        options["image_size"] = SIZES.get(name, 64)
    with init_empty_weights():
        return models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_only_the_head_of_each_torchvision_model_is_replaced(name: str) -> None:
    expected = [head for head, families in HEADS.items() if name.startswith(families)] + AUXILIARY.get(name, [])
    size = SIZES.get(name, 64)
    model = torchvision_model(name)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0  # each module must keep its own mode
    before = modules, tensors, shapes, modes = snapshot(model)
    random_state = torch.get_rng_state()

    heads = find_heads(model, size)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert snapshot(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    activations = ("classifier.2",) if name.startswith("squeezenet") else ()
    assert heads == (Head(expected[0], activations), *map(Head, expected[1:]))

    replace_head(model, heads, CLASSES, "xavier")

    require_linear(model, heads[0].name, size)  # a linear probe is possible
    new_modules, new_tensors, new_shapes, new_modes = snapshot(model)
    assert list(new_modules) == list(modules)
    assert {n for n in modules if new_modules[n] is not modules[n]} == {*expected, *activations}
    assert all(type(new_modules[head]) is type(modules[head]) for head in expected)
    assert all(new_modes[head] == modes[head] for head in expected)
    assert all(type(new_modules[activation]) is nn.Identity for activation in activations)
    assert list(new_tensors) == list(tensors)
    keys = ("weight",) if name == "maxvit_t" else ("weight", "bias")
    changed = {f"{head}.{key}" for head in expected for key in keys}
    assert {n for n in tensors if new_tensors[n] is not tensors[n]} == changed
    for n, shape in shapes.items():
        assert new_shapes[n] == ((CLASSES, *shape[1:]) if n in changed else shape)

    layer_order = analyze_blocks(model, size)
    in_blocks = [parameter for block in layer_order.blocks for parameter in block.parameters]
    assert sorted(in_blocks) == sorted(n for n, _ in model.named_parameters())
    assert len(layer_order.blocks) >= 5
    assert {n for n in changed if n.startswith(expected[0])} <= set(layer_order.blocks[-1].parameters)
    starts = [layer_order.order[block.parameters[0]] for block in layer_order.blocks]
    assert starts == sorted(starts)


# Other models ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Images -> features [B, 5] -> `tail`."""

    def __init__(self, tail: Callable[["Net", Tensor], object], **modules: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.tail = tail

    def forward(self, images: Tensor) -> object:
        return self.tail(self, self.stem(images).relu().mean((2, 3)))


FOUND = {
    "registered first": (Net(lambda net, x: net.out(net.mid(x)), out=nn.Linear(4, 6), mid=nn.Linear(5, 4)), "out"),
    "of the same size": (Net(lambda net, x: net.out(net.mid(x)), mid=nn.Linear(5, 6), out=nn.Linear(6, 6)), "out"),
    "nested": (
        Net(lambda net, x: net.top[0][1](x), top=nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(5, 6)))),
        "top.0.1",
    ),
    "convolution, then pooling": (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "2",
    ),
    "GoogLeNet without auxiliary heads": (models.googlenet(aux_logits=False, init_weights=False), "fc"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_head_of_other_models_is_found_and_replaced(case: str) -> None:
    model, name = FOUND[case]
    heads = find_heads(model, 32)
    assert heads == (Head(name),)
    replace_head(model, heads, CLASSES, "torch")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, CLASSES)


NOT_FOUND = {
    "used twice": (Net(lambda net, x: net.out(net.out(x)), out=nn.Linear(5, 5)), "has no output layer"),
    **{
        f"a {type(norm).__name__} after it": (
            Net(lambda net, x: net.norm(net.out(x)), out=nn.Linear(5, 6), norm=norm),
            "has no output layer",
        )
        for norm in (nn.LayerNorm(6), nn.BatchNorm1d(6))
    },
    "a fixed number of logits": (
        Net(lambda net, x: net.out(x)[:, :6], out=nn.Linear(5, 6)),
        "Net has no output layer that can be replaced: expected a Linear or Conv2d layer",
    ),
    "maps instead of logits": (nn.Sequential(nn.Conv2d(3, 6, 3)), "has no output layer"),
    "another image size": (
        nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(5, 6)),
        "Sequential cannot take images of 8 x 8 px: ",
    ),
    "two outputs": (Net(lambda net, x: (x, x)), "the model returns tuple; expected logits [B, classes]"),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_a_head_that_cannot_be_replaced_is_an_error(case: str) -> None:
    model, message = NOT_FOUND[case]
    before, random_state = snapshot(model), torch.get_rng_state()
    with pytest.raises(UserError) as error:
        find_heads(model, 8)
    assert message in str(error.value)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.empty(1).device.type == "cpu"


def test_a_module_under_several_names_keeps_its_parameters() -> None:
    shared = nn.Linear(5, 5)
    model = Net(lambda net, x: net.out(net.again(net.first(x))), first=shared, again=shared, out=nn.Linear(5, 6))
    before = snapshot(model)
    assert find_heads(model, 8) == (Head("out"),)
    assert snapshot(model) == before
    assert model.first.weight is shared.weight
    assert not shared.weight.is_meta


def test_split_outputs_returns_auxiliary_logits_with_their_weights() -> None:
    logits, first, second = torch.randn(3, 2, 4)
    for outputs in (logits, GoogLeNetOutputs(logits, None, None), InceptionOutputs(logits, None)):
        assert split_outputs(outputs) == (logits, ())
    # torchvision's fields are in the order logits, aux_logits2, aux_logits1.
    main, ((weight1, logits1), (weight2, logits2)) = split_outputs(GoogLeNetOutputs(logits, second, first))
    assert (weight1, weight2) == (0.3, 0.3)
    assert main is logits
    assert logits1 is first
    assert logits2 is second
    main, ((weight, auxiliary),) = split_outputs(InceptionOutputs(logits, first))
    assert weight == 0.4
    assert main is logits
    assert auxiliary is first


# Initialization ---------------------------------------------------------------------------------------------------


def new_head(layer: nn.Module, init: str, *, seed: int, classes: int = CLASSES) -> nn.Module:
    model = nn.Sequential(layer)
    torch.manual_seed(seed)
    replace_head(model, [Head("0")], classes, init)  # type: ignore[arg-type]
    return model[0]


@pytest.mark.parametrize("init", ["xavier", "torch"])
@pytest.mark.parametrize("layer", [nn.Linear(300, 5), nn.Conv2d(300, 5, 1), nn.Conv2d(30, 5, 3)], ids=str)
def test_the_new_head_is_initialized_as_named(layer: nn.Linear | nn.Conv2d, init: str) -> None:
    classes = 200
    new = new_head(layer, init, seed=4, classes=classes)
    torch.manual_seed(4)
    reference = (
        nn.Linear(layer.in_features, classes)
        if isinstance(layer, nn.Linear)
        else nn.Conv2d(layer.in_channels, classes, layer.kernel_size)
    )
    default = reference.weight.detach().clone()
    if init == "xavier":
        nn.init.xavier_uniform_(reference.weight)
    assert torch.equal(new.weight, reference.weight)
    assert torch.equal(new.bias, reference.bias)
    assert not torch.equal(new_head(layer, init, seed=5, classes=classes).weight, new.weight)
    if init == "torch":
        return
    assert not torch.equal(new.weight, default)
    # Glorot & Bengio 2010, eq. 16: U(-a, a), a^2 = 6 / (fan_in + fan_out), variance a^2 / 3.
    window = default[0, 0].numel() if default.dim() > 2 else 1
    bound = math.sqrt(6 / ((default.shape[1] + classes) * window))
    assert 0.999 * bound < new.weight.abs().max() <= bound
    # 60,000 draws: the standard error of the variance is 0.4 %.
    assert new.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_a_new_head_has_the_options_dtype_device_and_mode_of_the_old_one() -> None:
    new = new_head(nn.Linear(5, 6, dtype=torch.float64).eval(), "xavier", seed=0)
    assert (new.weight.dtype, new.bias.dtype, new.training) == (torch.float64, torch.float64, False)
    assert new_head(nn.Linear(5, 6, device="meta"), "xavier", seed=0).weight.is_meta
    assert new_head(nn.Linear(5, 6, bias=False), "torch", seed=0).bias is None
    old = nn.Conv2d(5, 6, 3, stride=2, padding=1, dilation=2, padding_mode="reflect")
    new = new_head(old, "torch", seed=0)
    for option in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        assert getattr(new, option) == getattr(old, option)


def test_a_head_without_outputs_is_an_error() -> None:
    with pytest.raises(UserError, match="at least one output, not 0"):
        new_head(nn.Linear(5, 6), "xavier", seed=0, classes=0)

import math
from collections.abc import Callable

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from trainer.errors import UserError
from trainer.model.blocks import analyze_blocks
from trainer.model.head import Head, find_heads, replace_head, split_outputs, trial_forward
from trainer.transfer.linear_probe import require_linear

CLASSES = 7

# Family -> where its output layer lies, read off torchvision's sources; the code under test has no table.
HEADS = {
    "alexnet": "classifier.6",
    "convnext": "classifier.2",
    "densenet": "classifier",
    "efficientnet": "classifier.1",
    "googlenet": "fc",
    "inception": "fc",
    "maxvit": "classifier.5",
    "mnasnet": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3": "classifier.3",
    "regnet": "fc",
    "resnet": "fc",
    "resnext": "fc",
    "shufflenet": "fc",
    "squeezenet": "classifier.1",
    "swin": "head",
    "vgg": "classifier.6",
    "vit": "heads.head",
    "wide_resnet": "fc",
}
AUXILIARY = {"googlenet": ["aux1.fc2", "aux2.fc2"], "inception_v3": ["AuxLogits.fc"]}
SIZES = {"inception_v3": 299, "vit_h_14": 56, "maxvit_t": 224}


def torchvision_model(name: str) -> nn.Module:
    settings: dict[str, object] = {"aux_logits": True, "init_weights": False} if name in AUXILIARY else {}
    if name.startswith("vit_"):
        settings["image_size"] = SIZES.get(name, 64)
    with init_empty_weights():
        return models.get_model(name, weights=None, **settings)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_exactly_the_head_of_every_torchvision_model_changes(name: str) -> None:
    expected = max((family for family in HEADS if name.startswith(family)), key=len)
    model = torchvision_model(name).train()
    modules, tensors, shapes = snapshot(model)
    # Half of the modules in another mode: each keeps its own.
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    modes = {path: module.training for path, module in model.named_modules()}
    random = torch.get_rng_state()

    heads = find_heads(model, SIZES.get(name, 64))

    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(model) == (modules, tensors, shapes)
    assert modes == {path: module.training for path, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [head.name for head in heads] == [HEADS[expected], *AUXILIARY.get(name, [])]
    assert [head.auxiliary for head in heads] == [False, *(True for _ in AUXILIARY.get(name, []))]
    assert all(head.out_features == 1000 for head in heads)
    activations = ("classifier.2",) if name.startswith("squeezenet") else ()
    assert [head.activations for head in heads] == [activations, *(() for _ in heads[1:])]

    replace_head(model, heads, CLASSES, "xavier")

    require_linear(model, heads[0].name, SIZES.get(name, 64))  # or a linear probe would be refused
    new_modules, new_tensors, new_shapes = snapshot(model)
    paths = {head.name for head in heads}
    assert list(new_modules) == list(modules)
    assert {path for path in modules if new_modules[path] is not modules[path]} == paths | set(activations)
    for path in paths:
        assert type(new_modules[path]) is type(modules[path])
        assert new_modules[path].training == modes[path]
    assert all(type(new_modules[path]) is nn.Identity for path in activations)
    assert list(new_tensors) == list(tensors)
    kinds = ("weight",) if name == "maxvit_t" else ("weight", "bias")
    changed = {f"{path}.{kind}" for path in paths for kind in kinds}
    assert {path for path in tensors if new_tensors[path] is not tensors[path]} == changed
    for path, shape in shapes.items():
        assert new_shapes[path] == ((CLASSES, *shape[1:]) if path in changed else shape)

    structure = analyze_blocks(model, SIZES.get(name, 64))
    in_blocks = [parameter for block in structure.blocks for parameter in block.parameters]
    assert sorted(in_blocks) == sorted(path for path, _ in model.named_parameters())
    assert len(structure.blocks) >= 5
    assert {path for path in changed if path.startswith(heads[0].name)} <= set(
        structure.blocks[-1].parameters
    )
    firsts = [structure.order[block.parameters[0]] for block in structure.blocks]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_a_grafted_model_can_be_grafted_again(name: str) -> None:
    model = torchvision_model(name)
    heads = find_heads(model, 64)
    replace_head(model, heads, CLASSES, "torch")
    again = find_heads(model, 64)
    assert [(head.name, head.out_features, head.activations) for head in again] == [
        (head.name, CLASSES, ()) for head in heads
    ]


Snapshot = tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, tuple[int, ...]]]


def snapshot(model: nn.Module) -> Snapshot:
    """Return the very modules, parameters and buffers, and the shapes."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        dict(model.named_modules()),
        tensors,
        {path: tuple(tensor.shape) for path, tensor in tensors.items()},
    )


# Made-up models -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Pictures -> [B, 3] -> `tail`; what a test needs is set on it."""

    def __init__(self, tail: Callable[["Net", Tensor], object], **parts: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.tail = tail

    def forward(self, images: Tensor) -> object:
        return self.tail(self, self.stem(images).relu().mean((2, 3)))


def names_of(model: nn.Module) -> list[str]:
    return [head.name for head in find_heads(model, 8)]


def check_graft(model: nn.Module, path: str, *, size: int = 8) -> None:
    """Graft, and assert that this one layer was replaced and that the model gives the new logits."""
    _, tensors, shapes = snapshot(model)
    heads = find_heads(model, size)
    assert [head.name for head in heads] == [path]
    replace_head(model, heads, CLASSES, "torch")
    _, new_tensors, _ = snapshot(model)
    assert list(new_tensors) == list(tensors)
    changed = {key for key in tensors if new_tensors[key] is not tensors[key]}
    own = {key for key in tensors if key.rpartition(".")[0] == path}
    assert changed == own
    assert all(tuple(new_tensors[key].shape) == (CLASSES, *shapes[key][1:]) for key in own)
    assert model(torch.randn(2, 3, size, size)).shape == (2, CLASSES)


def test_a_decoy_that_comes_last_in_the_list_and_first_in_the_forward() -> None:
    model = Net(lambda net, x: net.out(net.decoy(x)), out=nn.Linear(4, 6), decoy=nn.Linear(5, 4))
    assert [name for name, _ in model.named_children()][-1] == "decoy"
    check_graft(model, "out")


def test_a_decoy_that_is_never_used() -> None:
    check_graft(Net(lambda net, x: net.out(x), out=nn.Linear(5, 6), fc=nn.Linear(5, 6)), "out")


def test_a_decoy_that_is_used_after_the_head_for_something_else() -> None:
    def tail(net: Net, x: Tensor) -> Tensor:
        logits = net.out(x)
        net.fc(logits.detach())
        return logits

    model = Net(tail, out=nn.Linear(5, 6), fc=nn.Linear(6, 6))
    with pytest.raises(
        UserError, match="out cannot be replaced by a layer of another size: the model needs 6"
    ):
        find_heads(model, 8)
    model.tail = lambda net, x: (net.fc(x), net.out(x))[1]
    model.fc = nn.Linear(5, 6)
    check_graft(model, "out")


def test_a_head_without_bias() -> None:
    model = Net(lambda net, x: net.out(x), out=nn.Linear(5, 6, bias=False))
    check_graft(model, "out")
    assert model.out.bias is None


def test_a_head_deep_in_named_and_numbered_modules() -> None:
    classifier = nn.Module()
    classifier.out = nn.Sequential(nn.Dropout(0.5), nn.ModuleDict({"last": nn.Linear(5, 6)}))
    check_graft(
        Net(lambda net, x: net.classifier.out[1]["last"](x), classifier=classifier), "classifier.out.1.last"
    )


def test_the_whole_model_is_a_sequence() -> None:
    check_graft(
        nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 5), nn.ReLU(), nn.Linear(5, 6)
        ),
        "5",
    )


@pytest.mark.parametrize("kernel", [1, 2])
def test_a_convolution_then_pooling_and_flatten(kernel: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 6, kernel, stride=2, padding=1, dilation=2, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    old = model[2]
    check_graft(model, "2")
    new = model[2]
    assert (new.kernel_size, new.stride, new.padding, new.dilation, new.padding_mode) == (
        old.kernel_size, old.stride, old.padding, old.dilation, old.padding_mode,
    )  # fmt: skip


def test_a_head_on_tokens_then_their_mean() -> None:
    model = Net(lambda net, x: net.out(x[:, None].expand(-1, 4, -1)).mean(1), out=nn.Linear(5, 6))
    check_graft(model, "out")


def test_a_constant_temperature_and_log_softmax_leave_logits() -> None:
    check_graft(Net(lambda net, x: (net.out(x) / 0.07).log_softmax(1), out=nn.Linear(5, 6)), "out")


def test_a_linear_layer_computed_outside_its_module() -> None:
    check_graft(
        Net(lambda net, x: functional.linear(x, net.out.weight, net.out.bias), out=nn.Linear(5, 6)), "out"
    )
    check_graft(Net(lambda net, x: x @ net.out.weight.T + net.out.bias, out=nn.Linear(5, 6)), "out")


def test_a_subclass_of_linear_becomes_a_linear_layer() -> None:
    class Mine(nn.Linear):
        pass

    check_graft(Net(lambda net, x: net.out(x), out=Mine(5, 6)), "out")


def test_a_wrapped_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> object:
            return self.module(images)

    check_graft(Wrapper(Net(lambda net, x: net.out(x), out=nn.Linear(5, 6))), "module.out")


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Softmax(1), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(),
        nn.ELU(), nn.GELU(), nn.Softplus(), nn.Hardswish(), nn.LogSigmoid(),
    ],
    ids=str,
)  # fmt: skip
def test_an_activation_after_the_head_is_taken_out(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 6), activation, nn.Identity())
    (head,) = find_heads(model, 8)
    assert (head.name, head.activations) == ("2", ("3",))
    replace_head(model, (head,), CLASSES, "torch")
    assert type(model[3]) is nn.Identity
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images), model[:3](images))


@pytest.mark.parametrize(
    "bend", [lambda x: x.relu(), lambda x: x.clamp(min=0), lambda x: x.softmax(1), lambda x: x.tanh()]
)
def test_an_activation_that_is_no_module_is_an_error(bend: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda net, x: bend(net.out(x)), out=nn.Linear(5, 6))
    with pytest.raises(
        UserError, match=r"the model's output passes through (Relu|ClampMin|Clamp|Softmax|Tanh) after its"
    ):
        find_heads(model, 8)


def test_an_activation_used_elsewhere_too_is_an_error() -> None:
    model = Net(
        lambda net, x: net.act(net.out(net.act(net.mid(x)))),
        mid=nn.Linear(5, 5),
        out=nn.Linear(5, 6),
        act=nn.ReLU(),
    )
    with pytest.raises(
        UserError, match="passes through Relu after its layer, which is not a module of its own"
    ):
        find_heads(model, 8)


def tied() -> nn.Module:
    model = Net(lambda net, x: net.out(net.first(x)), first=nn.Linear(5, 5), out=nn.Linear(5, 5))
    model.out.weight = model.first.weight
    return model


def raw_parameter() -> nn.Module:
    model = Net(lambda net, x: functional.linear(x, net.matrix))
    model.matrix = nn.Parameter(torch.randn(6, 5))
    return model


def scaled() -> nn.Module:
    model = Net(lambda net, x: net.out(x) * net.scale, out=nn.Linear(5, 6))
    model.scale = nn.Parameter(torch.ones(1))
    return model


def extra_bias() -> nn.Module:
    model = Net(lambda net, x: net.out(x) + net.bias, out=nn.Linear(5, 6, bias=False))
    model.bias = nn.Parameter(torch.zeros(6))
    return model


def normalised_weight() -> nn.Module:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, functional.normalize(self.weight))

    return Net(lambda net, x: net.out(x), out=Cosine(5, 6))


ERRORS = {
    "reused": (
        Net(lambda net, x: net.out(net.out(x)), out=nn.Linear(5, 5)),
        "the model's output comes from Linear out, which the model also uses elsewhere",
    ),
    "reused on two inputs": (
        Net(lambda net, x: net.out(x) + net.out(x * 2), out=nn.Linear(5, 6)),
        "Linear out, which the model also uses elsewhere: it cannot be replaced by a layer with",
    ),
    "its weight used elsewhere": (
        Net(lambda net, x: net.out(x @ net.out.weight), out=nn.Linear(5, 5)),
        "Linear out, which the model also uses elsewhere",
    ),
    "tied": (tied(), "comes from Linear first and Linear out; expected one Linear or Conv layer"),
    "raw parameter": (raw_parameter(), "comes from Net (the whole model); expected one Linear or Conv layer"),
    "scale after it": (scaled(), "Net (the whole model); expected one Linear or Conv layer, followed"),
    "bias of the model's": (extra_bias(), "comes from Linear out and Net (the whole model); expected one"),
    "normalised weight": (normalised_weight(), "Conv2d stem and Cosine out; expected one"),
    "two layers added": (
        Net(lambda net, x: net.a(x) + net.b(x), a=nn.Linear(5, 6), b=nn.Linear(5, 6)),
        "comes from Linear a and Linear b; expected one Linear or Conv layer",
    ),
    "a norm after it": (
        Net(lambda net, x: net.norm(net.out(x)), out=nn.Linear(5, 6), norm=nn.LayerNorm(6)),
        "comes from LayerNorm norm; expected one Linear or Conv layer, followed by nothing with parameters",
    ),
    "a norm without parameters after it": (
        Net(lambda net, x: net.norm(net.out(x)), out=nn.Linear(5, 6), norm=nn.BatchNorm1d(6, affine=False)),
        "out cannot be replaced by a layer of another size: the model needs 6 outputs of it",
    ),
    "a bilinear head": (
        Net(lambda net, x: net.out(x, x), out=nn.Bilinear(5, 5, 6)),
        "comes from Bilinear out; expected one Linear or Conv layer",
    ),
    "a fixed number of logits": (
        Net(lambda net, x: net.out(x)[:, :6], out=nn.Linear(5, 6)),
        "the number of logits does not follow from out alone: with 12 outputs the model gives [2, 6]",
    ),
    "logits cut in two": (
        Net(lambda net, x: net.out(x)[:, :3], out=nn.Linear(5, 6)),
        "is [2, 3] for 2 images although Linear out has 6 outputs; expected logits [2, 6]",
    ),
    "maps for logits": (
        nn.Sequential(nn.Conv2d(3, 6, 3)),
        "is [2, 6, 6, 6] for 2 images although Conv2d 0 has 6 outputs",
    ),
    "groups": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 6, groups=2), nn.Flatten()),
        "Conv2d 1 with 2 groups; a head of another size needs groups=1",
    ),
    "no parameter": (nn.Flatten(), "does not depend on any parameter; expected the logits of a Linear"),
    "a bare layer": (nn.Conv2d(3, 6, 8), "Conv2d (the whole model)"),
    "two outputs": (
        Net(lambda net, x: (net.out(x), x), out=nn.Linear(5, 6)),
        "the model returns tuple; expected logits [B, classes]",
    ),
    "a dictionary": (
        Net(lambda net, x: {"out": net.out(x)}, out=nn.Linear(5, 6)),
        "the model returns dict; expected logits [B, classes]",
    ),
    "another size": (
        nn.Sequential(nn.Flatten(), nn.Linear(5, 6)),
        "Sequential cannot take images of 8 x 8 px: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_grafted_is_an_error_that_names_the_layer(case: str) -> None:
    model, words = ERRORS[case]
    before = snapshot(model)
    with pytest.raises(UserError) as info:
        find_heads(model, 8)
    assert words in str(info.value)
    assert snapshot(model) == before


def test_a_trial_leaves_no_trace_and_a_failed_one_neither() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.Flatten(), nn.Linear(180, 6)
    )
    model[1].eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before, random, modes = (
        snapshot(model),
        torch.get_rng_state(),
        [module.training for module in model.modules()],
    )
    trial_forward(model, 8)
    for size in (9, 1):
        with pytest.raises(UserError, match=f"cannot take images of {size} x {size} px: "):
            trial_forward(model, size)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_without_auxiliary_heads_there_is_one_output(name: str) -> None:
    with init_empty_weights():
        model = models.get_model(name, weights=None, aux_logits=False, init_weights=False, dropout=0.0)
    assert [head.name for head in find_heads(model, 96)] == ["fc"]


def test_outputs_with_their_weights() -> None:
    logits, first, second = torch.randn(3, 2, 4)
    assert split_outputs(logits) == (logits, ())
    # torchvision's order of the fields is 2, 1.
    main, ((weight1, logits1), (weight2, logits2)) = split_outputs(GoogLeNetOutputs(logits, second, first))
    assert (main is logits, weight1, logits1 is first, weight2, logits2 is second) == (
        True,
        0.3,
        True,
        0.3,
        True,
    )
    main, ((weight, auxiliary),) = split_outputs(InceptionOutputs(logits, first))
    assert (main is logits, weight, auxiliary is first) == (True, 0.4, True)
    assert split_outputs(GoogLeNetOutputs(logits, None, None)) == (logits, ())
    assert split_outputs(InceptionOutputs(logits, None)) == (logits, ())


# Initialisation -------------------------------------------------------------------------------------------


def grafted(layer: nn.Module, init: str, *, seed: int, classes: int = CLASSES) -> nn.Module:
    model = nn.Sequential(layer)
    torch.manual_seed(seed)
    replace_head(model, [Head("0", False, 0, 0)], classes, init)  # type: ignore[arg-type]
    return model[0]


@pytest.mark.parametrize("layer", [nn.Linear(300, 5), nn.Conv2d(300, 5, 1), nn.Conv2d(30, 5, 3)], ids=str)
def test_xavier_draws_the_weight_and_leaves_the_bias_to_the_layers_own_default(
    layer: nn.Linear | nn.Conv2d,
) -> None:
    classes = 200
    new = grafted(layer, "xavier", seed=4, classes=classes)
    torch.manual_seed(4)
    own = (
        nn.Linear(layer.in_features, classes)
        if isinstance(layer, nn.Linear)
        else nn.Conv2d(layer.in_channels, classes, layer.kernel_size)
    )
    default = own.weight.detach().clone()
    nn.init.xavier_uniform_(own.weight)
    assert torch.equal(new.weight, own.weight)
    assert torch.equal(new.bias, own.bias)
    assert not torch.equal(new.weight, default)
    # Glorot & Bengio 2010, eq. 16: U(-a, a), a^2 = 6 / (fan_in + fan_out), whose variance is a^2 / 3.
    window = default[0, 0].numel() if default.dim() > 2 else 1
    bound = math.sqrt(6 / ((default.shape[1] + classes) * window))
    assert new.weight.abs().max() <= bound
    assert new.weight.abs().max() > 0.999 * bound
    # 60 000 draws: the standard error of the variance is 0.4 %.
    assert new.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    assert abs(new.weight.mean().item()) < 5 * bound / math.sqrt(3 * new.weight.numel())
    # torch's default bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    assert new.bias.abs().max() <= 1 / math.sqrt(default.shape[1] * window)
    assert new.bias.abs().min() > 0


@pytest.mark.parametrize("layer", [nn.Linear(30, 5), nn.Conv2d(30, 5, 2)], ids=str)
def test_torch_leaves_both_to_the_layers_own_default(layer: nn.Module) -> None:
    new = grafted(layer, "torch", seed=4)
    torch.manual_seed(4)
    own = nn.Linear(30, CLASSES) if isinstance(layer, nn.Linear) else nn.Conv2d(30, CLASSES, 2)
    assert torch.equal(new.weight, own.weight)
    assert torch.equal(new.bias, own.bias)


@pytest.mark.parametrize("init", ["xavier", "torch"])
def test_the_draw_follows_the_seed(init: str) -> None:
    first, again, other = (grafted(nn.Linear(30, 5), init, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.bias, other.bias)


def test_a_new_head_takes_the_kind_the_place_and_the_mode_of_the_old_one() -> None:
    old = nn.Linear(5, 6, dtype=torch.float64).eval()
    new = grafted(old, "xavier", seed=0)
    assert (new.weight.dtype, new.bias.dtype, new.training) == (torch.float64, torch.float64, False)
    assert grafted(nn.Linear(5, 6, device="meta"), "xavier", seed=0).weight.is_meta
    assert type(grafted(nn.Conv1d(5, 6, 3), "torch", seed=0)) is nn.Conv1d
    assert type(grafted(nn.Conv3d(5, 6, 3), "torch", seed=0)) is nn.Conv3d


@pytest.mark.parametrize("classes", [0, -1])
def test_no_classes_is_an_error(classes: int) -> None:
    with pytest.raises(UserError, match=f"at least one output, not {classes}"):
        grafted(nn.Linear(5, 6), "xavier", seed=0, classes=classes)

"""L2-SP in closed form."""

from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.trainer.training import Batches, make_net, make_train_step
from trainer.distributed.context import DistributedContext
from trainer.optim.param_groups import ParamGroup, create_optimizer, group_parameters, set_lr
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay

LR, STRENGTH = 0.5, 0.25
Name = Literal["sgd", "adamw"]


def add_to_all(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(value)


def copy_parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def make_groups(net: nn.Module, *, decay: float = 0.0) -> tuple[ParamGroup, ...]:
    return group_parameters(net, ["fc"], lr=LR, head_lr_scale=1.0, weight_decay=decay)


def make_l2_sp(net: nn.Module, *, decoupled: bool = False) -> L2SP:
    return L2SP(backbone_parameters(net, ["fc"]), STRENGTH, decoupled=decoupled)


@pytest.mark.parametrize(("name", "lr_factor"), [("sgd", 1.0), ("sgd", 0.5), ("adamw", 0.5)])
def test_without_gradients_parameters_decay_geometrically_to_their_initial_values(name: Name, lr_factor: float) -> None:
    net = make_net()
    initial = copy_parameters(net)
    l2_sp = make_l2_sp(net, decoupled=name == "adamw")
    add_to_all(net, 1.0)
    optimizer = create_optimizer(name, make_groups(net), momentum=0.0)
    set_lr(optimizer, lr_factor)
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        l2_sp.apply(optimizer)
        optimizer.step()
    remaining = (1 - lr_factor * LR * STRENGTH) ** 5
    for key, parameter in net.named_parameters():
        distance = 1.0 if key.startswith("fc") else remaining  # biases decay like weights
        torch.testing.assert_close(parameter, initial[key] + distance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_initial_values_of_zero_it_is_weight_decay(name: Name, ctx: DistributedContext) -> None:
    nets = []
    for use_l2_sp in (False, True):
        net, l2_sp, batches = make_net(), L2SP([], 0.0, decoupled=False), Batches()
        groups = make_groups(net, decay=STRENGTH)
        if use_l2_sp:
            for parameter in net.parameters():
                nn.init.zeros_(parameter)
            l2_sp = make_l2_sp(net, decoupled=name == "adamw")
            net.load_state_dict(make_net().state_dict())
            groups = without_weight_decay(groups, backbone_parameters(net, ["fc"]))
        optimizer = create_optimizer(name, groups, momentum=0.9)
        for step in range(6):
            make_train_step(ctx, l2_sp=l2_sp)(net, optimizer, next(batches), step, 4)
        nets.append(net)
    for weight_decay, decayed in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(weight_decay, decayed, rtol=1e-5, atol=1e-7)


def test_it_adds_the_gradient_of_the_penalty_after_clipping(ctx: DistributedContext) -> None:
    net = make_net()
    initial = copy_parameters(net)
    l2_sp = make_l2_sp(net)
    add_to_all(net, 2.0)
    before = copy_parameters(net)
    model, optimizer = ctx.prepare(net, create_optimizer("sgd", make_groups(net), momentum=0.0))
    make_train_step(ctx, l2_sp=l2_sp, max_grad_norm=1e-9)(model, optimizer, next(Batches()), 0, 4)
    for key, parameter in net.named_parameters():
        gradient = (before[key] - parameter) / LR
        penalty = torch.zeros_like(gradient) if key.startswith("fc") else STRENGTH * (before[key] - initial[key])
        torch.testing.assert_close(gradient, penalty, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_and_those_without_gradients_do_not_decay() -> None:
    net = make_net()
    l2_sp = make_l2_sp(net, decoupled=True)
    add_to_all(net, 1.0)
    net.conv.weight.requires_grad_(False)
    net.conv.weight.grad = torch.zeros_like(net.conv.weight)  # left from before it was frozen
    before = copy_parameters(net)
    l2_sp.apply(create_optimizer("adamw", make_groups(net), momentum=0.0))
    assert all(torch.equal(value, before[key]) for key, value in copy_parameters(net).items())


@pytest.mark.parametrize("max_grad_norm", [None, 1e3])
def test_gradients_of_fp16_are_unscaled_first(
    max_grad_norm: float | None, ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a loss scaler of the CPU, since training in fp16 needs a GPU."""
    weights = []
    for is_scaled in (False, True):
        if is_scaled:
            monkeypatch.setattr(ctx.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
            monkeypatch.setattr(ctx.accelerator, "native_amp", True)
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        net = make_net()
        l2_sp = make_l2_sp(net)
        add_to_all(net, 0.5)
        optimizer = ctx.accelerator.prepare_optimizer(create_optimizer("sgd", make_groups(net), momentum=0.0))
        train_step = make_train_step(ctx, l2_sp=l2_sp, max_grad_norm=max_grad_norm)
        train_step(net, optimizer, next(Batches()), 0, 4)
        weights.append(net.conv.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


def test_a_group_of_both_output_layers_and_pretrained_parameters_is_an_error() -> None:
    net = make_net()
    with pytest.raises(RuntimeError, match="the group all"):
        without_weight_decay([ParamGroup("all", tuple(net.parameters()), LR, 0.1)], backbone_parameters(net, ["fc"]))

"""L2-SP, in closed form."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.trainer.test_loop import PLAN, Kept, Net, Told, batches, normalize, unevaluated
from trainer.distributed import context
from trainer.loop import ResumePoint, fit, update
from trainer.optim.param_groups import ParamGroup, group_parameters, make_optimizer, set_lr
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay

LR, STRENGTH = 0.5, 0.25


@pytest.fixture
def accelerator() -> Accelerator:
    return context.start(device="cpu", precision="fp32", threads=1).accelerator


def away_from(source: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(by)


def grouped(net: nn.Module, *, decay: float = 0.0) -> tuple[ParamGroup, ...]:
    return group_parameters(net, ["fc"], lr=LR, head_lr_scale=1.0, weight_decay=decay)


@pytest.mark.parametrize(("name", "factor"), [("sgd", 1.0), ("adamw", 1.0), ("sgd", 0.5), ("adamw", 0.5)])
def test_without_a_gradient_of_the_loss_weights_come_back_by_the_same_share_each_step(
    name: Any, factor: float
) -> None:
    torch.manual_seed(0)
    net = Net()
    source = {key: p.detach().double() for key, p in net.named_parameters()}
    l2_sp = L2SP(backbone_parameters(net, ["fc"]), STRENGTH, decoupled=name == "adamw")
    away_from(net, 1.0)
    optimizer = make_optimizer(name, grouped(net), momentum=0.0)
    set_lr(optimizer, factor)  # a schedule's, which the pull follows
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        l2_sp.apply(optimizer)
        optimizer.step()
    left = (1 - factor * LR * STRENGTH) ** 5
    for key, parameter in net.named_parameters():
        wanted = 1.0 if key.startswith("fc") else left  # biases come back like weights
        torch.testing.assert_close(parameter.double(), source[key] + wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_an_anchor_at_zero_it_is_weight_decay(name: Any, accelerator: Accelerator) -> None:
    def train(*, pulled_parameters: bool) -> Net:
        torch.manual_seed(0)
        net = Net()
        start = [p.detach().clone() for p in net.parameters()]
        l2_sp = None
        groups = grouped(net, decay=STRENGTH)
        if pulled_parameters:
            backbone = backbone_parameters(net, ["fc"])
            with torch.no_grad():
                for parameter in backbone:
                    parameter.zero_()
            l2_sp = L2SP(backbone, STRENGTH, decoupled=name == "adamw")
            groups = without_weight_decay(groups, backbone)
            with torch.no_grad():
                for parameter, value in zip(net.parameters(), start, strict=True):
                    parameter.copy_(value)
        model, optimizer = accelerator.prepare(net, make_optimizer(name, groups, momentum=0.9))
        fit(
            model, optimizer, batches(), PLAN, ResumePoint(),
            accelerator=accelerator, normalize=normalize, evaluate=unevaluated, keeper=Kept(), listener=Told(),
            batch_paths=lambda epoch, step: [], l2_sp=l2_sp,
        )  # fmt: skip
        return net

    for a, b in zip(
        train(pulled_parameters=False).parameters(), train(pulled_parameters=True).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_pull_is_the_gradient_of_the_penalty_and_is_not_clipped(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    net = Net()
    l2_sp = L2SP(backbone_parameters(net, ["fc"]), STRENGTH, decoupled=False)
    source = {key: p.detach().clone() for key, p in net.named_parameters()}
    away_from(net, 2.0)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    model, optimizer = accelerator.prepare(net, make_optimizer("sgd", grouped(net), momentum=0.0))
    update(
        model, optimizer, next(batches()), 1.0,
        accelerator=accelerator, normalize=normalize, parts=1, max_grad_norm=1e-9, l2_sp=l2_sp,
    )  # fmt: skip
    for key, parameter in net.named_parameters():
        moved = (before[key] - parameter) / LR
        penalty = 0.0 if key.startswith("fc") else STRENGTH * (before[key] - source[key])
        torch.testing.assert_close(moved, torch.zeros_like(moved) + penalty, rtol=1e-5, atol=1e-6)


def test_what_is_frozen_or_has_no_gradient_is_not_pulled() -> None:
    net = Net()
    l2_sp = L2SP(backbone_parameters(net, ["fc"]), STRENGTH, decoupled=True)
    away_from(net, 1.0)
    optimizer = make_optimizer("adamw", grouped(net), momentum=0.0)
    net.conv.weight.requires_grad_(False)
    net.conv.weight.grad = torch.zeros_like(net.conv.weight)  # left from before it was frozen
    net.conv.bias.grad = None
    before = [p.detach().clone() for p in net.parameters()]
    l2_sp.apply(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_gradients_of_fp16_are_unscaled_before_the_pull_is_added() -> None:
    """On the CPU's own loss scaling: fp16 training itself needs a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Stepping:
        """As accelerate wraps an optimizer."""

        def __init__(self, of: torch.optim.Optimizer) -> None:
            self.of, self.param_groups, self.zero_grad = of, of.param_groups, of.zero_grad

        def step(self) -> None:
            scaler.step(self.of)
            scaler.update()

    class Scaled:
        """As accelerate under fp16."""

        def __init__(self, optimizer: Stepping) -> None:
            self.optimizer = optimizer

        def backward(self, loss: torch.Tensor) -> None:
            scaler.scale(loss).backward()

        def unscale_gradients(self, optimizer: Stepping) -> None:
            scaler.unscale_(optimizer.of)  # raises where it was done before

        def clip_grad_norm_(self, parameters: Any, norm: float) -> None:
            self.unscale_gradients(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, norm)

    moved = {}
    for scaled in (False, True):
        for max_grad_norm in (None, 1e3):
            torch.manual_seed(0)
            net = Net()
            l2_sp = L2SP(backbone_parameters(net, ["fc"]), STRENGTH, decoupled=False)
            away_from(net, 0.5)
            plain = make_optimizer("sgd", grouped(net), momentum=0.0)
            plain_machine = context.start(device="cpu", precision="fp32", threads=1).accelerator
            optimizer: Any = Stepping(plain) if scaled else plain
            ctx: Any = Scaled(optimizer) if scaled else plain_machine
            update(
                net, optimizer, next(batches()), 1.0,
                accelerator=ctx, normalize=normalize, parts=1, max_grad_norm=max_grad_norm, l2_sp=l2_sp,
            )  # fmt: skip
            moved[scaled, max_grad_norm] = net.conv.weight.detach().clone()
    torch.testing.assert_close(moved[True, None], moved[False, None])
    torch.testing.assert_close(moved[True, 1e3], moved[False, 1e3])


def test_weight_decay_is_kept_for_the_new_output_layer_alone() -> None:
    net = Net()
    groups = grouped(net, decay=0.1)
    spared = without_weight_decay(groups, backbone_parameters(net, ["fc"]))
    assert [(g.name, g.weight_decay) for g in spared] == [("backbone", 0.0), ("head", 0.1)]
    assert [g.parameters for g in spared] == [g.parameters for g in groups]
    mixed = ParamGroup("all", tuple(net.parameters()), LR, 0.1)
    with pytest.raises(RuntimeError, match="the group all"):
        without_weight_decay([mixed], backbone_parameters(net, ["fc"]))

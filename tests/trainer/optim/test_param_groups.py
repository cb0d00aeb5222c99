import pytest
import torch
from torch import nn

from trainer.optim.param_groups import current_lr, group_parameters, make_optimizer, set_lr


class Tricky(nn.Module):
    """Its head is not called `fc`, and its backbone is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)


def test_the_head_is_found_by_module_and_every_parameter_is_in_one_group() -> None:
    model = Tricky()
    backbone, head = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0.01)
    assert (backbone.name, backbone.lr, head.name, head.lr) == ("backbone", 0.1, "head", 1.0)
    assert {id(p) for p in head.parameters} == {id(p) for p in model.last.parameters()}
    assert {id(p) for p in backbone.parameters} == {id(p) for p in model.fc.parameters()}
    assert backbone.weight_decay == head.weight_decay == 0.01


def test_a_group_without_trained_parameters_is_left_out() -> None:
    model = Tricky()
    model.fc.requires_grad_(False)
    (head,) = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0)
    assert head.name == "head"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_learning_rate_follows_the_factor(name: str) -> None:
    groups = group_parameters(Tricky(), ["last"], lr=0.1, head_lr_scale=10, weight_decay=0)
    optimizer = make_optimizer(name, groups, momentum=0.9)  # type: ignore[arg-type]
    set_lr(optimizer, 0.5)
    assert current_lr(optimizer) == {"backbone": 0.05, "head": 0.5}
    set_lr(optimizer, 1.0)
    assert current_lr(optimizer) == {"backbone": 0.1, "head": 1.0}


def test_sgd_adds_weight_decay_to_every_parameter_as_the_note_does() -> None:
    model = Tricky()
    groups = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0.5)
    optimizer = make_optimizer("sgd", groups, momentum=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        lr = 1.0 if name.startswith("last") else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * 0.5))

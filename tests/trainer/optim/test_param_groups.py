from torch import nn

from trainer.optim.param_groups import create_optimizer, current_lr, group_parameters, set_lr


class MisleadingNames(nn.Module):
    """A model whose backbone is called `fc` and whose head is not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)


def test_the_head_is_found_by_its_module_and_every_parameter_is_in_one_group() -> None:
    model = MisleadingNames()
    backbone, head = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0.01)
    assert (backbone.name, backbone.lr, head.name, head.lr) == ("backbone", 0.1, "head", 1.0)
    for group, layer in ((backbone, model.fc), (head, model.last)):
        assert {id(p) for p in group.parameters} == {id(p) for p in layer.parameters()}
        assert group.weight_decay == 0.01


def test_groups_differ_by_lr_mult_and_norms_and_biases_may_have_no_weight_decay() -> None:
    lr_mult = {"fc.weight": 0.1, "last.weight": 0.5}
    groups = group_parameters(
        MisleadingNames(), ["last"], lr=1.0, head_lr_scale=10, weight_decay=0.5, decay_norm_and_bias=False,
        lr_mult=lr_mult,
    )  # fmt: skip
    assert [(group.name, group.lr, group.weight_decay, len(group.parameters)) for group in groups] == [
        ("backbone", 0.1, 0.5, 1), ("backbone", 1.0, 0.0, 1), ("head", 5.0, 0.5, 1), ("head", 10.0, 0.0, 1),
    ]  # fmt: skip
    optimizer = create_optimizer("sgd", groups, momentum=0)
    assert current_lr(optimizer) == {"backbone": 1.0, "head": 10.0}, "the highest of each"


def test_frozen_parameters_are_in_no_group_unless_a_later_stage_trains_them() -> None:
    model = MisleadingNames()
    model.fc.requires_grad_(False)
    (head,) = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0)
    assert head.name == "head"
    (backbone,) = group_parameters(model, ["last"], lr=0.1, head_lr_scale=10, weight_decay=0, trainable={"fc.bias"})
    assert (backbone.name, len(backbone.parameters)) == ("backbone", 1)


def test_the_learning_rate_is_a_factor_of_each_groups_peak() -> None:
    groups = group_parameters(MisleadingNames(), ["last"], lr=0.1, head_lr_scale=10, weight_decay=0)
    optimizer = create_optimizer("adamw", groups, momentum=0.9)
    for factor in (0.5, 1.0):
        set_lr(optimizer, factor)
        assert current_lr(optimizer) == {"backbone": 0.1 * factor, "head": factor}

import pytest
import torch
from torch import nn
from torchvision import models

from trainer.model.batch_norm import named_batch_norms
from trainer.model.blocks import analyze_blocks
from trainer.model.built import UnfreezeStage
from trainer.model.freeze import BatchNormMode, apply_stage, frozen_batch_norms, make_stages, stage_at

ALL_BUT_4 = {"bn1", *(f"layer{i}.{j}.bn{k}" for i in (1, 2, 3) for j in (0, 1) for k in (1, 2))} | {
    f"layer{i}.0.downsample.1" for i in (2, 3)
}
LAYER_4 = {f"layer4.{j}.bn{k}" for j in (0, 1) for k in (1, 2)} | {"layer4.0.downsample.1"}


def stage(model: nn.Module, what: str) -> UnfreezeStage:
    return make_stages(what, model, ["fc"], analyze_blocks(model, 32))[0]


def test_stages_add_to_one_another_and_begin_where_they_say() -> None:
    model = models.resnet18()
    head, four, every = make_stages(
        {3: "all", 0: "head", 1: "layer4"}, model, ["fc"], analyze_blocks(model, 32)
    )
    assert (head.start_epoch, four.start_epoch, every.start_epoch) == (0, 1, 3)
    assert head.trainable == {"fc.weight", "fc.bias"} < four.trainable < every.trainable
    assert every.trainable == {name for name, _ in model.named_parameters()}
    assert [stage_at((head, four, every), epoch) for epoch in range(5)] == [head, four, four, every, every]
    narrow = make_stages({0: "layer4", 1: "layer1"}, model, ["fc"], analyze_blocks(model, 32))[1]
    assert {name.split(".")[0] for name in narrow.trainable} == {"layer1", "layer4", "fc"}


@pytest.mark.parametrize(
    ("policy", "what", "frozen"),
    [
        ("frozen-with-weights", "all", set()),
        ("frozen-with-weights", "last:2", ALL_BUT_4),
        ("frozen-with-weights", "head", ALL_BUT_4 | LAYER_4),
        ("sync", "last:2", ALL_BUT_4),
        ("frozen", "all", ALL_BUT_4 | LAYER_4),
        ("train", "head", set()),
    ],
)
def test_which_batch_norms_keep_the_sources_statistics(
    policy: BatchNormMode, what: str, frozen: set[str]
) -> None:
    model = models.resnet18()
    assert frozen_batch_norms(model, stage(model, what), policy) == frozen


def test_a_batch_norm_without_weights_goes_with_its_neighbours() -> None:
    model = nn.Module()
    for name in ("low", "high"):
        part = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False))
        model.add_module(name, part)
    only_high = UnfreezeStage(start_epoch=0, trainable=frozenset({"high.0.weight"}))
    assert frozen_batch_norms(model, only_high, "frozen-with-weights") == {"low.1"}


def test_what_is_frozen_neither_moves_nor_drifts_and_what_trains_does_both() -> None:
    torch.manual_seed(3)
    model = models.resnet18(num_classes=2).train()
    apply_stage(model, stage(model, "from:layer4"), "frozen-with-weights")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):  # an epoch, with evaluations and the return to training
        model.eval()
        model.train()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith(("layer4", "fc"))}


def test_batch_norm_drifts_in_a_frozen_part_under_the_policy_train() -> None:
    torch.manual_seed(3)
    model = models.resnet18(num_classes=2).train()
    apply_stage(model, stage(model, "head"), "train")
    before = model.bn1.running_mean.clone()
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before)


def test_a_layer_that_is_let_loose_follows_the_mode_again() -> None:
    model = models.resnet18().train()
    head, every = make_stages({0: "head", 1: "all"}, model, ["fc"], analyze_blocks(model, 32))
    apply_stage(model, head, "frozen-with-weights")
    assert not any(layer.training for _, layer in named_batch_norms(model.train()))
    apply_stage(model, every, "frozen-with-weights")
    assert all(layer.training for _, layer in named_batch_norms(model))
    assert not any(layer.training for _, layer in named_batch_norms(model.eval()))
    assert all("train" not in vars(layer) for _, layer in named_batch_norms(model))
    apply_stage(model, every, "frozen-with-weights")
    assert not any(layer.training for _, layer in named_batch_norms(model)), "the model is in eval mode"
    assert all(parameter.requires_grad for parameter in model.parameters())

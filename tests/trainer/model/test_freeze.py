import pytest
import torch
from torch import nn
from torchvision import models

from trainer.model.batch_norm import named_batch_norms
from trainer.model.blocks import analyze_blocks
from trainer.model.built import UnfreezeStage
from trainer.model.freeze import BatchNormMode, apply_stage, frozen_batch_norms, make_stages, stage_at

BELOW_LAYER_4 = {"bn1", *(f"layer{i}.{j}.bn{k}" for i in (1, 2, 3) for j in (0, 1) for k in (1, 2))} | {
    f"layer{i}.0.downsample.1" for i in (2, 3)
}
LAYER_4 = {f"layer4.{j}.bn{k}" for j in (0, 1) for k in (1, 2)} | {"layer4.0.downsample.1"}


def make_stage(model: nn.Module, selection: str) -> UnfreezeStage:
    return make_stages(selection, model, ["fc"], analyze_blocks(model, 32))[0]


def test_later_stages_include_earlier_ones() -> None:
    model = models.resnet18()
    head, layer4, everything = make_stages({3: "all", 0: "head", 1: "layer4"}, model, ["fc"], analyze_blocks(model, 32))
    assert (head.start_epoch, layer4.start_epoch, everything.start_epoch) == (0, 1, 3)
    assert head.trainable == {"fc.weight", "fc.bias"} < layer4.trainable < everything.trainable
    assert everything.trainable == {name for name, _ in model.named_parameters()}
    stages = (head, layer4, everything)
    assert [stage_at(stages, epoch) for epoch in range(5)] == [head, layer4, layer4, everything, everything]
    separate = make_stages({0: "layer4", 1: "layer1"}, model, ["fc"], analyze_blocks(model, 32))[1]
    assert {name.split(".")[0] for name in separate.trainable} == {"layer1", "layer4", "fc"}


@pytest.mark.parametrize(
    ("mode", "selection", "frozen"),
    [
        ("frozen-with-weights", "all", set()),
        ("frozen-with-weights", "last:2", BELOW_LAYER_4),
        ("frozen-with-weights", "head", BELOW_LAYER_4 | LAYER_4),
        ("sync", "last:2", BELOW_LAYER_4),
        ("frozen", "all", BELOW_LAYER_4 | LAYER_4),
        ("train", "head", set()),
    ],
)
def test_frozen_batch_norms_of_each_mode(mode: BatchNormMode, selection: str, frozen: set[str]) -> None:
    model = models.resnet18()
    assert frozen_batch_norms(model, make_stage(model, selection), mode) == frozen


def test_a_batch_norm_without_weights_follows_its_parent() -> None:
    model = nn.Module()
    for name in ("low", "high"):
        model.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)))
    stage = UnfreezeStage(start_epoch=0, trainable=frozenset({"high.0.weight"}))
    assert frozen_batch_norms(model, stage, "frozen-with-weights") == {"low.1"}


def test_frozen_layers_do_not_change_and_trainable_layers_do() -> None:
    torch.manual_seed(3)
    model = models.resnet18(num_classes=2).train()
    apply_stage(model, make_stage(model, "from:layer4"), "frozen-with-weights")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):  # with an evaluation between two updates
        model.eval()
        model.train()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith(("layer4", "fc"))}
    apply_stage(model, make_stage(model, "head"), "train")
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"]), "in mode train, statistics change"


def test_an_unfrozen_batch_norm_follows_the_models_mode() -> None:
    model = models.resnet18().train()
    head, everything = make_stages({0: "head", 1: "all"}, model, ["fc"], analyze_blocks(model, 32))
    apply_stage(model, head, "frozen-with-weights")
    assert not any(layer.training for _, layer in named_batch_norms(model.train()))
    apply_stage(model, everything, "frozen-with-weights")
    assert all(layer.training for _, layer in named_batch_norms(model))
    assert not any(layer.training for _, layer in named_batch_norms(model.eval()))
    assert all("train" not in vars(layer) for _, layer in named_batch_norms(model))
    apply_stage(model, everything, "frozen-with-weights")
    assert not any(layer.training for _, layer in named_batch_norms(model)), "the model is in eval mode"
    assert all(parameter.requires_grad for parameter in model.parameters())

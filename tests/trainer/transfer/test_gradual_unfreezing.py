from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torchvision import models

from trainer.distributed.context import DistributedContext
from trainer.model.blocks import analyze_blocks
from trainer.model.freeze import apply_stage, make_stages
from trainer.transfer.frozen_features import NoFeatures
from trainer.transfer.gradual_unfreezing import GradualUnfreezing

STAGES = {0: "head", 2: "layer4", 3: "layer1"}
UPDATED = [{"fc"}, {"fc"}, {"layer4", "fc"}, {"layer1", "layer4", "fc"}]
"""Children of ResNet-18 that change in each epoch."""


def make_unfreezing(ctx: DistributedContext, lines: list[str]) -> GradualUnfreezing:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=2).train()
    stages = make_stages(STAGES, model, ["fc"], analyze_blocks(model, 32))
    apply_stage(model, stages[0], "frozen-with-weights")
    trainable = [p for name, p in model.named_parameters() if name in stages[-1].trainable]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    return GradualUnfreezing(
        ctx, model, optimizer, stages=stages, batch_norm="frozen-with-weights",
        features=NoFeatures(model, torch.clone), log=lines.append,
    )  # fmt: skip


def train_epoch(unfreezing: GradualUnfreezing, epoch: int) -> set[str]:
    """Make an update of an epoch; return the children of the model that changed, by parameters or statistics."""
    model, images = unfreezing.start_epoch(epoch), torch.randn(4, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in unfreezing.unwrapped.state_dict().items()}
    model(images).square().sum().backward()
    unfreezing.optimizer.step()
    unfreezing.optimizer.zero_grad()
    return children(name for name, value in unfreezing.unwrapped.state_dict().items() if (value != before[name]).any())


def children(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def with_moments(unfreezing: GradualUnfreezing) -> set[str]:
    names: dict[nn.Parameter, str] = {p: name for name, p in unfreezing.unwrapped.named_parameters()}
    return children(names[p] for p in unfreezing.optimizer.state)


def test_each_stage_updates_its_own_and_earlier_parameters_only(ctx: DistributedContext) -> None:
    lines: list[str] = []
    unfreezing = make_unfreezing(ctx, lines)
    for epoch, updated in enumerate(UPDATED):
        assert train_epoch(unfreezing, epoch) == updated
        assert with_moments(unfreezing) == updated
    assert lines == ["  from epoch 3 on, 8,394,754 parameters train", "  from epoch 4 on, 8,542,722 parameters train"]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_starts_in_the_stage_of_its_epoch(epoch: int, ctx: DistributedContext) -> None:
    unfreezing = make_unfreezing(ctx, [])
    unfreezing.restore_stage(epoch)
    trainable = {name for name, p in unfreezing.unwrapped.named_parameters() if p.requires_grad}
    assert children(trainable) == UPDATED[epoch]
    assert train_epoch(unfreezing, epoch) == UPDATED[epoch]

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from tests.trainer.training import make_train_step, same_tensors
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.batch_norm import allow_single_value_batches, freeze_batch_norm
from trainer.model.gradient_checkpointing import enable_gradient_checkpointing
from trainer.optim.ema import ModelEma


class CountingConv(nn.Conv2d):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


def make_block() -> nn.Sequential:
    return nn.Sequential(CountingConv(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))


class Net(nn.Module):
    """A network with two blocks that have BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stage = nn.Sequential(make_block(), make_block())
        self.head = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(4, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stage(self.stem(images)).mean(dim=(2, 3)))
        return logits

    def calls(self) -> list[int]:
        return [block[0].calls for block in self.stage]


def freeze_first_block(net: Net) -> None:
    net.stem.requires_grad_(requires_grad=False)
    net.stage[0].requires_grad_(requires_grad=False)
    freeze_batch_norm(net.stage[0])


@pytest.mark.parametrize("prepare", [allow_single_value_batches, freeze_first_block])
def test_updates_statistics_and_averages_are_equal_bit_for_bit(
    ctx: DistributedContext, prepare: Callable[[Net], object]
) -> None:
    torch.manual_seed(0)
    plain = Net()
    prepare(plain)
    recomputed = copy.deepcopy(plain)
    names = enable_gradient_checkpointing(recomputed, ("stem", "stage", "head"), ["head.1"])
    assert names == ("stage.0", "stage.1"), "neither single layers nor output layers"
    calls, results = [], []
    for net in (plain, copy.deepcopy(recomputed)):  # a copy recomputes its own blocks
        optimizer, ema = torch.optim.SGD(net.parameters(), lr=0.1), ModelEma(net, 0.9)
        step = make_train_step(ctx, grad_accum_steps=2)
        for number, size in enumerate([4, 1, 0, 3]):  # of an empty local batch, BatchNorm changes no statistics
            generator = torch.Generator().manual_seed(number)
            images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
            batch = (images, torch.arange(size) % 3, torch.arange(size))
            step(net, optimizer, batch, number, max(size, 1))
            ema.update(number + 1)
        net.eval()
        with torch.inference_mode():
            logits = net(torch.ones(2, 3, 8, 8))
        results.append((net.state_dict(), dict(ema.state_dict()), {"logits": logits}))
        calls.append(net.calls())
    for before, after in zip(*results, strict=True):
        assert same_tensors(before, after)
    assert calls[0] == [7, 7], "6 micro-batches, and the evaluation"
    assert calls[1] == [7 if prepare is freeze_first_block else 13, 13], "blocks that train are computed twice"


def test_blocks_of_torchvision_models() -> None:
    def enable(model: nn.Module, *blocks: str) -> tuple[str, ...]:
        return enable_gradient_checkpointing(model, blocks, ["fc"])

    resnet = models.resnet18()
    assert enable(resnet, "conv1", "layer1", "layer2", "fc") == ("layer1.0", "layer1.1", "layer2.0", "layer2.1")
    assert resnet.state_dict().keys() == models.resnet18().state_dict().keys()
    with pytest.raises(UserError, match=r"no block of this model consists of several layers: use train\.micro_batch"):
        enable(models.vgg11(init_weights=False), "features.0", "features.3", "classifier.6")

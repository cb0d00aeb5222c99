import copy

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.training import SmallNet, make_net
from trainer.distributed.context import init_distributed
from trainer.model.batch_norm import freeze_batch_norm
from trainer.optim.ema import ModelEma


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


@pytest.mark.parametrize("max_decay", [0.5, 0.1])
def test_the_average_is_the_weighted_sum_of_the_weights_so_far_with_a_decay_that_starts_low(max_decay: float) -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    fill(net, 1.0)
    ema = ModelEma(net, max_decay)
    expected = 1.0
    for step, value in enumerate([3.0, -2.0, 7.0, 4.0, 1.0, 5.0, 2.0, 4.0, 9.0], start=1):
        net[1].running_mean = torch.zeros(1)  # as DDP replaces buffers when it wraps the model again
        fill(net, value)
        ema.update(step)
        decay = min(max_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    for name, tensor in ema.model.state_dict().items():
        value = 9.0 if name.endswith("num_batches_tracked") else expected
        torch.testing.assert_close(tensor, torch.full_like(tensor, value), rtol=1e-6, atol=0)
    assert ema.model.state_dict()["1.num_batches_tracked"].dtype == torch.int64
    assert net[0].weight.tolist() == [[9.0, 9.0]], "the model itself is not changed"


def test_frozen_tensors_stay_equal_to_the_models_bit_for_bit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    with torch.no_grad():
        net[1].running_mean.copy_(torch.randn(5) * 1e-3)
    freeze_batch_norm(net)
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    ema = ModelEma(net, 0.999)
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    for step in range(1, 40):
        net.train()
        net(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    for name, tensor in ema.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("2."), name
        assert torch.equal(tensor, net.state_dict()[name]) != name.startswith("2."), name


def test_the_average_keeps_the_memory_layout_and_requires_no_gradient() -> None:
    ema = ModelEma(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last), 0.9)
    ema.update(1)
    averaged: Tensor = ema.model[0].weight  # type: ignore[index,assignment]
    assert averaged.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not any(m.training for m in ema.model.modules())


def test_the_average_computes_in_bf16_with_its_own_weights() -> None:
    ctx = init_distributed(device="cpu", precision="bf16", threads=1)
    net, images = make_net(), torch.rand(2, 3, 8, 8)
    model = ctx.accelerator.prepare_model(net)
    ema = ModelEma(ctx.unwrap(model), 0.9)
    before = model(images)
    fill(net, 0.0)
    assert not model(images).any()
    averaged = ema.model(images)
    assert torch.equal(averaged, before)
    assert averaged.dtype == torch.float32
    assert not torch.equal(averaged, SmallNet.forward(ema.model, images))  # type: ignore[arg-type]


def test_statistics_of_the_average_are_frozen_where_the_models_are_now() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    ema = ModelEma(net, 0.9)

    def frozen() -> list[str]:
        return [name for name, module in ema.with_model().named_modules() if "train" in vars(module)]

    assert frozen() == []
    freeze_batch_norm(net[0])
    assert frozen() == ["model.0", "average.0"]
    del net[0].train  # unfrozen at a later stage
    assert frozen() == []


def test_without_a_decay_the_model_itself_is_evaluated_and_nothing_is_saved() -> None:
    net = make_net()
    ema = ModelEma(net, None)
    ema.update(1)
    assert (ema.model is net, ema.with_model() is net, ema.state_dict()) == (True, True, {})

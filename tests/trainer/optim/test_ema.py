"""The moving average of the weights, in closed form, and what evaluation, checkpoints and model file hold of it."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from tests.trainer.test_loop import PLAN, Kept, Net, Told, batches, normalize, prepare, unevaluated
from trainer.checkpoint import store
from trainer.checkpoint.tensors import restore_ema, snapshot_ema
from trainer.distributed import context
from trainer.errors import UserError
from trainer.loop import Evaluations, ResumePoint, fit
from trainer.model.batch_norm import freeze_batch_norm
from trainer.optim.ema import ModelEma, get_decay


@pytest.fixture
def accelerator() -> Accelerator:
    return context.start(device="cpu", precision="fp32", threads=1).accelerator


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


def test_the_decay_starts_low_and_grows_to_what_was_asked_for() -> None:
    assert [get_decay(updates, 0.9) for updates in (1, 2, 70, 80, 81, 1000)] == [
        2 / 11,
        3 / 12,
        71 / 80,
        0.9,
        0.9,
        0.9,
    ]
    assert get_decay(1, 0.1) == 0.1


def test_after_k_updates_the_average_is_the_weighted_sum_of_what_it_has_seen() -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    set_to(net, 1.0)
    ema = ModelEma(net, 0.5)
    values = [3.0, -2.0, 7.0, 4.0]
    for updates, value in enumerate(values, start=1):
        set_to(net, value)
        ema.update(updates)
    decays = [min(0.5, (1 + k) / (10 + k)) for k in range(1, 5)]
    # w_0 times all decays, and each value times its own share and all decays after it.
    expected = torch.tensor(decays).prod().item()
    for number, value in enumerate(values):
        expected += value * (1 - decays[number]) * torch.tensor(decays[number + 1 :]).prod().item()
    for name, tensor in ema.model.state_dict().items():
        wanted = 4.0 if name.endswith("num_batches_tracked") else expected
        torch.testing.assert_close(tensor, torch.full_like(tensor, wanted), rtol=1e-6, atol=0)
    assert ema.model.state_dict()["1.num_batches_tracked"].dtype == torch.int64
    assert net[0].weight.tolist() == [[4.0, 4.0]], "the model itself is left alone"


def test_what_does_not_change_stays_equal_bit_for_bit_while_the_rest_is_averaged() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    with torch.no_grad():
        net[1].running_mean.copy_(torch.randn(5) * 1e-3)
    freeze_batch_norm(net)
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    ema = ModelEma(net, 0.999)
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    for updates in range(1, 40):
        net.train()
        net(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(updates)
    for name, tensor in ema.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("2."), name
        assert torch.equal(tensor, net.state_dict()[name]) != name.startswith("2."), name


def test_the_average_keeps_the_memory_layout_and_asks_for_no_gradient() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    ema = ModelEma(net, 0.9)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    expected = torch.lerp(ema.model[0].weight, net[0].weight, 1 - 2 / 11)  # type: ignore[index]
    ema.update(1)
    averaged = ema.model[0].weight  # type: ignore[index]
    torch.testing.assert_close(averaged, expected)
    assert averaged.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator]
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not any(m.training for m in ema.model.modules())


def test_under_reduced_precision_the_average_computes_by_its_own_weights() -> None:
    accelerator = context.start(device="cpu", precision="bf16", threads=1).accelerator
    net = Net()
    model = accelerator.prepare_model(net)
    ema = ModelEma(accelerator.unwrap_model(model, keep_fp32_wrapper=True), 0.9)
    images = torch.rand(2, 3, 8, 8)
    before = model(images)
    set_to(net, 0.0)
    assert not model(images).any()
    averaged = ema.model(images)
    assert torch.equal(averaged, before)
    assert averaged.dtype == torch.float32
    with torch.no_grad():
        plain = Net.forward(ema.model, images)  # type: ignore[arg-type]
    assert not torch.equal(averaged, plain), "in bf16, as the model itself"
    torch.testing.assert_close(averaged, plain, rtol=0.05, atol=0.02)


def test_statistics_of_the_average_are_frozen_where_the_models_are_now() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    ema = ModelEma(net, 0.9)

    def frozen() -> list[str]:
        pair = dict(ema.and_model().named_modules())
        return [name for name, module in pair.items() if "train" in vars(module)]

    assert frozen() == []
    freeze_batch_norm(net[0])
    assert frozen() == ["model.0", "average.0"]
    del net[0].train  # as where it is unfrozen at a later stage
    assert frozen() == []


class Norm(Net):
    """A net with statistics to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.BatchNorm1d(4)  # type: ignore[assignment]


def test_the_loop_averages_after_every_update_and_evaluates_the_average(accelerator: Accelerator) -> None:
    torch.manual_seed(0)
    net, seen = Norm(), list[nn.Module]()
    reference = copy.deepcopy(net)
    model, optimizer = prepare(net, accelerator)
    ema = ModelEma(accelerator.unwrap_model(model), 0.9)

    def evaluate(model: nn.Module, interrupted: object) -> Evaluations:
        seen.append(model)
        return {}

    fit(
        model, optimizer, batches(), PLAN, ResumePoint(),
        accelerator=accelerator, normalize=normalize, evaluate=evaluate, keeper=Kept(), listener=Told(),
        batch_paths=lambda epoch, step: [], ema=ema,
    )  # fmt: skip
    assert [id(model) for model in seen] == [id(ema.model)] * PLAN.epochs

    # The same updates without the loop's average, averaged by hand in double precision.
    history = [{name: tensor.double() for name, tensor in reference.state_dict().items()}]

    class Listening(Told):
        def step(self, epoch: int, epoch_step: int) -> None:
            history.append({name: tensor.double() for name, tensor in reference.state_dict().items()})

    model, optimizer = prepare(reference, accelerator)
    fit(
        model, optimizer, batches(), PLAN, ResumePoint(),
        accelerator=accelerator, normalize=normalize, evaluate=unevaluated, keeper=Kept(), listener=Listening(),
        batch_paths=lambda epoch, step: [],
    )  # fmt: skip
    average = history[0]
    for updates, now in enumerate(history[1:], start=1):
        decay = min(0.9, (1 + updates) / (10 + updates))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    assert len(history) == 7
    for name, tensor in ema.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)
            assert not torch.equal(tensor, net.state_dict()[name]), f"{name} is not the last update's"
        else:
            assert torch.equal(tensor, net.state_dict()[name])


def test_a_checkpoint_and_a_run_that_differ_in_it_are_told_apart(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    set_to(net, 3.0)
    with pytest.raises(
        UserError, match=r"holds no moving average .* saved without regularise\.ema.*run is with it"
    ):
        restore_ema(tmp_path, net)
    saved = snapshot_ema(net)[store.AVERAGE]
    save_file(saved, tmp_path / store.AVERAGE)
    with pytest.raises(
        UserError, match=r"holds a moving average .* saved with regularise\.ema.*run is without it"
    ):
        restore_ema(tmp_path, None)
    set_to(net, 5.0)
    save_file({name: tensor for name, tensor in saved.items() if name != "0.bias"}, tmp_path / store.AVERAGE)
    with pytest.raises(UserError, match=r"average\.safetensors: does not fit this run: 0\.bias is missing"):
        restore_ema(tmp_path, net)
    assert net[0].weight.unique().tolist() == [5.0]
    save_file(saved, tmp_path / store.AVERAGE)
    restore_ema(tmp_path, net)
    assert all(tensor.unique().tolist() == [3.0] for tensor in net.state_dict().values())

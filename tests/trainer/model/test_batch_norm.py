import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from tests.trainer.training import same_tensors
from trainer.errors import UserError
from trainer.model.batch_norm import (
    allow_single_value_batches,
    average_batch_norm_statistics,
    batch_norm_in_eval,
    batch_norms,
    freeze_batch_norm,
    gather_batch_norm_statistics,
    restore_batch_norm_statistics,
)

Copy = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """A network for 8 x 8 images with two BatchNorm layers; the second one has 1 x 1 maps."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum))
        self.second = nn.Sequential(nn.Conv2d(4, 5, 6), nn.BatchNorm2d(5, momentum=momentum))
        self.out = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.out(self.second(self.first(images)).flatten(1))
        return logits


def set_statistics(model: nn.Module) -> nn.Module:
    """Set the running statistics to random values; return the model."""
    for number, layer in enumerate(batch_norms(model)):
        nn.init.uniform_(layer.running_mean, -1, 1)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        layer.num_batches_tracked.fill_(10 + number)
    return model


def make_net(seed: int = 0, momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    net = set_statistics(Net(momentum))
    for layer in batch_norms(net):
        layer.num_batches_tracked.add_(4 * seed)
    return net


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def update(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def unchanged(model: nn.Module) -> nn.Module:
    return model


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def test_only_layers_with_running_statistics_are_changed() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.SyncBatchNorm(3)
    )
    assert batch_norms(model) == [model[0], model[3]]
    assert freeze_batch_norm(model) == 2
    assert allow_single_value_batches(model) == 1, "SyncBatchNorm has the values of all processes"
    assert "forward" not in vars(model[3])
    assert freeze_batch_norm(models.squeezenet1_1()) == 0


@pytest.mark.parametrize(("copied", "momentum"), [(unchanged, 0.1), (copy.deepcopy, None), (pickled, 0.1)])
def test_frozen_statistics_stay_bit_identical_while_weights_train(copied: Copy, momentum: float | None) -> None:
    model, images = make_net(momentum=momentum), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(images)
    assert not torch.allclose(copy.deepcopy(model).train()(images), expected)
    assert freeze_batch_norm(model) == 2
    model = copied(model)
    assert torch.equal(model.train()(images), expected), "frozen statistics are used in training"
    before = statistics(model)
    for mode in (True, False, True):
        model.train(mode)
        assert [layer.training for layer in batch_norms(model)] == [False, False]
        assert model.out.training is mode
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    update(model)
    update(model)
    assert same_tensors(statistics(model), before)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("copied", [unchanged, copy.deepcopy, pickled])
def test_a_single_value_per_channel_uses_the_running_statistics(copied: Copy) -> None:
    model, images = make_net().train(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(model)(images)
    assert allow_single_value_batches(model) == 2
    model = copied(model)
    before = statistics(model)
    logits = model(images)
    for name, buffer in statistics(model).items():  # the first layer has 6 x 6 values and updates its statistics
        assert torch.equal(buffer, before[name]) == name.startswith("second"), name
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    reference = copy.deepcopy(model)
    reference.load_state_dict({**reference.state_dict(), **before})
    reference.second[1].eval()
    assert torch.equal(reference(images), logits)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_larger_batches_are_normalized_as_by_torch(momentum: float | None) -> None:
    expected = make_net(momentum=momentum).train()
    model = copy.deepcopy(expected)
    allow_single_value_batches(model)
    for size in (2, 5):
        images = torch.randn(size, 3, 8, 8)
        assert torch.equal(expected(images), model(images))
    assert same_tensors(statistics(expected), statistics(model))
    assert torch.equal(expected.eval()(images), model.eval()(images))


def test_single_values_work_in_autocast_and_as_vectors() -> None:
    model = make_net().train()
    allow_single_value_batches(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(1, 3, 8, 8))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    layer = nn.BatchNorm1d(3)
    allow_single_value_batches(layer)
    assert layer(torch.randn(1, 3)).shape == (1, 3)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("change", [freeze_batch_norm, allow_single_value_batches])
def test_a_copy_does_not_change_the_original(copied: Copy, change: Callable[[nn.Module], int]) -> None:
    model = make_net()
    change(model)
    other = copied(model)
    attribute = "train" if change is freeze_batch_norm else "forward"
    assert all(vars(layer)[attribute].args == (layer,) for layer in batch_norms(other))
    before = copy.deepcopy(model.state_dict())
    update(other)
    assert same_tensors(dict(model.state_dict()), dict(before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_norm_in_eval_restores_modes_after_an_error() -> None:
    model = make_net().train()
    model.second[1].eval()
    before = statistics(model)

    def run_in_block() -> None:
        with batch_norm_in_eval(model):
            assert [layer.training for layer in batch_norms(model)] == [False, False]
            assert model.out.training
            model(torch.randn(1, 3, 8, 8))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_in_block()
    assert [layer.training for layer in batch_norms(model)] == [True, False]
    assert same_tensors(statistics(model), before)


# Statistics of several processes. tests/distributed gathers and averages them with real processes.


def gathered(*models: nn.Module) -> dict[str, Tensor]:
    """Return what `gather_batch_norm_statistics` returns if each process has one of the models."""
    return {
        f"{rank}.{name}": buffer.double() for rank, model in enumerate(models) for name, buffer in model.named_buffers()
    }


@pytest.mark.parametrize("kind", ["one process", "frozen layers", "no layers"])
def test_no_collective_is_called_without_need(kind: str) -> None:
    """There is no process group, so that a collective would raise."""
    model = models.squeezenet1_1() if kind == "no layers" else make_net()
    world_size = 1 if kind == "one process" else 2
    if kind == "frozen layers":
        freeze_batch_norm(model)
    before = statistics(model)
    average_batch_norm_statistics(model, world_size)
    assert gather_batch_norm_statistics(model, world_size) == {}
    for rank in range(world_size):
        restore_batch_norm_statistics(model, {}, rank=rank, world_size=world_size)
    restore_batch_norm_statistics(model, {}, rank=1, world_size=3)  # a checkpoint of one process
    assert same_tensors(statistics(model), before)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_process_gets_its_own_statistics_back_and_another_number_of_processes_the_mean(world_size: int) -> None:
    ranks, model = [make_net(rank) for rank in range(3)], make_net(7)
    restore_batch_norm_statistics(model, gathered(*ranks), rank=world_size - 1, world_size=world_size)
    for name, buffer in statistics(model).items():
        of_ranks = [statistics(rank)[name].double() for rank in ranks]
        if world_size == 3:
            assert torch.equal(buffer, of_ranks[world_size - 1].to(buffer.dtype))
        else:
            torch.testing.assert_close(buffer.double(), torch.stack(of_ranks).mean(0), rtol=1e-6, atol=1e-7)
    # At the end of an epoch the statistics are equal on all processes; they stay bit-identical.
    restore_batch_norm_statistics(model, gathered(*[make_net(1)] * 3), rank=0, world_size=2)
    assert same_tensors(statistics(model), statistics(make_net(1)))


def test_statistics_of_frozen_layers_are_not_restored() -> None:
    model, other = make_net(0), make_net(1)
    before, expected = statistics(model), statistics(other)
    freeze_batch_norm(model.first)
    unfrozen = {name: tensor for name, tensor in gathered(other, other).items() if ".second." in name}
    restore_batch_norm_statistics(model, unfrozen, rank=0, world_size=2)
    for name, buffer in statistics(model).items():
        assert torch.equal(buffer, (expected if name.startswith("second") else before)[name]), name
    with pytest.raises(UserError, match="another model: expected 3 tensors for each process"):
        restore_batch_norm_statistics(model, gathered(other, other), rank=0, world_size=2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("1.first.1.running_mean"),
        lambda tensors: tensors.update({"2.first.1.running_mean": torch.zeros(4, dtype=torch.float64)}),
        lambda tensors: tensors.update({"1.third.1.running_mean": tensors.pop("1.first.1.running_mean")}),
        lambda tensors: tensors.update({"1.first.1.running_mean": torch.zeros(5, dtype=torch.float64)}),
        lambda tensors: tensors.update({"1.first.1.running_mean": torch.zeros(4)}),
        lambda tensors: tensors.update({"01.first.1.running_var": tensors.pop("1.first.1.running_var")}),
    ],
    ids=["missing", "extra", "name", "shape", "dtype", "rank"],
)
def test_statistics_of_another_model_change_nothing(damage: Callable[[dict[str, Tensor]], object]) -> None:
    model, tensors = make_net(7), gathered(make_net(0), make_net(1))
    damage(tensors)
    before = statistics(model)
    with pytest.raises(UserError, match=r"those of another model: expected 6 tensors .* --run\.resume never"):
        restore_batch_norm_statistics(model, tensors, rank=1, world_size=2)
    assert same_tensors(statistics(model), before)

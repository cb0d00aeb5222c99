import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

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


class Small(nn.Module):
    """Two BatchNorm layers, of which the second one sees 1 x 1 maps."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum))
        self.second = nn.Sequential(nn.Conv2d(4, 5, 6), nn.BatchNorm2d(5, momentum=momentum))
        self.out = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.second(self.first(images)).flatten(1))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_statistics(model: nn.Module) -> nn.Module:
    """Give the running statistics values that are nobody's default."""
    for number, layer in enumerate(batch_norms(model)):
        nn.init.uniform_(layer.running_mean, -1, 1)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        layer.num_batches_tracked.fill_(10 + number)
    return model


def step(model: nn.Module, size: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(size, 3, 8, 8)).square().sum().backward()
    optimizer.step()


def as_is(model: nn.Module) -> nn.Module:
    return model


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("copied", [as_is, copy.deepcopy, saved])


def test_the_layers_are_those_with_running_statistics() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.BatchNorm3d(3)
    )
    assert batch_norms(model) == [model[0], model[3]]
    assert freeze_batch_norm(model) == allow_single_value_batches(model) == 2
    assert freeze_batch_norm(models.squeezenet1_1()) == 0


@copies
@pytest.mark.parametrize("momentum", [0.1, None])
def test_frozen_statistics_stay_bit_for_bit_and_weights_train(copied: Copy, momentum: float | None) -> None:
    torch.manual_seed(0)
    model = with_statistics(Small(momentum))
    assert freeze_batch_norm(model) == 2
    model = copied(model)
    before = statistics(model)
    for mode in (True, False, True):
        model.train(mode)
        assert [layer.training for layer in batch_norms(model)] == [False, False]
        assert model.out.training is mode
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        model.train()
        step(model)
    assert same(statistics(model), before)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, parameters[name]), name


def test_frozen_statistics_are_the_ones_in_use() -> None:
    torch.manual_seed(0)
    model = with_statistics(Small())
    images = torch.randn(4, 3, 8, 8)
    in_eval = copy.deepcopy(model).eval()(images)
    assert not torch.allclose(copy.deepcopy(model).train()(images), in_eval)
    freeze_batch_norm(model)
    assert torch.equal(model.train()(images), in_eval)


@copies
def test_one_value_per_channel_trains_and_leaves_the_statistics(copied: Copy) -> None:
    torch.manual_seed(0)
    model = with_statistics(Small()).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(model)(torch.randn(1, 3, 8, 8))
    assert allow_single_value_batches(model) == 2
    model = copied(model)
    before, images = statistics(model), torch.randn(1, 3, 8, 8)
    logits = model(images)
    after = statistics(model)
    for name in before:  # the first layer sees 6 x 6 values: it learns from them as ever
        assert torch.equal(before[name], after[name]) == name.startswith("second"), name
    logits.sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()
    )
    # the guarded layer did what it does in eval mode
    reference = copy.deepcopy(model)
    reference.load_state_dict({**reference.state_dict(), **before})
    reference.second[1].eval()
    torch.testing.assert_close(reference(images), logits, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_guard_changes_nothing_where_torch_would_not_raise(momentum: float | None) -> None:
    torch.manual_seed(0)
    plain = with_statistics(Small(momentum)).train()
    guarded = copy.deepcopy(plain)
    allow_single_value_batches(guarded)
    for size in (2, 5):
        images = torch.randn(size, 3, 8, 8)
        assert torch.equal(plain(images), guarded(images))
    assert same(statistics(plain), statistics(guarded))
    assert plain.first[1].num_batches_tracked == 12
    assert torch.equal(plain.eval()(images), guarded.eval()(images))


def test_a_guarded_layer_takes_bf16_as_autocast_gives_it() -> None:
    model = with_statistics(Small()).train()
    allow_single_value_batches(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(1, 3, 8, 8))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_single_vector_is_guarded_too() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    allow_single_value_batches(model)
    assert model(torch.randn(1, 3)).shape == (1, 3)
    assert model[0].num_batches_tracked == 0


def test_synchronised_layers_are_not_guarded() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    assert allow_single_value_batches(model) == 1
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("change", [freeze_batch_norm, allow_single_value_batches])
def test_a_copy_is_bound_to_its_own_layers(copied: Copy, change: Callable[[nn.Module], int]) -> None:
    model = with_statistics(Small())
    change(model)
    other = copied(model)
    own = {id(module) for module in other.modules()}
    assert own.isdisjoint({id(module) for module in model.modules()})
    attribute = "train" if change is freeze_batch_norm else "forward"
    for layer in batch_norms(other):
        assert vars(layer)[attribute].args == (layer,)
        assert id(vars(layer)[attribute].args[0]) in own
    # and each learns for itself
    before, state = statistics(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    other.train()
    step(other)
    assert same(statistics(model), before)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_and_guarded_together_on_a_real_network() -> None:
    torch.manual_seed(0)
    model = with_statistics(models.resnet18(num_classes=3))
    assert freeze_batch_norm(model) == allow_single_value_batches(model) == 20
    before = statistics(model)
    model.train()
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert same(statistics(model), before)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_block_in_eval_restores_each_layers_mode_even_after_an_error() -> None:
    model = with_statistics(Small()).train()
    model.second[1].eval()
    before = statistics(model)

    def in_block() -> None:
        with batch_norm_in_eval(model):
            assert [layer.training for layer in batch_norms(model)] == [False, False]
            assert model.out.training
            model(torch.randn(1, 3, 8, 8))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        in_block()
    assert [layer.training for layer in batch_norms(model)] == [True, False]
    assert same(statistics(model), before)


def test_one_process_has_nothing_to_average() -> None:
    model = with_statistics(Small())
    before = statistics(model)
    average_batch_norm_statistics(model, 1)  # there is no process group: a collective would raise
    freeze_batch_norm(model)
    average_batch_norm_statistics(model, 2)
    average_batch_norm_statistics(models.squeezenet1_1(), 2)
    assert same(statistics(model), before)


# Each process's own statistics, kept in a checkpoint; tests/distributed/test_processes.py gathers them for real


def of_rank(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    model = with_statistics(Small())
    for layer in batch_norms(model):
        layer.num_batches_tracked.add_(4 * rank)
    return model


def gathered_of(*models: nn.Module) -> dict[str, Tensor]:
    """Return what `gather_batch_norm_statistics` does among as many processes as there are models."""
    return {
        f"{rank}.{name}": buffer.double()
        for rank, model in enumerate(models)
        for name, buffer in model.named_buffers()
    }


def test_one_process_has_its_statistics_in_its_model() -> None:
    model = of_rank(0)
    before = statistics(model)
    assert gather_batch_norm_statistics(model, 1) == {}
    restore_batch_norm_statistics(model, {}, rank=0, world_size=1)
    restore_batch_norm_statistics(model, {}, rank=1, world_size=3)  # one process has written it, three go on
    assert same(statistics(model), before)


@pytest.mark.parametrize("without", ["frozen layers", "no layers"])
def test_where_nothing_is_live_nothing_is_gathered(without: str) -> None:
    model = of_rank(0) if without == "frozen layers" else models.squeezenet1_1()
    freeze_batch_norm(model)
    assert gather_batch_norm_statistics(model, 2) == {}, "there is no process group: a collective would raise"
    restore_batch_norm_statistics(model, {}, rank=1, world_size=2)
    with pytest.raises(UserError, match="those of another model: expected 0 tensors for each process"):
        restore_batch_norm_statistics(model, gathered_of(of_rank(0)), rank=0, world_size=1)


def test_the_same_number_of_processes_gets_each_its_own_back() -> None:
    ranks = [of_rank(rank) for rank in range(3)]
    for rank, expected in enumerate(ranks):
        model = of_rank(7)
        restore_batch_norm_statistics(model, gathered_of(*ranks), rank=rank, world_size=3)
        assert same(statistics(model), statistics(expected))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_another_number_of_processes_begins_with_the_average(world_size: int) -> None:
    ranks = [of_rank(rank) for rank in range(3)]
    model = of_rank(7)
    restore_batch_norm_statistics(model, gathered_of(*ranks), rank=world_size - 1, world_size=world_size)
    for name, buffer in statistics(model).items():
        parts = torch.stack([statistics(rank)[name].double() for rank in ranks])
        torch.testing.assert_close(buffer.double(), parts.mean(0), rtol=1e-6, atol=1e-7)


def test_equal_statistics_stay_as_they_are_bit_for_bit_on_another_number_of_processes() -> None:
    # As at the end of an epoch, where they were averaged already.
    model = of_rank(7)
    restore_batch_norm_statistics(model, gathered_of(*[of_rank(1)] * 3), rank=0, world_size=2)
    assert same(statistics(model), statistics(of_rank(1)))


def test_a_frozen_layer_keeps_the_sources_statistics() -> None:
    model, other = of_rank(0), of_rank(1)
    for each in (model, other):
        assert freeze_batch_norm(each.first) == 1
    before = statistics(model)
    live = {name: tensor for name, tensor in gathered_of(other, other).items() if ".second." in name}
    restore_batch_norm_statistics(model, live, rank=0, world_size=2)
    after, expected = statistics(model), statistics(other)
    for name in before:
        assert torch.equal(after[name], (expected if name.startswith("second") else before)[name]), name
    with pytest.raises(UserError, match="another model"):
        restore_batch_norm_statistics(model, gathered_of(other, other), rank=0, world_size=2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("1.first.1.running_mean"),
        lambda found: found.update({"2.first.1.running_mean": torch.zeros(4, dtype=torch.float64)}),
        lambda found: found.update({"1.third.1.running_mean": found.pop("1.first.1.running_mean")}),
        lambda found: found.update({"1.first.1.running_mean": torch.zeros(5, dtype=torch.float64)}),
        lambda found: found.update({"1.first.1.running_mean": torch.zeros(4)}),
        lambda found: found.update({"01.first.1.running_var": found.pop("1.first.1.running_var")}),
    ],
    ids=["one missing", "one more", "another name", "another shape", "another kind", "another rank"],
)
def test_statistics_of_another_model_are_refused_and_nothing_is_changed(
    damage: Callable[[dict[str, Tensor]], object],
) -> None:
    model, found = of_rank(7), gathered_of(of_rank(0), of_rank(1))
    damage(found)
    before = statistics(model)
    with pytest.raises(UserError, match=r"those of another model: expected 6 tensors .* --run\.resume never"):
        restore_batch_norm_statistics(model, found, rank=1, world_size=2)
    assert same(statistics(model), before)

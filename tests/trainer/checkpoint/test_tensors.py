import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from trainer.checkpoint.store import MODEL, OPTIMIZER, STATISTICS
from trainer.checkpoint.tensors import load_batch_norm_statistics, restore, snapshot
from trainer.errors import UserError
from trainer.model.batch_norm import freeze_batch_norm, restore_batch_norm_statistics


def network(seed: int = 0, *, width: int = 4, channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 3)
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, channels_last: bool = False
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(5, 3, 8, 8, generator=generator).contiguous(memory_format=layout)
        nn.functional.cross_entropy(model(images), torch.arange(5) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key} of {name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether names, bits and memory layout are the same."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name])
        and (first[name].dtype, first[name].stride()) == (second[name].dtype, second[name].stride())
        for name in first
    )


def write(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, tensors in snapshot(model, optimizer).items():
        (path / name).write_bytes(save(tensors))


Make = Callable[[nn.Module], torch.optim.Optimizer]
KINDS: list[tuple[Make, bool]] = [
    (make, channels_last) for make in (sgd, adamw) for channels_last in (False, True)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def saved(path: Path) -> Path:
    """Return the state of a network under SGD after a few steps."""
    model = network()
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    write(path, model, optimizer)
    return path


def refusal(path: Path, model: nn.Module | None = None, make: Any = sgd, *, updated: bool = True) -> str:
    """Return why the state is refused; neither model nor optimizer has been touched."""
    model = model or network(1)
    optimizer = make(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        restore(path, model, optimizer, updated=updated)
    assert same(before, model.state_dict())
    assert not optimizer.state
    text = str(caught.value)
    assert "\n" not in text
    return text


def misfit(*args: Any, **settings: Any) -> str:
    """Return what of the state does not fit."""
    text = refusal(*args, **settings)
    prefix = f"{args[0]}: does not fit this run: "
    suffix = ". Choose another run.dir, or start anew with --run.resume never, which moves the run aside"
    assert text.startswith(prefix)
    assert text.endswith(suffix)
    return text[len(prefix) : -len(suffix)]


# What is captured


@pytest.mark.parametrize(("make", "channels_last"), KINDS)
def test_what_is_captured_is_a_copy_that_training_on_does_not_change(make: Make, channels_last: bool) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model)
    train(model, optimizer, range(2), channels_last=channels_last)
    captured = snapshot(model, optimizer)
    before = {
        (file, name): tensor.clone() for file, held in captured.items() for name, tensor in held.items()
    }
    train(model, optimizer, range(2, 4), channels_last=channels_last)
    assert captured.keys() == {MODEL, OPTIMIZER}
    assert captured[MODEL].keys() == model.state_dict().keys()
    for (file, name), tensor in before.items():
        held = captured[file][name]
        assert torch.equal(held, tensor)
        assert held.is_contiguous(), "as a file holds it"
        assert not held.requires_grad
        assert held.device.type == "cpu"
    kept = {sgd: 1, adamw: 3}[make]
    assert len(captured[OPTIMIZER]) == kept * len(list(model.parameters()))


def test_tensors_that_share_memory_are_written_each() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, shared)
    captured = snapshot(model, sgd(model))
    assert load(save(captured[MODEL])).keys() == model.state_dict().keys()


# Round trips


@pytest.mark.parametrize(("make", "channels_last"), KINDS)
def test_weights_and_moments_come_back_bit_for_bit_and_in_their_layout(
    make: Make, channels_last: bool, path: Path
) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model)
    train(model, optimizer, range(3), channels_last=channels_last)
    write(path, model, optimizer)

    other = network(1, channels_last=channels_last)
    other_optimizer = make(other)
    restore(path, other, other_optimizer, updated=True)
    assert same(model.state_dict(), other.state_dict())
    assert same(moments(model, optimizer), moments(other, other_optimizer))
    weight = other[0].weight
    assert isinstance(weight, Tensor)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert weight.is_contiguous(memory_format=layout)
    kept = [value for value in other_optimizer.state[weight].values() if value.dim() == 4]
    assert kept
    assert all(value.is_contiguous(memory_format=layout) for value in kept)


@pytest.mark.parametrize(("make", "channels_last"), KINDS)
def test_training_goes_on_as_if_it_had_not_stopped(make: Make, channels_last: bool, path: Path) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model)
    train(model, optimizer, range(3), channels_last=channels_last)
    write(path, model, optimizer)
    train(model, optimizer, range(3, 6), channels_last=channels_last)

    other = network(1, channels_last=channels_last)
    other_optimizer = make(other)
    restore(path, other, other_optimizer, updated=True)
    for name in (MODEL, OPTIMIZER):
        (path / name).write_bytes(b"overwritten")  # what was read is no window on the file
    train(other, other_optimizer, range(3, 6), channels_last=channels_last)
    assert same(model.state_dict(), other.state_dict())
    assert same(moments(model, optimizer), moments(other, other_optimizer))


def test_a_state_is_restored_over_another_one(saved: Path) -> None:
    model = network(1)
    optimizer = sgd(model)
    train(model, optimizer, range(5, 7))
    restore(saved, model, optimizer, updated=True)
    assert same(model.state_dict(), load_file(saved / MODEL))
    found = load_file(saved / OPTIMIZER)
    assert {name: found[name.replace(" of ", ".")].tolist() for name in moments(model, optimizer)} == {
        name: tensor.tolist() for name, tensor in moments(model, optimizer).items()
    }


@pytest.mark.parametrize("first_is_channels_last", [False, True])
def test_a_file_of_the_one_layout_serves_the_other(first_is_channels_last: bool, path: Path) -> None:
    model = network(channels_last=first_is_channels_last)
    optimizer = sgd(model)
    train(model, optimizer, range(3), channels_last=first_is_channels_last)
    write(path, model, optimizer)
    other = network(1, channels_last=not first_is_channels_last)
    other_optimizer = sgd(other)
    restore(path, other, other_optimizer, updated=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    layout = torch.contiguous_format if first_is_channels_last else torch.channels_last
    for name, value in moments(other, other_optimizer).items():
        assert torch.equal(value, moments(model, optimizer)[name])
        assert value.dim() != 4 or value.is_contiguous(memory_format=layout)


def test_the_groups_and_their_learning_rates_are_those_of_this_run(saved: Path) -> None:
    model = network(1)
    optimizer = torch.optim.SGD(
        [
            {"params": list(model[4].parameters()), "name": "head", "peak_lr": 0.5, "lr": 0.5},
            {"params": [*model[0].parameters(), *model[1].parameters()], "name": "backbone"},
        ],
        lr=0.3,
        momentum=0.9,
    )
    restore(saved, model, optimizer, updated=True)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("head", 0.5),
        ("backbone", 0.3),
    ]
    found = load_file(saved / OPTIMIZER)
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, found[f"momentum_buffer.{name}"]), "whatever the groups' order"


def test_frozen_parameters_have_no_moments(path: Path) -> None:
    model = network()
    optimizer = sgd(model[4])
    train(model, optimizer, range(2))
    write(path, model, optimizer)
    assert load_file(path / OPTIMIZER).keys() == {"momentum_buffer.4.weight", "momentum_buffer.4.bias"}
    other = network(1)
    other_optimizer = sgd(other[4])
    restore(path, other, other_optimizer, updated=True)
    assert same(model.state_dict(), other.state_dict())
    assert len(other_optimizer.state) == 2


@pytest.mark.parametrize("begun", ["here", "there"])
def test_moments_that_one_device_begins_with_and_the_other_does_not_are_no_obstacle(
    begun: str, path: Path
) -> None:
    """On GPUs the optimizer begins with empty moments, also of what has yet to be let loose."""

    def unfreezing(seed: int, *, begins: bool) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = network(seed)
        optimizer = sgd(model)
        model[0].requires_grad_(requires_grad=False)
        if begins:
            for parameter in model.parameters():
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return model, optimizer

    model, optimizer = unfreezing(0, begins=begun == "there")
    train(model, optimizer, range(2))
    write(path, model, optimizer)
    other, other_optimizer = unfreezing(1, begins=begun == "here")
    restore(path, other, other_optimizer, updated=True)
    assert same(model.state_dict(), other.state_dict())
    mine, theirs = moments(model, optimizer), moments(other, other_optimizer)
    trained = {name for name in mine if not name.startswith("momentum_buffer of 0.")}
    assert trained
    assert all(torch.equal(mine[name], theirs[name]) for name in trained)
    frozen = {name for name in theirs if name.startswith("momentum_buffer of 0.")}
    assert len(frozen) == (2 if begun == "here" else 0)
    assert not any(theirs[name].any() for name in frozen)


def test_without_momentum_there_is_nothing_to_keep(path: Path) -> None:
    model = network()
    optimizer = sgd(model, momentum=0)
    train(model, optimizer, range(2))
    write(path, model, optimizer)
    assert not load_file(path / OPTIMIZER)
    other = network(1)
    restore(path, other, sgd(other, momentum=0), updated=True)
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("make", [sgd, adamw])
def test_before_the_first_update_there_are_no_moments(make: Make, path: Path) -> None:
    """fp16's loss scaling skips the first updates until it has settled; in a short epoch all of them."""
    model = network()
    write(path, model, make(model))
    assert not load_file(path / OPTIMIZER)
    other = network(1)
    optimizer = make(other)
    restore(path, other, optimizer, updated=False)
    assert same(model.state_dict(), other.state_dict())
    train(model, make(model), range(2))
    train(other, optimizer, range(2))
    assert same(model.state_dict(), other.state_dict())
    first = {sgd: "momentum_buffer", adamw: "step"}[make]
    assert misfit(path, None, make, updated=True).startswith(f"{first}.0.weight is missing, ")


def test_moments_that_are_there_count_before_the_first_update_too(saved: Path) -> None:
    model = network(1)
    optimizer = sgd(model)
    restore(saved, model, optimizer, updated=False)
    assert len(optimizer.state) == len(list(model.parameters()))
    without(saved, OPTIMIZER, "momentum_buffer.0")
    assert "momentum_buffer.0.weight is missing" in misfit(saved, updated=False), "some are never enough"


# What is refused


def test_a_state_of_another_model_is_refused(saved: Path) -> None:
    assert misfit(saved, network(width=5)).startswith(
        "0.weight is float32 [4, 3, 3, 3], expected float32 [5, 3, 3, 3]"
    )
    assert "1.weight does not belong to it" in misfit(saved, nn.Sequential(nn.Linear(2, 2)))
    longer = nn.Sequential(*network(), nn.Linear(3, 3))
    assert misfit(saved, longer) == (
        "5.weight is missing, 5.bias is missing, momentum_buffer.5.weight is missing, momentum_buffer.5.bias is missing"
    )


def test_a_state_in_another_precision_is_refused(saved: Path) -> None:
    assert "0.weight is float32 [4, 3, 3, 3], expected float64" in misfit(saved, network().double())


def test_a_state_of_what_does_not_train_in_this_run_is_refused(saved: Path) -> None:
    found = misfit(saved, network(), lambda model: sgd(model[4]))
    assert "momentum_buffer.0.weight does not belong to it" in found


@pytest.mark.parametrize(
    ("made", "wanted", "first"),
    [
        (sgd, adamw, "step.0.weight is missing"),
        (adamw, sgd, "momentum_buffer.0.weight is missing"),
        (sgd, lambda model: sgd(model, momentum=0), "momentum_buffer.0.weight does not belong to it"),
        (lambda model: sgd(model, momentum=0), sgd, "momentum_buffer.0.weight is missing"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(made: Make, wanted: Make, first: str, path: Path) -> None:
    model = network()
    optimizer = made(model)
    train(model, optimizer, range(2))
    write(path, model, optimizer)
    assert first in misfit(path, None, wanted)


def without(path: Path, file: str, *names: str) -> None:
    """Take tensors out of a state."""
    tensors = {name: tensor for name, tensor in load_file(path / file).items() if not name.startswith(names)}
    (path / file).write_bytes(save(tensors))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (MODEL, "4.bias"),
        (MODEL, "1.running_var"),
        (MODEL, "1.num_batches_tracked"),
        (OPTIMIZER, "momentum_buffer.4.bias"),
    ],
)
def test_a_state_with_something_missing_is_refused(file: str, name: str, saved: Path) -> None:
    without(saved, file, name)
    assert misfit(saved) == f"{name} is missing"


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_missing_moment_of_adamw_is_refused(key: str, path: Path) -> None:
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    write(path, model, optimizer)
    without(path, OPTIMIZER, f"{key}.0.weight")
    assert misfit(path, None, adamw) == f"{key}.0.weight is missing"


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.view(torch.int32), "is int32 [3], expected float32 [3]"),
        (lambda tensor: tensor.half(), "is float16 [3], expected float32 [3]"),
        (lambda tensor: tensor[None], "is float32 [1, 3], expected float32 [3]"),
        (lambda tensor: tensor[:0], "is float32 [0], expected float32 [3]"),
        (lambda tensor: tensor.sum(), "is float32 [], expected float32 [3]"),
    ],
)
def test_tensors_of_another_kind_are_refused(
    change: Callable[[Tensor], Tensor], said: str, file: str, saved: Path
) -> None:
    tensors = load_file(saved / file)
    name = "4.bias" if file == MODEL else "momentum_buffer.4.bias"
    tensors[name] = change(tensors[name])
    save_file(tensors, saved / file)
    assert misfit(saved) == f"{name} {said}"


@pytest.mark.parametrize("name", ["two\nlines\x1b[2J", "momentum_buffer.", "", "x" * 10])
def test_names_of_nothing_are_shown_on_one_line(name: str, saved: Path) -> None:
    save_file({**load_file(saved / MODEL), name: torch.zeros(1)}, saved / MODEL)
    found = misfit(saved)
    assert found.endswith(" does not belong to it")
    assert found.isprintable()


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**64 - 1], [0] * 10_000, [0, 2**62, 2**62]])
def test_shapes_that_torch_cannot_have_are_refused(shape: list[int], saved: Path) -> None:
    """A header may say them: they hold no numbers."""
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (saved / MODEL).write_bytes(struct.pack("<Q", len(header)) + header)
    assert refusal(saved).startswith(f"{saved}")


def test_a_file_that_has_gone_since_its_check_is_told(saved: Path) -> None:
    (saved / OPTIMIZER).unlink()
    text = refusal(saved)
    assert text.startswith(f"{saved / OPTIMIZER}: could not be read (")
    assert "although its check has passed; the same command tries again" in text


# BatchNorm's statistics of each process


def live(seed: int = 0) -> nn.Sequential:
    """Return a network with two layers whose statistics move, and one whose do not."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(3)), nn.BatchNorm2d(4))
    freeze_batch_norm(model[2])
    for layer in (model[0], model[1][0], model[2]):
        nn.init.uniform_(layer.running_mean, -1, 1)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        layer.num_batches_tracked.fill_(seed)
    return model


def gathered(world_size: int) -> dict[str, Tensor]:
    """Return the statistics that as many processes have, each its own."""
    return {
        f"{rank}.{name}": buffer.double()
        for rank in range(world_size)
        for name, buffer in live(rank).named_buffers()
        if not name.startswith("2.")
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_process_gets_its_own_statistics_back(world_size: int, path: Path) -> None:
    assert load_batch_norm_statistics(path) == {}, "one process has them in its model"
    (path / STATISTICS).write_bytes(save(gathered(world_size)))
    found = load_batch_norm_statistics(path)
    assert same(found, gathered(world_size))
    for rank in range(world_size):
        model = live(99)
        frozen = {name: buffer.clone() for name, buffer in model[2].named_buffers()}
        restore_batch_norm_statistics(model, found, rank=rank, world_size=world_size)
        restored = {name: buffer for name, buffer in model.named_buffers() if not name.startswith("2.")}
        assert same(
            restored, {name: b for name, b in live(rank).named_buffers() if not name.startswith("2.")}
        )
        assert same(dict(model[2].named_buffers()), frozen)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_among_another_number_of_processes_the_average_counts(world_size: int) -> None:
    model = live(99)
    restore_batch_norm_statistics(model, gathered(3), rank=world_size - 1, world_size=world_size)
    mean = torch.stack([live(rank)[0].running_mean.double() for rank in range(3)]).mean(0).float()
    assert torch.equal(model[0].running_mean, mean)
    assert int(model[0].num_batches_tracked) == 1


def test_without_gathered_statistics_the_models_own_stay() -> None:
    model = live(5)
    restore_batch_norm_statistics(model, {}, rank=0, world_size=4)
    assert same(dict(model.named_buffers()), dict(live(5).named_buffers()))


def renamed(statistics: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: tensor for name, tensor in statistics.items()}


@pytest.mark.parametrize(
    "statistics",
    [
        {"0.0.running_mean": torch.zeros(2).double()},
        {name: tensor for name, tensor in gathered(2).items() if name != "1.0.running_mean"},
        {**gathered(2), "2.0.running_mean": torch.zeros(2).double()},
        {**gathered(2), "0.2.running_mean": torch.zeros(4).double()},
        {**gathered(2), "x": torch.zeros(1)},
        renamed(gathered(2), "1.0.running_mean", "2.0.running_mean"),
        renamed(gathered(2), "0.0.running_mean", "-1.0.running_mean"),
        renamed(gathered(2), "0.0.running_mean", "00.0.running_mean"),
        renamed(gathered(2), "0.0.running_mean", "0.0.running_mean\n"),
        {**gathered(2), "0.0.running_mean": torch.zeros(3).double()},
        {**gathered(2), "0.0.running_mean": torch.zeros(1, 2).double()},
        {**gathered(2), "0.0.running_mean": torch.zeros(()).double()},
        {**gathered(2), "0.0.running_mean": torch.zeros(2)},
        {**gathered(2), "0.0.running_mean": torch.zeros(2, dtype=torch.int64)},
        {**gathered(2), "0.0.running_mean": torch.zeros(2, dtype=torch.complex64)},
    ],
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_statistics_of_another_model_are_refused(statistics: dict[str, Tensor], world_size: int) -> None:
    model = live(7)
    with pytest.raises(
        UserError, match=r"statistics are those of another model: expected 6 tensors for each process"
    ):
        restore_batch_norm_statistics(model, statistics, rank=0, world_size=world_size)
    assert same(dict(model.named_buffers()), dict(live(7).named_buffers()))


def test_statistics_for_a_model_without_any_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    restore_batch_norm_statistics(model, {}, rank=0, world_size=1)
    with pytest.raises(UserError, match="those of another model"):
        restore_batch_norm_statistics(
            model, {"0.0.running_mean": torch.zeros(2).double()}, rank=0, world_size=1
        )


def test_a_damaged_file_of_statistics_is_told(path: Path) -> None:
    (path / STATISTICS).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"statistics.safetensors: could not be read"):
        load_batch_norm_statistics(path)

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import HEADER_KEY, Counters, load_state, read_counters, save_state
from trainer.errors import UserError

COUNTERS = Counters(epoch=2, step=6, data="图 of images")
SCALER = {
    "scale": 1024.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 3,
}


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
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether names, bits and memory layout are the same."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name])
        and (first[name].dtype, first[name].stride()) == (second[name].dtype, second[name].stride())
        for name in first
    )


KINDS: list[tuple[Callable[[nn.Module], torch.optim.Optimizer], bool]] = [
    (make, channels_last) for make in (sgd, adamw) for channels_last in (False, True)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    """Return the state of a network under SGD after a few steps."""
    model = network()
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    save_state(path, model, optimizer, COUNTERS)
    return path


def refusal(path: Path, model: nn.Module | None = None, make: Any = sgd) -> str:
    """Return why the state is refused; neither model nor optimizer has been touched."""
    model = model or network(1)
    optimizer = make(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_state(path, model, optimizer)
    assert same(before, model.state_dict())
    assert not optimizer.state
    assert "--run.resume never, which moves the run aside" in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


# --- round trips


@pytest.mark.parametrize(("make", "channels_last"), KINDS)
def test_weights_and_moments_come_back_bit_for_bit_and_in_their_layout(
    make: Callable[[nn.Module], torch.optim.Optimizer], channels_last: bool, path: Path
) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model)
    train(model, optimizer, range(3), channels_last=channels_last)
    save_state(path, model, optimizer, COUNTERS)

    other = network(1, channels_last=channels_last)
    other_optimizer = make(other)
    load_state(path, other, other_optimizer)
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
def test_training_goes_on_as_if_it_had_not_stopped(
    make: Callable[[nn.Module], torch.optim.Optimizer], channels_last: bool, path: Path
) -> None:
    model = network(channels_last=channels_last)
    optimizer = make(model)
    train(model, optimizer, range(3), channels_last=channels_last)
    save_state(path, model, optimizer, COUNTERS)
    train(model, optimizer, range(3, 6), channels_last=channels_last)

    other = network(1, channels_last=channels_last)
    other_optimizer = make(other)
    load_state(path, other, other_optimizer)
    path.write_bytes(b"overwritten by the next epoch")  # what was read is no window on the file
    train(other, other_optimizer, range(3, 6), channels_last=channels_last)
    assert same(model.state_dict(), other.state_dict())
    assert same(moments(model, optimizer), moments(other, other_optimizer))


def test_a_file_of_the_one_layout_serves_the_other(path: Path) -> None:
    model = network(channels_last=True)
    optimizer = sgd(model)
    train(model, optimizer, range(3), channels_last=True)
    save_state(path, model, optimizer, COUNTERS)
    other = network(1)
    other_optimizer = sgd(other)
    load_state(path, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(
        value.is_contiguous() and torch.equal(value, moments(model, optimizer)[name])
        for name, value in moments(other, other_optimizer).items()
    )


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
    load_state(saved, model, optimizer)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("head", 0.5),
        ("backbone", 0.3),
    ]
    found = load_file(saved)
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, found[f"optimizer.momentum_buffer.{name}"]), "whatever the groups' order"


def test_frozen_parameters_have_no_moments(path: Path) -> None:
    model = network()
    optimizer = sgd(model[4])
    train(model, optimizer, range(2))
    save_state(path, model, optimizer, COUNTERS)
    kept = {name for name in load_file(path) if name.startswith("optimizer.")}
    assert kept == {"optimizer.momentum_buffer.4.weight", "optimizer.momentum_buffer.4.bias"}
    other = network(1)
    other_optimizer = sgd(other[4])
    load_state(path, other, other_optimizer)
    assert same(model.state_dict(), other.state_dict())
    assert len(other_optimizer.state) == 2


def test_without_momentum_there_is_nothing_to_keep(path: Path) -> None:
    model = network()
    optimizer = sgd(model, momentum=0)
    train(model, optimizer, range(2))
    save_state(path, model, optimizer, COUNTERS)
    assert not [name for name in load_file(path) if name.startswith("optimizer.")]
    other = network(1)
    load_state(path, other, sgd(other, momentum=0))
    assert same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "counters", [COUNTERS, replace(COUNTERS, scaler=SCALER), Counters(epoch=0, step=0, data="")]
)
def test_the_counters_come_back(counters: Counters, path: Path) -> None:
    model = network()
    save_state(path, model, sgd(model), counters)
    assert read_counters(path) == counters


def test_the_state_of_the_loss_scaling_comes_back(path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    model = network()
    save_state(path, model, sgd(model), replace(COUNTERS, scaler=scaler.state_dict()))
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(dict(read_counters(path).scaler))
    assert other.state_dict() == scaler.state_dict()


# --- what is refused


def text_of(fields: object) -> dict[str, str]:
    return {HEADER_KEY: fields if isinstance(fields, str) else json.dumps(fields)}


FIELDS = asdict(COUNTERS)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "a safetensors file of something else"),
        (text_of("{"), "Expecting property name"),
        (text_of("[" * 100_000), "recursion"),
        (text_of([]), "list indices"),
        (text_of({}), "no 'format'"),
        (text_of({**FIELDS, "format": 2}), "format 2, this version of regraft reads 1"),
        (text_of({**FIELDS, "more": 1}), "unexpected keyword argument 'more'"),
        (text_of({"format": 1, "epoch": 1, "step": 1}), "missing 1 required keyword-only argument: 'data'"),
        (text_of({**FIELDS, "epoch": "2"}), "epoch '2', step 6"),
        (text_of({**FIELDS, "step": -1}), "epoch 2, step -1"),
        (text_of({**FIELDS, "step": 1.5}), "epoch 2, step 1.5"),
        (text_of({**FIELDS, "epoch": True}), "epoch True, step 6"),
        (text_of({**FIELDS, "data": None}), "data None"),
        (text_of({**FIELDS, "scaler": {"scale": 1.0}}), "scaler {'scale': 1.0}"),
        (text_of({**FIELDS, "scaler": 3}), "not iterable"),
    ],
)
def test_a_damaged_or_foreign_header_is_refused(
    header: dict[str, str] | None, reason: str, path: Path
) -> None:
    save_file({"x": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(UserError) as caught:
        read_counters(path)
    assert f"{path}: not a readable training state (" in str(caught.value)
    assert reason in str(caught.value)
    assert refusal(path) == str(caught.value)


class Touches:
    """Once pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, lambda value, file: file.write(pickle.dumps(value))])
def test_a_pickle_is_refused_and_not_executed(dump: Any, path: Path, tmp_path: Path) -> None:
    with path.open("wb") as file:
        dump({"model": Touches(tmp_path / "executed")}, file)
    assert "not a readable training state" in refusal(path)
    with pytest.raises(UserError):
        read_counters(path)
    assert not (tmp_path / "executed").exists()
    with path.open("rb") as file:
        (torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file))
    assert (tmp_path / "executed").exists(), "it would have been"


@pytest.mark.parametrize("content", [b"", b"\0", b"regraft" * 100, b"\xff" * 100])
def test_what_is_no_safetensors_file_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert "not a readable training state" in refusal(path)


def test_a_state_that_cannot_be_opened_is_refused(path: Path) -> None:
    assert "No such file" in refusal(path)
    path.mkdir()
    assert "not a readable training state" in refusal(path)


def test_a_truncated_state_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 8, 4):
        saved.write_bytes(content[:length])
        assert "not a readable training state" in refusal(saved)


def test_a_state_of_another_model_is_refused(saved: Path) -> None:
    assert "model.0.weight is float32 [4, 3, 3, 3], expected float32 [5, 3, 3, 3]" in refusal(
        saved, network(width=5)
    )
    text = refusal(saved, nn.Sequential(nn.Linear(2, 2)))
    assert "model.1.weight does not belong to it" in text
    assert text.count("\n") == 0
    longer = nn.Sequential(*network(), nn.Linear(3, 3))
    assert (
        "model.5.weight is missing, model.5.bias is missing, optimizer.momentum_buffer.5.weight"
        in refusal(saved, longer)
    )


def test_a_state_in_another_precision_is_refused(saved: Path) -> None:
    assert "model.0.weight is float32 [4, 3, 3, 3], expected float64" in refusal(saved, network().double())


def test_a_state_of_what_does_not_train_in_this_run_is_refused(saved: Path) -> None:
    model = network()
    assert "optimizer.momentum_buffer.0.weight does not belong to it" in refusal(
        saved, model, lambda model: sgd(model[4])
    )


@pytest.mark.parametrize(("made", "loaded"), [(sgd, adamw), (adamw, sgd)])
def test_a_state_of_another_optimizer_is_refused(made: Any, loaded: Any, path: Path) -> None:
    model = network()
    optimizer = made(model)
    train(model, optimizer, range(2))
    save_state(path, model, optimizer, COUNTERS)
    first = {sgd: "momentum_buffer", adamw: "step"}[loaded]
    assert f"does not fit this run: optimizer.{first}.0.weight is missing" in refusal(path, None, loaded)


def without(path: Path, *names: str, counters: Counters = COUNTERS) -> None:
    """Take tensors out of a state."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(names)}
    path.write_bytes(save(tensors, metadata=text_of(asdict(counters))))


@pytest.mark.parametrize(
    "name", ["model.4.bias", "model.1.running_var", "optimizer.momentum_buffer.4.bias", "optimizer."]
)
def test_a_state_with_something_missing_is_refused(name: str, saved: Path) -> None:
    without(saved, name)
    missing = "optimizer.momentum_buffer.0.weight" if name == "optimizer." else name
    assert f"does not fit this run: {missing} is missing" in refusal(saved)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_missing_moment_of_adamw_is_refused(key: str, path: Path) -> None:
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    save_state(path, model, optimizer, COUNTERS)
    without(path, f"optimizer.{key}.0.weight")
    assert f"optimizer.{key}.0.weight is missing" in refusal(path, None, adamw)


@pytest.mark.parametrize("counters", [replace(COUNTERS, step=0), replace(COUNTERS, scaler=SCALER)])
def test_before_the_first_update_there_are_no_moments(counters: Counters, path: Path) -> None:
    """fp16's loss scaling skips the first updates until it has settled; in a short epoch all of them."""
    model = network()
    save_state(path, model, sgd(model), counters)
    other = network(1)
    optimizer = sgd(other)
    load_state(path, other, optimizer)
    assert same(model.state_dict(), other.state_dict())
    train(model, sgd(model), range(2))
    train(other, optimizer, range(2))
    assert same(model.state_dict(), other.state_dict())
    without(path, "model.4.bias", counters=counters)
    assert "model.4.bias is missing" in refusal(path)


def test_some_moments_are_never_enough(saved: Path) -> None:
    without(saved, "optimizer.momentum_buffer.0", counters=replace(COUNTERS, scaler=SCALER))
    assert "optimizer.momentum_buffer.0.weight is missing" in refusal(saved)


# --- writing


def test_a_failure_while_writing_leaves_the_earlier_state(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fails(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    model = network(2)
    with pytest.raises(OSError, match="disk full"):
        save_state(saved, model, sgd(model), replace(COUNTERS, epoch=3))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]

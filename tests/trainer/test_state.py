import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState
from trainer.optim.ema import ModelEma
from trainer.state import TrainState


def make_net(seed: int = 0, *, width: int = 4, channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 3)
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd of the head": lambda model: torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9),
    "sgd with groups": lambda model: torch.optim.SGD(
        [{"params": model[4].parameters(), "lr": 0.5}, {"params": model[:2].parameters()}], lr=0.3, momentum=0.9
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def make_state(
    optimizer: str = "sgd", model: nn.Module | None = None, *, ema: float | None = None, steps: int = 0
) -> TrainState:
    model = model or make_net()
    state = TrainState(model=model, optimizer=OPTIMIZERS[optimizer](model), ema=ModelEma(model, ema))
    return train(state, steps)


def train(state: TrainState, steps: int) -> TrainState:
    for step in range(state.step, state.step + steps):
        images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(state.model(images), torch.arange(5) % 3).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step = step + 1
        state.ema.update(state.step)
    return state


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.dtype == other[name].dtype


def assert_same_saved(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in one.items():
        if key in ("model", "optimizer", "ema"):
            assert_same_tensors(value, other[key])
        else:
            assert value == other[key]


def assert_same(one: TrainState, other: TrainState) -> None:
    assert_same_saved(one.state_dict(), other.state_dict())


def restored(saved: Mapping[str, Any], state: TrainState) -> TrainState:
    state.load_state_dict(saved, where="checkpoint")
    return state


@pytest.mark.parametrize(("optimizer", "ema"), [("sgd", None), ("adamw", 0.9), ("plain sgd", 0.9)])
@pytest.mark.parametrize("saved_layout", [False, True])
@pytest.mark.parametrize("own_layout", [False, True])
def test_a_restored_state_is_equal_in_its_own_layout_and_trains_on_equally(
    saved_layout: bool, own_layout: bool, optimizer: str, ema: float | None
) -> None:
    original = make_state(optimizer, make_net(channels_last=saved_layout), ema=ema, steps=3)
    original.epoch, original.best = 1, BestEpoch(epoch=1, step=2, value=0.5, loss=1.0)
    original.metrics = MetricState(rows=((1.0, 2, 3),), seconds=2.0, compute_seconds=1.0)
    net = make_net(1, channels_last=own_layout)
    state = restored(original.state_dict(), make_state(optimizer, net, ema=ema, steps=2))  # overwritten
    assert_same(original, state)
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values()]
    tensors += [moment for moments in state.optimizer.state.values() for moment in moments.values()]
    memory_format = torch.channels_last if own_layout else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=memory_format) for t in tensors if t.dim() == 4)
    if saved_layout == own_layout:  # the kernels of another layout round differently
        assert_same(train(original, 3), train(state, 3))


@pytest.mark.parametrize(
    ("optimizer", "moments", "channels_last"), [("sgd", 1, False), ("sgd", 1, True), ("adamw", 3, True)]
)
def test_a_state_dict_is_a_copy_that_training_does_not_change(
    optimizer: str, moments: int, channels_last: bool
) -> None:
    state = make_state(optimizer, make_net(channels_last=channels_last), ema=0.9, steps=2)
    saved = state.state_dict()
    before = {key: {name: t.clone() for name, t in saved[key].items()} for key in ("model", "optimizer", "ema")}
    train(state, 2)
    for key, tensors in before.items():
        assert_same_tensors(saved[key], tensors)
        for tensor in saved[key].values():
            assert (tensor.is_contiguous(), tensor.requires_grad, tensor.device.type) == (True, False, "cpu")
    assert len(saved["optimizer"]) == moments * len(list(state.model.parameters()))


def test_tensors_that_share_memory_can_be_written() -> None:
    layer = nn.Linear(3, 3)
    state = make_state(model=nn.Sequential(layer, layer))
    assert load(save(state.state_dict()["model"])).keys() == state.model.state_dict().keys()


def test_parameter_groups_and_learning_rates_are_those_of_this_run() -> None:
    original = make_state("sgd", steps=2)
    state = restored(original.state_dict(), make_state("sgd with groups", make_net(1)))
    assert_same(original, state)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.5, 0.3]
    original = make_state("sgd of the head", steps=2)
    state = restored(original.state_dict(), make_state("sgd of the head", make_net(1)))
    assert_same(original, state)
    assert len(state.optimizer.state) == 2, "parameters outside the optimizer have no moments"


@pytest.mark.parametrize("zeros_in_checkpoint", [True, False])
def test_frozen_parameters_may_have_moments_of_zero_or_none(zeros_in_checkpoint: bool) -> None:
    """On a GPU the optimizer creates all moments at once, also those of parameters that are still frozen."""

    def gradually_unfrozen(seed: int, *, zeros: bool) -> TrainState:
        state = make_state(model=make_net(seed))
        state.model[0].requires_grad_(requires_grad=False)  # type: ignore[index]
        for parameter in state.model.parameters() if zeros else ():
            state.optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return state

    original = train(gradually_unfrozen(0, zeros=zeros_in_checkpoint), 2)
    state = restored(original.state_dict(), gradually_unfrozen(1, zeros=not zeros_in_checkpoint))
    saved, own = original.state_dict()["optimizer"], state.state_dict()["optimizer"]
    frozen = {name for name in own if name.startswith("momentum_buffer.0.")}
    assert len(frozen) == (0 if zeros_in_checkpoint else 2), "as the optimizer of this run had them"
    assert not any(own.pop(name).any() for name in frozen)
    assert_same_tensors({name: saved[name] for name in own}, own)


def test_before_the_first_update_there_may_be_no_moments_or_all_but_not_some() -> None:
    original = make_state("adamw")
    saved = original.state_dict()
    assert not saved["optimizer"]
    state = restored(saved, make_state("adamw", make_net(1)))
    assert_same(train(original, 2), train(state, 2))

    saved = make_state(steps=2).state_dict() | {"step": 0}
    assert len(restored(saved, make_state(model=make_net(1))).optimizer.state) == 6
    del saved["optimizer"]["momentum_buffer.0.weight"]
    assert "momentum_buffer.0.weight is missing" in differences(saved)


def test_loss_scaling_is_restored_and_may_have_skipped_every_update() -> None:
    def scaled(scale: float) -> TrainState:
        state = make_state()
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        state.scaler.scale(torch.ones(()))  # its first use creates the scale
        return state

    original = scaled(8.0)
    original.step = 2
    saved = original.state_dict()
    assert not saved["optimizer"]
    state = restored(saved, scaled(2.0))
    assert_same(original, state)
    assert state.scaler is not None
    assert state.scaler.get_scale() == 8.0
    assert restored(saved, make_state()).scaler is None  # fp32 from here on
    assert restored(make_state(steps=1).state_dict(), scaled(2.0)).scaler.get_scale() == 2.0  # type: ignore[union-attr]


def differences(saved: Mapping[str, Any], state: TrainState | None = None) -> str:
    """Return how the state differs according to the error; it must not have been changed."""
    state = state or make_state(model=make_net(1))
    before = state.state_dict()
    with pytest.raises(UserError) as caught:
        state.load_state_dict(saved, where="checkpoint")
    assert_same_saved(state.state_dict(), before)
    assert str(caught.value).startswith("checkpoint: ")
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("saved", "own", "model", "difference"),
    [
        ("sgd", "sgd", make_net(width=5), "0.weight is float32 [4, 3, 3, 3], expected float32 [5, 3, 3, 3]"),
        ("sgd", "sgd", nn.Sequential(nn.Linear(2, 2)), "1.weight does not belong to it"),
        ("sgd", "sgd", nn.Sequential(*make_net(), nn.Linear(3, 3)), "5.weight is missing, 5.bias is missing, "),
        ("sgd", "adamw", make_net(1), "step.0.weight is missing"),
        ("sgd", "plain sgd", make_net(1), "momentum_buffer.0.weight does not belong to it"),
    ],
)
def test_a_state_of_another_model_or_optimizer_is_refused(
    saved: str, own: str, model: nn.Module, difference: str
) -> None:
    assert difference in differences(make_state(saved, steps=2).state_dict(), make_state(own, model))


@pytest.mark.parametrize(("ema", "message"), [(None, "without .*, and this run is with"), (0.9, "with .* without it")])
def test_ema_must_be_on_in_both_or_in_neither(ema: float | None, message: str) -> None:
    state = make_state(model=make_net(1), ema=None if ema else 0.9)
    assert re.search(f"was saved {message}", differences(make_state(ema=ema, steps=2).state_dict(), state))


@pytest.mark.parametrize("key", ["model", "ema", "optimizer"])
def test_a_missing_changed_or_unknown_tensor_is_refused(key: str) -> None:
    saved = make_state("adamw", ema=0.9, steps=2).state_dict()
    name, tensor = [(name, tensor) for name, tensor in saved[key].items() if name.endswith("4.bias")][-1]
    for change, difference in (
        ({}, f"{name} is missing"),
        ({name: tensor.view(torch.int32)}, f"{name} is int32 [3], expected float32 [3]"),
        ({name: tensor[:0]}, f"{name} is float32 [0], expected float32 [3]"),
        ({name: tensor, "two\nlines\x1b[2J": tensor}, " does not belong to it"),
        ({name: tensor, "": tensor}, " does not belong to it"),
    ):
        others = {other: value for other, value in saved[key].items() if other != name}
        changed = saved | {key: others | change}
        assert difference in differences(changed, make_state("adamw", make_net(1), ema=0.9))

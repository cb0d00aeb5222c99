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

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make_net(seed: int = 0, *, width: int = 4, channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 3)
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(model, momentum=0)


def head_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of the output layer alone."""
    return sgd(model[4])  # type: ignore[index]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def make_state(
    make_optimizer: MakeOptimizer = sgd, model: nn.Module | None = None, *, ema: float | None = None, steps: int = 0
) -> TrainState:
    model = model or make_net()
    state = TrainState(model=model, optimizer=make_optimizer(model), ema=ModelEma(model, ema))
    return train(state, steps)


def train(state: TrainState, steps: int) -> TrainState:
    for step in range(state.step, state.step + steps):
        images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        images = images.contiguous(memory_format=layout(state.model))
        nn.functional.cross_entropy(state.model(images), torch.arange(5) % 3).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step = step + 1
        state.ema.update(state.step)
    return state


def layout(model: nn.Module) -> torch.memory_format:
    is_channels_last = model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index,operator,union-attr]
    return torch.channels_last if is_channels_last else torch.contiguous_format


def assert_same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.dtype == other[name].dtype


def assert_same(one: TrainState, other: TrainState) -> None:
    a, b = one.state_dict(), other.state_dict()
    for key in ("model", "optimizer", "ema"):
        assert_same_tensors(a.pop(key), b.pop(key))
    assert a == b


def restored(saved: Mapping[str, Any], state: TrainState) -> TrainState:
    state.load_state_dict(saved, where="checkpoint")
    return state


LAYOUTS = [(False, False), (True, True), (False, True), (True, False)]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw, plain_sgd])
@pytest.mark.parametrize(("saved_layout", "own_layout"), LAYOUTS)
def test_a_restored_state_is_equal_in_its_own_layout_and_trains_on_equally(
    saved_layout: bool, own_layout: bool, make_optimizer: MakeOptimizer, ema: float | None
) -> None:
    original = make_state(make_optimizer, make_net(channels_last=saved_layout), ema=ema, steps=3)
    original.epoch, original.best = 1, BestEpoch(epoch=1, step=2, accuracy=0.5, loss=1.0)
    original.metrics = MetricState(rows=((1.0, 2, 3),), seconds=2.0, compute_seconds=1.0)
    saved = original.state_dict()
    files = {key: save(saved[key]) for key in ("model", "optimizer", "ema") if saved[key]}
    net = make_net(1, channels_last=own_layout)
    state = make_state(make_optimizer, net, ema=ema, steps=2)  # a state in use is overwritten
    restored(saved | {key: load(content) for key, content in files.items()}, state)
    assert_same(original, state)
    tensors = [*state.model.state_dict().values(), *state.ema.state_dict().values()]
    tensors += [moment for moments in state.optimizer.state.values() for moment in moments.values()]
    memory_format = torch.channels_last if own_layout else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=memory_format) for t in tensors if t.dim() == 4)
    if saved_layout == own_layout:  # the kernels of another layout round differently
        assert_same(train(original, 3), train(state, 3))


@pytest.mark.parametrize(("make_optimizer", "moments"), [(sgd, 1), (adamw, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_state_dict_is_a_copy_that_training_does_not_change(
    channels_last: bool, make_optimizer: MakeOptimizer, moments: int
) -> None:
    state = make_state(make_optimizer, make_net(channels_last=channels_last), ema=0.9, steps=2)
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
    def two_groups(model: nn.Module) -> torch.optim.Optimizer:
        head, rest = list(model[4].parameters()), [*model[0].parameters(), *model[1].parameters()]  # type: ignore[index]
        groups = [{"params": head, "name": "head", "lr": 0.5}, {"params": rest, "name": "backbone"}]
        return torch.optim.SGD(groups, lr=0.3, momentum=0.9)

    original = make_state(steps=2)
    state = restored(original.state_dict(), make_state(two_groups, make_net(1)))
    assert [(g["name"], g["lr"]) for g in state.optimizer.param_groups] == [("head", 0.5), ("backbone", 0.3)]
    assert_same(original, state)


def test_parameters_outside_the_optimizer_have_no_moments() -> None:
    original = make_state(head_sgd, steps=2)
    saved = original.state_dict()
    assert saved["optimizer"].keys() == {"momentum_buffer.4.weight", "momentum_buffer.4.bias"}
    state = restored(saved, make_state(head_sgd, make_net(1)))
    assert_same(original, state)
    assert len(state.optimizer.state) == 2


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
    assert_same_tensors(original.model.state_dict(), state.model.state_dict())
    saved, own = original.state_dict()["optimizer"], state.state_dict()["optimizer"]
    frozen = {name for name in own if name.startswith("momentum_buffer.0.")}
    assert len(frozen) == (0 if zeros_in_checkpoint else 2), "as the optimizer of this run had them"
    assert not any(own[name].any() for name in frozen)
    trained = own.keys() - frozen
    assert trained
    assert_same_tensors({name: saved[name] for name in trained}, {name: own[name] for name in trained})


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_before_the_first_update_there_are_no_moments(make_optimizer: MakeOptimizer) -> None:
    original = make_state(make_optimizer)
    saved = original.state_dict()
    assert not saved["optimizer"]
    state = restored(saved, make_state(make_optimizer, make_net(1)))
    assert_same(train(original, 2), train(state, 2))


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


# --- states that do not fit


def differences(saved: Mapping[str, Any], state: TrainState | None = None) -> str:
    """Return how the state differs according to the error; it must not have been changed."""
    state = state or make_state(model=make_net(1))
    before = state.state_dict()
    with pytest.raises(UserError) as caught:
        state.load_state_dict(saved, where="checkpoint")
    after = state.state_dict()
    for key in ("model", "optimizer", "ema"):
        assert_same_tensors(after.pop(key), before.pop(key))
    assert after == before
    text = str(caught.value)
    assert text.startswith("checkpoint: ")
    assert text.endswith("start anew with --run.resume never, which archives the run")
    assert text.isprintable()
    return text.removeprefix("checkpoint: does not fit this run: ").partition(". Choose another run.dir")[0]


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (make_net(width=5), "0.weight is float32 [4, 3, 3, 3], expected float32 [5, 3, 3, 3], 0.bias is "),
        (nn.Sequential(nn.Linear(2, 2)), "1.weight does not belong to it"),
        (make_net().double(), "0.weight is float32 [4, 3, 3, 3], expected float64 [4, 3, 3, 3]"),
        (
            nn.Sequential(*make_net(), nn.Linear(3, 3)),
            "5.weight is missing, 5.bias is missing, momentum_buffer.5.weight is missing, ",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(model: nn.Module, difference: str) -> None:
    assert difference in differences(make_state(steps=2).state_dict(), make_state(model=model))


@pytest.mark.parametrize(
    ("saved", "own", "difference"),
    [
        (sgd, adamw, "step.0.weight is missing"),
        (adamw, sgd, "momentum_buffer.0.weight is missing"),
        (sgd, plain_sgd, "momentum_buffer.0.weight does not belong to it"),
        (plain_sgd, sgd, "momentum_buffer.0.weight is missing"),
        (sgd, head_sgd, "momentum_buffer.0.weight does not belong to it"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(saved: MakeOptimizer, own: MakeOptimizer, difference: str) -> None:
    assert difference in differences(make_state(saved, steps=2).state_dict(), make_state(own, make_net(1)))


@pytest.mark.parametrize(("ema", "before", "now"), [(None, "without", "with"), (0.9, "with", "without")])
def test_ema_must_be_on_in_both_or_in_neither(ema: float | None, before: str, now: str) -> None:
    state = make_state(model=make_net(1), ema=None if ema else 0.9)
    message = differences(make_state(ema=ema, steps=2).state_dict(), state)
    assert f"was saved {before} regularization.ema, and this run is {now} it" in message


MOMENT = "exp_avg.4.bias"


@pytest.mark.parametrize(
    ("key", "name", "change", "difference"),
    [
        *((key, name, None, f"{name} is missing") for key, name in (
            ("model", "4.bias"), ("model", "1.running_var"), ("model", "1.num_batches_tracked"), ("ema", "4.bias"),
            ("optimizer", "step.0.weight"), ("optimizer", "exp_avg.0.weight"), ("optimizer", "exp_avg_sq.0.weight"),
        )),
        *((key, name, change, f"{name} is {found}, expected float32 [3]") for key, name, change, found in (
            ("model", "4.bias", lambda tensor: tensor.view(torch.int32), "int32 [3]"),
            ("model", "4.bias", lambda tensor: tensor[None], "float32 [1, 3]"),
            ("model", "4.bias", lambda tensor: tensor[:0], "float32 [0]"),
            ("optimizer", MOMENT, lambda tensor: tensor.half(), "float16 [3]"),
            ("optimizer", MOMENT, lambda tensor: tensor.sum(), "float32 []"),
        )),
        *(("model", name, lambda _: torch.zeros(1), " does not belong to it")
          for name in ("two\nlines\x1b[2J", "momentum_buffer.", "", "x" * 10)),
    ],
)  # fmt: skip
def test_a_missing_changed_or_unknown_tensor_is_refused(
    key: str, name: str, change: Callable[[Tensor | None], Tensor] | None, difference: str
) -> None:
    saved = make_state(adamw, ema=0.9, steps=2).state_dict()
    tensor = saved[key].pop(name, None)
    if change is not None:
        saved[key][name] = change(tensor)
    assert difference in differences(saved, make_state(adamw, make_net(1), ema=0.9))


def test_the_state_before_the_first_update_may_have_all_moments_but_not_some() -> None:
    saved = make_state(steps=2).state_dict() | {"step": 0}
    assert len(restored(saved, make_state(model=make_net(1))).optimizer.state) == 6
    del saved["optimizer"]["momentum_buffer.0.weight"]
    assert differences(saved) == "momentum_buffer.0.weight is missing"

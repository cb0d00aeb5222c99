"""`last.safetensors`: the training state at the end of an epoch. Tensors are tensors, counters are JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.data.names import listed, printable
from trainer.errors import UserError
from trainer.files import write_atomically

FORMAT = 1
HEADER_KEY = "regraft_state"
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Where a run stands."""

    epoch: int
    """Epochs trained."""
    step: int
    """Updates made."""
    data: str
    """Fingerprint of the training examples: their order is drawn over them."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """State of fp16's loss scaling; empty without it."""
    format: int = FORMAT


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters) -> None:
    """Write model, optimizer and counters into one file, which is whole or absent."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {HEADER_KEY: json.dumps(asdict(counters))}
    write_atomically(path, lambda temporary: save_file(stored, temporary, metadata=header))


def read_counters(path: Path) -> Counters:
    """Return where the run stood.

    Raises:
        UserError: the file is damaged, or of another format.

    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
        if text is None:
            raise ValueError("a safetensors file of something else")
        return _counters(json.loads(text))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _unreadable(path, f"no {error}" if isinstance(error, KeyError) else str(error)) from None


def _counters(fields: dict[str, Any]) -> Counters:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
    counters = Counters(**fields)
    if not all(type(n) is int and n >= 0 for n in (counters.epoch, counters.step)):
        raise ValueError(f"epoch {counters.epoch!r}, step {counters.step!r}")
    if not isinstance(counters.data, str):
        raise TypeError(f"data {counters.data!r}")
    if counters.scaler and set(counters.scaler) != _SCALER_KEYS:
        raise ValueError(f"scaler {counters.scaler!r}")
    return counters


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not a readable training state ({printable(reason)[:200]}). Restore the file, or start anew with "
        "--run.resume never, which moves the run aside"
    )


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put model and optimizer back to what `save_state` wrote.

    Raises:
        UserError: the file is damaged, or of another model or optimizer; both are then as they were.

    """
    counters = read_counters(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error)) from None
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
    kept = _kept(optimizer)
    if not any(name.startswith("optimizer.") for name in found) and (counters.step == 0 or counters.scaler):
        kept = ()  # nothing has been updated yet: fp16's loss scaling skips updates until it has settled
    moments = {f"optimizer.{key}.{name}": _like(key, p) for name, p in trained for key in kept}
    wrong = _differences(found, {**weights, **moments})
    if wrong:
        raise UserError(
            f"{path}: does not fit this run: {listed(wrong, limit=5)}. Restore the file, or start anew with "
            "--run.resume never, which moves the run aside"
        )
    model.load_state_dict({name.removeprefix("model."): found[name] for name in weights})
    for entry, moment in moments.items():
        moment.copy_(found[entry])
    state = {
        number: {key: moments[f"optimizer.{key}.{name}"] for key in kept}
        for number, (name, _) in enumerate(trained)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _kept(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return what the optimizer keeps of each parameter that it has updated."""
    if "betas" in optimizer.defaults:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()


def _like(key: str, parameter: Tensor) -> Tensor:
    """Return a moment to be filled, laid out as its parameter is: channels_last weights have channels_last moments."""
    return torch.zeros(()) if key == "step" else torch.empty_like(parameter)


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Return how the tensors differ by name, shape or kind of number."""

    def kind(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    return [
        *(f"{name} is missing" for name in wanted if name not in found),
        *(f"{name} does not belong to it" for name in found if name not in wanted),
        *(
            f"{name} is {kind(found[name])}, expected {kind(tensor)}"
            for name, tensor in wanted.items()
            if name in found and kind(found[name]) != kind(tensor)
        ),
    ]

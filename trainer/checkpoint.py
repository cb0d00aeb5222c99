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

from trainer.errors import UserError
from trainer.files import write_atomically

FORMAT = 1
HEADER_KEY = "regraft_state"


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
            fields = json.loads((file.metadata() or {})[HEADER_KEY])
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}, this version reads {FORMAT}")
        counters = Counters(**fields)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not a readable training state ({error!r}). Start anew with --run.resume never, which moves "
            "the run aside"
        ) from None
    return counters


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put model and optimizer back to what `save_state` wrote.

    Raises:
        UserError: the file is damaged, or of another model.

    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model.load_state_dict(
            {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit this model: {error}") from None
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, key, owner = name.split(".", 2)
            if owner not in order:
                raise UserError(f"{path}: holds optimizer state of {owner}, which does not train in this run")
            # Laid out as its parameter is: channels_last weights have channels_last moments.
            laid_out = value if value.dim() == 0 else torch.empty_like(parameters[owner]).copy_(value)
            moments.setdefault(order.index(owner), {})[key] = laid_out
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})

"""Model and optimizer -> tensors that a checkpoint holds, and back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.checkpoint.store import AVERAGE, MODEL, OPTIMIZER, STATISTICS
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

Tensors = dict[str, Tensor]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """Return copies in main memory of all that training changes: file -> name -> tensor.

    This is what a training step pays for; the device is waited for.

    Args:
        model: bare: neither DDP's wrapper nor its prefixes are written.
        optimizer: over parameters of that model.

    """
    moments = {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return {MODEL: _copied(model.state_dict()), OPTIMIZER: _copied(moments)}


def snapshot_ema(average: nn.Module) -> dict[str, Tensors]:
    """Return copies in main memory of the moving average of a model, likewise."""
    return {AVERAGE: _copied(average.state_dict())}


def _copied(tensors: Mapping[str, Tensor]) -> Tensors:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, updated: bool) -> None:
    """Put model and optimizer back to what `capture` saw.

    Args:
        path: folder of a checkpoint that was checked.
        model: bare; what trained when the checkpoint was written requires gradients.
        optimizer: over parameters of that model.
        updated: whether an update was made before it; without one there may be no moments yet.

    Raises:
        UserError: it is of another model or optimizer; both are then as they were.

    """
    found = {name: load_tensors(path / name) for name in (MODEL, OPTIMIZER)}
    weights = model.state_dict()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
    kept = _kept(optimizer)
    if not found[OPTIMIZER] and not updated:
        kept = ()
    # What has yet to be unfrozen has no moments, or empty ones where the optimizer begins with them (on GPUs).
    moments = {
        f"{key}.{name}": _like(key, p)
        for name, p in every
        for key in kept
        if p.requires_grad or f"{key}.{name}" in found[OPTIMIZER]
    }
    wrong = [*_differences(found[MODEL], weights), *_differences(found[OPTIMIZER], moments)]
    if wrong:
        raise UserError(
            f"{path}: does not fit this run: {join_truncated(wrong, limit=5)}. Choose another run.dir, or "
            "start anew with "
            "--run.resume never, which moves the run aside"
        )
    model.load_state_dict(found[MODEL])
    for entry, moment in moments.items():
        moment.copy_(found[OPTIMIZER][entry])
    state = {
        number: {
            key: moments[entry] if (entry := f"{key}.{name}") in moments else torch.zeros_like(p)
            for key in kept
        }
        for number, (name, p) in enumerate(every)
        if p.requires_grad or optimizer.state.get(p)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_ema(path: Path, average: nn.Module | None) -> None:
    """Put the moving average back to what `snapshot_ema` saw; None where the run has none.

    Raises:
        UserError: only one of checkpoint and run has one, or it is of another model; it is then as it was.

    """
    saved = (path / AVERAGE).exists()
    if saved != (average is not None):
        what = "holds a moving average of the weights" if saved else "holds no moving average of the weights"
        then, now = ("with", "without") if saved else ("without", "with")
        raise UserError(
            f"{path}: {what}: it was saved {then} regularization.ema, and this run is {now} it. Restore that "
            "setting, choose another run.dir, or start anew with --run.resume never, which moves the run aside"
        )
    if average is None:
        return
    found = load_tensors(path / AVERAGE)
    if wrong := _differences(found, average.state_dict()):
        raise UserError(
            f"{path / AVERAGE}: does not fit this run: {join_truncated(wrong, limit=5)}. Choose another "
            "run.dir, or start anew "
            "with --run.resume never, which moves the run aside"
        )
    average.load_state_dict(found)


def load_batch_norm_statistics(path: Path) -> Tensors:
    """Return each process's statistics, `RANK.name` -> tensor; empty where they were no different."""
    return load_tensors(path / STATISTICS) if (path / STATISTICS).exists() else {}


def load_tensors(path: Path) -> Tensors:
    """Return the tensors of a file of a checkpoint that was checked.

    Raises:
        UserError: it cannot be read.

    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:  # torch's of an impossible shape
        reason = escape_unprintable(str(error).partition("\n")[0])
        raise UserError(
            f"{path}: could not be read ({reason}), although its check has passed; the same command tries again"
        ) from None


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

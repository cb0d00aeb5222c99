"""Send the tensors of a model from rank 0 to all processes, and prepare a model for evaluation."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext
from trainer.model.load_state import load_state


def prepare_for_eval(ctx: DistributedContext, read: Callable[[], nn.Module], *, channels_last: bool) -> nn.Module:
    """Return the model that `read` returns, on its device and prepared for its precision. Every process must call it.

    Raises:
        UserError: `read` raised it on a process.

    """
    model = ctx.main_process_first(read).to(ctx.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    prepared: nn.Module = ctx.accelerator.prepare_model(model, evaluation_mode=True)
    return prepared


def broadcast_state_dict(
    ctx: DistributedContext, model: nn.Module, read: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the state dict that `read` returns on rank 0: other machines may still see an earlier version of a file.

    Every process must call it.

    Args:
        ctx: the processes.
        model: has the names, shapes and devices of the tensors.
        read: called on rank 0 alone.

    Raises:
        UserError: `read` raised it.

    """
    state = ctx.main_process_first(lambda: read() if ctx.is_main_process else None)
    result = {}
    for name, tensor in model.state_dict().items():
        value = torch.empty_like(tensor) if state is None else state[name].to(tensor.device, tensor.dtype)
        if ctx.world_size > 1:
            value = value.contiguous()
            torch.distributed.broadcast(value, src=0)
        result[name] = value
    return result


def load_from_rank_0(ctx: DistributedContext, model: nn.Module, read: Callable[[], Mapping[str, Tensor]]) -> None:
    """Load the state dict that `read` returns on rank 0 into the model of each process; see `broadcast_state_dict`."""
    load_state(model, broadcast_state_dict(ctx, model, read))

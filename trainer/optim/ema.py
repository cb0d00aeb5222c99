"""An exponential moving average of the weights: what is evaluated and kept in place of the last update's."""

import copy

import torch
from torch import Tensor, nn

from trainer.model.batch_norm import copy_frozen_flags


def get_decay(updates: int, decay: float) -> float:
    """Return the share of the average that stays after `updates` updates of the run, this one among them.

    Below `decay` at first, so that the start is soon forgotten: as num_updates has it in TensorFlow's
    ExponentialMovingAverage.
    """
    return min(decay, (1 + updates) / (10 + updates))


class ModelEma:
    """A copy of a model that follows it: the average of its weights over the updates, each older one counting less.

    Averaging the iterates: Polyak & Juditsky 1992; exponentially, and to be evaluated: Tarvainen & Valpola 2017.
    BatchNorm's statistics are averaged in the same way, and over the processes whenever the model's own are; other
    buffers are the model's. What does not change in the model stays equal to it, bit for bit.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin as a copy of `model`: bare, on its device, prepared for its precision."""
        self._live = model
        self._decay = decay
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()
        """Bare, and in no process group: each process averages the same weights."""
        pairs = [
            *zip(self.model.parameters(), model.parameters(), strict=True),
            *zip(self.model.buffers(), model.buffers(), strict=True),
        ]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the model's weights into the average, after so many updates of the run; nothing is waited for."""
        mine, its = _columns(self._averaged)
        torch._foreach_lerp_(mine, its, 1 - get_decay(updates, self._decay))
        for copied, tensor in self._copied:
            copied.copy_(tensor)

    def and_model(self) -> nn.Module:
        """Return the model and its average as one, for what is done to the BatchNorm statistics of both."""
        copy_frozen_flags(self.model, self._live)
        return nn.ModuleDict({"model": self._live, "average": self.model})


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair[0] for pair in pairs], [pair[1].detach() for pair in pairs]

"""Exponential moving average (EMA) of the weights: the average is evaluated and saved instead of the trained model."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainer.model.batch_norm import copy_frozen_flags
from trainer.model.load_state import load_state


def get_decay(step: int, decay: float) -> float:
    """Return the decay of the average at update `step` (counted from 1).

    It starts lower than `decay`, so that the average moves away from the initial weights quickly. TensorFlow's
    ExponentialMovingAverage does the same with `num_updates`.
    """
    return min(decay, (1 + step) / (10 + step))


class ModelEma:
    """Moving average of a model's weights, or the model itself where averaging is off.

    Averaging of iterates: Polyak & Juditsky 1992; exponential, for evaluation: Tarvainen & Valpola 2017. BatchNorm's
    running statistics are averaged in the same way; other buffers are copied. Frozen tensors stay equal to the
    model's, bit for bit.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        """Start from a copy of the weights.

        Args:
            model: unwrapped, on its device, prepared for its precision.
            decay: decay per update, between 0 and 1; None turns averaging off.

        """
        self._trained = model
        self._decay = decay or 0.0
        self.enabled = decay is not None
        self.model = model
        """The model to evaluate. It belongs to no process group: every process averages the same weights."""
        if self.enabled:
            self.model = copy.deepcopy(model).requires_grad_(requires_grad=False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after update `step` (counted from 1), without waiting for the device."""
        if not self.enabled:
            return
        for average, parameter in zip(self.model.parameters(), self._trained.parameters(), strict=True):
            if average.dtype != parameter.dtype:  # of a frozen weight: train.frozen_dtype
                average.data = average.data.to(parameter.dtype)
        # Looked up in every update: DDP, which wraps the model again when parameters are unfrozen, replaces buffers.
        pairs = list(zip(_tensors(self.model), _tensors(self._trained), strict=True))
        averages = [average for average, _ in pairs if average.is_floating_point()]
        weights = [tensor for average, tensor in pairs if average.is_floating_point()]
        torch._foreach_lerp_(averages, weights, 1 - get_decay(step, self._decay))
        for copied, tensor in pairs:
            if not copied.is_floating_point():
                copied.copy_(tensor)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the averaged weights and buffers; empty if averaging is off."""
        return self.model.state_dict() if self.enabled else {}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if self.enabled:
            load_state(self.model, saved)

    def with_model(self) -> nn.Module:
        """Return the trained model and its average, if there is one, as one module.

        Functions that reduce BatchNorm statistics over the processes then handle both in one collective.
        """
        if not self.enabled:
            return self._trained
        copy_frozen_flags(self.model, self._trained)
        return nn.ModuleDict({"model": self._trained, "average": self.model})


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]

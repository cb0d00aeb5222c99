"""L2-SP: weight decay towards the pretrained weights instead of towards zero (Li, Grandvalet & Davoine 2018)."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.optim.param_groups import ParamGroup


def backbone_parameters(model: nn.Module, heads: Sequence[str]) -> list[nn.Parameter]:
    """Return the pretrained parameters: all but those of the new output layers (dotted names)."""
    in_heads = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    return [p for p in model.parameters() if id(p) not in in_heads]


def without_weight_decay(groups: Iterable[ParamGroup], parameters: Iterable[nn.Parameter]) -> tuple[ParamGroup, ...]:
    """Return the groups without weight decay on these parameters, since L2-SP decays them."""
    ids = {id(parameter) for parameter in parameters}
    result = []
    for group in groups:
        pretrained = {id(parameter) in ids for parameter in group.parameters}
        if len(pretrained) > 1:
            raise RuntimeError(f"the group {group.name} mixes output layers and pretrained parameters")
        result.append(dataclasses.replace(group, weight_decay=0.0) if True in pretrained else group)
    return tuple(result)


class L2SP:
    """Decay of parameters towards their initial values; it does nothing if its strength is 0.

    The penalty is strength / 2 * |w - w0|^2 ("SP": starting point), and its gradient is strength * (w - w0). Biases and
    the parameters of norms are decayed like all others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], strength: float, *, decoupled: bool) -> None:
        """Copy the parameters' current values as the starting point.

        Args:
            parameters: on the device that they are trained on.
            strength: factor, as of weight decay; 0 turns L2-SP off.
            decoupled: add lr * strength * (w0 - w) to the weights, as AdamW decays weights, instead of adding to the
                gradients.

        """
        self.enabled = strength > 0
        self._initial: dict[nn.Parameter, Tensor] = {p: p.detach().clone() for p in parameters} if self.enabled else {}
        self._strength = strength
        self._decoupled = decoupled

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Decay the trainable parameters. Call it before `optimizer.step`, after gradients were unscaled and clipped.

        An update that fp16's loss scaling skips is still decayed if the decay is decoupled.
        """
        if not self.enabled:
            return
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p in self._initial and p.requires_grad and p.grad is not None]
            if not parameters:
                continue
            initial = [self._initial[p] for p in parameters]
            if self._decoupled:
                torch._foreach_lerp_(parameters, initial, group["lr"] * self._strength)
            else:
                difference = torch._foreach_sub(parameters, initial)
                torch._foreach_add_([p.grad for p in parameters], difference, alpha=self._strength)

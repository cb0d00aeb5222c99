"""L2-SP: the penalty pulls weights towards where the source left them, instead of towards zero."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.optim.param_groups import ParamGroup


def backbone_parameters(model: nn.Module, heads: Sequence[str]) -> list[nn.Parameter]:
    """Return the model's parameters but those of its new output layers (dotted names), which no source has."""
    new = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    return [p for p in model.parameters() if id(p) not in new]


def without_weight_decay(
    groups: Iterable[ParamGroup], pulled_parameters: Iterable[nn.Parameter]
) -> tuple[ParamGroup, ...]:
    """Return the groups without weight decay where the parameters are pulled: L2-SP stands in its place."""
    ids = {id(parameter) for parameter in pulled_parameters}
    spared = []
    for group in groups:
        among = {id(parameter) in ids for parameter in group.parameters}
        if len(among) > 1:
            raise RuntimeError(f"the group {group.name} holds new output layers beside what the source has")
        spared.append(dataclasses.replace(group, weight_decay=0.0) if True in among else group)
    return tuple(spared)


class L2SP:
    """Draws parameters back to their values at its making, as weight decay draws them to zero.

    L2-SP, "starting point" (Li, Grandvalet & Davoine 2018): the penalty strength / 2 * |w - w0|^2, whose gradient is
    strength * (w - w0). The norms' parameters and the biases are pulled like all others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], strength: float, *, decoupled: bool) -> None:
        """Keep copies of the parameters as they are now.

        Args:
            parameters: on the device that they are trained on.
            strength: what weight decay would be.
            decoupled: from the gradient, as AdamW's weight decay: times the learning rate alone.

        """
        self._anchors: dict[nn.Parameter, Tensor] = {p: p.detach().clone() for p in parameters}
        self._strength = strength
        self._decoupled = decoupled

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the pull to the gradients (unscaled, and clipped), or move the weights; only of what trains now.

        Loss scaling's rare skipped updates do not skip a decoupled pull.
        """
        for group in optimizer.param_groups:
            pulled_parameters = [
                p for p in group["params"] if p in self._anchors and p.requires_grad and p.grad is not None
            ]
            if not pulled_parameters:
                continue
            anchors = [self._anchors[p] for p in pulled_parameters]
            if self._decoupled:
                torch._foreach_lerp_(pulled_parameters, anchors, group["lr"] * self._strength)
            else:
                away = torch._foreach_sub(pulled_parameters, anchors)
                torch._foreach_add_([p.grad for p in pulled_parameters], away, alpha=self._strength)

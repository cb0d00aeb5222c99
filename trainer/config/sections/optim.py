"""Section `optim`: optimizer, parameter groups and learning rate schedule."""

import math
from dataclasses import dataclass, field
from typing import Literal

from trainer.config.sections.values import check_value, is_positive
from trainer.errors import UserError
from trainer.optim.schedule import parse_duration


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, parameter groups and learning rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer name."""
    lr: float = 1e-3
    """Learning rate of the backbone at its peak; with loss_reduction sum, use the mean loss's rate divided by batch_size."""
    head_lr_scale: float = 10.0
    """Learning rate of the head as a multiple of optim.lr."""
    weight_decay: float = 1e-4
    """Weight decay: its product with the weight is added to the gradient (sgd), or decoupled from it (adamw)."""
    decay_norm_and_bias: bool = True
    """Weight decay on biases, normalization layers and other one-dimensional parameters too."""
    layer_decay: float = 1.0
    """Layer-wise learning rate decay: factor from each block to the one before it; 1 is off."""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """Learning rate multipliers by module or parameter name pattern, such as {layer1: 0.1}; the last match applies."""
    momentum: float = 0.9
    """Momentum of sgd."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Loss reduction over the examples of the global batch."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    """Learning rate schedule after warmup: constant, half cosine to 0, or one-cycle."""
    warmup: str = "0 steps"
    """Warmup length of the learning rate: '100 steps', '1 epochs' or '5%'."""
    max_grad_norm: float | None = None
    """Gradient clipping: maximum norm of the whole gradient; null is off."""

    def __post_init__(self) -> None:
        check_value("optim.lr", self.lr, is_positive(self.lr), "a number above 0")
        check_value("optim.head_lr_scale", self.head_lr_scale, is_positive(self.head_lr_scale), "a number above 0")
        check_value("optim.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        check_value("optim.layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0, up to 1")
        wrong = {name: factor for name, factor in self.lr_mult.items() if not is_positive(factor)}
        if wrong:
            raise UserError(
                f"optim.lr_mult contains {wrong}: expected factors above 0; use transfer.trainable to freeze parameters"
            )
        check_value("optim.momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1")
        norm = self.max_grad_norm
        check_value("optim.max_grad_norm", norm, is_positive(norm), "a number above 0, or null")
        parse_duration("optim.warmup", self.warmup)

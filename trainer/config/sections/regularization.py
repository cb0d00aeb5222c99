"""Section `regularization`: label smoothing, mixup, CutMix, EMA and early stopping."""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.config.sections.values import check_value


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """Label smoothing, mixup, CutMix, EMA and early stopping."""

    label_smoothing: float = 0.0
    """Label smoothing: fraction of each target that is spread over all classes."""
    mixup: float = 0.0
    """Mixup alpha of the Beta distribution, with partners from the global batch; 0 is off."""
    cutmix: float = 0.0
    """CutMix alpha of the Beta distribution; if mixup is on too, each batch uses one of the two; 0 is off."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights of the training loss: none, or inversely proportional to class frequency with mean 1 (balanced)."""
    ema: float | None = None
    """EMA decay per update of the averaged weights and BatchNorm statistics, which are evaluated and saved; null is off."""
    early_stopping: int | None = None
    """Early stopping after this many epochs without a better result on the validation split; null is off."""

    def __post_init__(self) -> None:
        smoothing, ema, patience = self.label_smoothing, self.ema, self.early_stopping
        check_value("regularization.label_smoothing", smoothing, 0 <= smoothing < 1, "0 to below 1")
        for key in ("mixup", "cutmix"):
            alpha: float = getattr(self, key)
            check_value(f"regularization.{key}", alpha, 0 <= alpha < math.inf, "0 or more")
        check_value("regularization.ema", ema, ema is None or 0 < ema < 1, "above 0 and below 1, or null")
        valid = patience is None or patience >= 1
        check_value("regularization.early_stopping", patience, valid, "1 epoch or more, or null")

"""Section `transfer`: strategy, trainable parameters, BatchNorm, L2-SP and WiSE-FT."""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.config.sections.values import check_value
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Strategy, trainable parameters, BatchNorm, L2-SP and WiSE-FT."""

    strategy: str | None = None
    """Strategy whose options apply: d2l, head-only, lp-ft, gradual-unfreezing, strong-regularization, from-scratch, or a YAML file; null is none."""
    trainable: dict[int, str] | str = "all"
    """Trainable parameters: all, head, from:MODULE, last:N, names and patterns ('layer4, *.bias'), or unfreezing stages by epoch ({0: head, 2: all})."""
    batch_norm: Literal["frozen-with-weights", "frozen", "train", "sync"] = "frozen-with-weights"
    """BatchNorm mode: statistics frozen everywhere (frozen) or in frozen layers only (frozen-with-weights), of each process (train), or of the global batch on GPUs (sync)."""
    l2_sp: float = 0.0
    """L2-SP strength: penalty on the distance to the pretrained weights, which replaces weight decay outside the head; 0 is off."""
    wise_ft: bool = False
    """WiSE-FT: after training, interpolate the initial and fine-tuned weights and keep the best on the validation split."""

    def __post_init__(self) -> None:
        check_value("transfer.l2_sp", self.l2_sp, 0 <= self.l2_sp < math.inf, "0 or more")
        if self.trainable == "":
            raise UserError("transfer.trainable is empty: expected all, head, from:MODULE, last:N, patterns, or stages")
        if isinstance(self.trainable, dict):
            expected = "stages that start with epoch 0, such as {0: head, 1: layer4, 3: all}"
            check_value("transfer.trainable", self.trainable, min(self.trainable, default=-1) == 0, expected)

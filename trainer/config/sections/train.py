"""Section `train`: epochs, batch size, precision and logging."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.sections.values import check_value
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Epochs, batch size, precision and logging."""

    epochs: int = 5
    """Epochs: passes over the training set."""
    batch_size: int = 32
    """Batch size of one update over all processes (global batch)."""
    grad_accum_steps: int = 1
    """Gradient accumulation steps per update, which save memory and leave the update the same."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Micro-batch size: largest number of images per process in one forward and backward; auto finds what fits in memory, null uses grad_accum_steps."""
    cache_features: Literal["auto", "off"] = "auto"
    """Feature cache: compute the output of frozen layers once for images that are the same in every epoch (auto), or in every step (off)."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision of forward and backward; auto measures a few updates before the run and takes the fastest that is accurate."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory format channels_last for images and convolutions; auto measures which is faster; results differ by rounding only."""
    compile: bool = False
    """Compile the model by torch.compile: faster updates after minutes of compilation; results differ by rounding only."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing: recompute the activations of each block in backward, which saves memory, takes longer and leaves results the same."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of frozen weights in memory; bfloat16 halves it, needs precision bf16, and leaves updates the same."""
    logs_per_epoch: int = 5
    """Logs per epoch: how often metrics are read from the device, shown and written."""

    @property
    def uses_channels_last(self) -> bool:
        """Return whether images and convolutions are in channels_last; they are until `auto` has been measured."""
        return self.channels_last is not False

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "grad_accum_steps", "logs_per_epoch"):
            value: int = getattr(self, key)
            check_value(f"train.{key}", value, value >= 1, "1 or more")
        if self.grad_accum_steps > self.batch_size:
            raise UserError(
                f"train.grad_accum_steps is {self.grad_accum_steps} and train.batch_size is {self.batch_size}: "
                "a batch cannot be split into more micro-batches than it has examples"
            )
        if self.compile and self.gradient_checkpointing:
            raise UserError(
                "train.compile and train.gradient_checkpointing are both true, but torch.compile decides itself what to "
                "recompute: set one of them to false"
            )
        if self.frozen_dtype == "bfloat16" and self.precision != "bf16":
            raise UserError(
                f"train.frozen_dtype is bfloat16 and train.precision is {self.precision}: expected precision bf16, whose "
                "autocast rounds the weights to bfloat16 anyway"
            )
        size = self.micro_batch_size
        check_value("train.micro_batch_size", size, not isinstance(size, int) or size >= 1, "1 or more, auto, or null")
        if size is not None and self.grad_accum_steps > 1:
            raise UserError(
                f"train.micro_batch_size is {size} and train.grad_accum_steps is {self.grad_accum_steps}, but one of "
                "them splits the batch: set micro_batch_size to null, or grad_accum_steps to 1"
            )

"""Precision and memory layout of training: what an option or the launcher asks for, and what a device supports."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch

from trainer.errors import UserError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ACCELERATE_PRECISION = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Precision -> the argument `mixed_precision` of accelerate."""


class Execution(NamedTuple):
    """How the model is computed."""

    precision: Precision
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the memory format of images and convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return self.precision if self.channels_last else f"{self.precision} without channels_last"


def asked_precision(option: Precision | Literal["auto"], environment: Mapping[str, str]) -> Precision | None:
    """Return the precision that the user asks for; None if it is to be measured.

    Args:
        option: the option train.precision.
        environment: environment variables; `accelerate launch --mixed_precision` sets one, to "no" by default.

    """
    if option != "auto":
        return option
    from_launcher: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16"}
    return from_launcher.get(environment.get("ACCELERATE_MIXED_PRECISION", ""))


def check_precision(precision: Precision, *, on_cpu: bool) -> None:
    """Raise a UserError if the device does not support a precision: others would be computed without a message."""
    if on_cpu and precision in ("fp16", "tf32"):
        raise UserError(f"train.precision {precision} needs a GPU, and this run is on a CPU: choose fp32, bf16 or auto")
    if precision == "bf16" and not on_cpu and not _has_bf16():
        raise UserError("train.precision bf16 on a GPU that would only emulate it: choose fp16, fp32 or auto")


def supported_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions that a device can train in. The first is the exact one, fp32."""
    if device.type == "cpu":
        return ("fp32", "bf16")
    return ("fp32", "tf32", "bf16", "fp16") if _has_bf16() else ("fp32", "fp16")


def set_float32_precision(precision: Precision, device: torch.device) -> None:
    """Let a GPU compute what remains in float32 with TF32, unless the precision is fp32.

    PyTorch uses TF32 in convolutions by default. A CPU always computes float32 exactly.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))

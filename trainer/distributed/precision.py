"""Choose the precision of training."""

from collections.abc import Mapping
from typing import Literal

import torch

from trainer.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]


def choose_precision(
    option: Literal["auto", "fp32", "bf16", "fp16"],
    *,
    on_cpu: bool,
    environment: Mapping[str, str],
    saved_precision: Precision | None = None,
) -> tuple[Precision, str]:
    """Return the precision to train in, and the reason.

    Args:
        option: the option train.precision.
        on_cpu: whether the run computes on a CPU.
        environment: environment variables; `accelerate launch --mixed_precision` sets one.
        saved_precision: what `auto` chose when the run began. A resumed run keeps it.

    Raises:
        UserError: fp16 on a CPU, which accelerate would silently run as fp32; bf16 on a GPU that would emulate it.

    """
    from_launcher = {"bf16": "bf16", "fp16": "fp16"}.get(environment.get("ACCELERATE_MIXED_PRECISION", ""))
    must_keep = option == "auto" and saved_precision is not None
    if option != "auto":
        chosen, reason = option, "as train.precision asks"
    elif saved_precision is not None:
        chosen, reason = saved_precision, "as this run began with"
    elif from_launcher is not None:
        chosen, reason = from_launcher, "as accelerate launch --mixed_precision asks"  # type: ignore[assignment]
    elif on_cpu:
        chosen, reason = "fp32", "the safe choice on a CPU; bf16 may be faster with AMX or AVX-512 BF16"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        chosen, reason = "bf16", "this GPU supports it, and it needs no loss scaling"
    else:
        chosen, reason = "fp16", "this GPU has no bf16; the loss is scaled"
    advice = "; resume on a machine that has it" if must_keep else ": choose {}"
    if chosen == "fp16" and on_cpu:
        raise UserError(
            f"precision fp16 ({reason}) on a CPU, which has no fp16 training{advice.format('fp32 or bf16')}"
        )
    if chosen == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"precision bf16 ({reason}) on a GPU that would only emulate it{advice.format('fp16 or fp32')}")
    return chosen, reason

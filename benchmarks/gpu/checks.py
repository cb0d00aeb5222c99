"""The checks in the order in which they run, the most valuable first, with their time limits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import correctness, speed
from benchmarks.gpu.workplace import Details, Workplace


@dataclass(frozen=True)
class Check:
    """A check and its time limit."""

    function: Callable[[Workplace], Details]
    limit: int
    """Seconds."""
    is_speed: bool = False
    """Whether it measures a ratio. It is repeated while there is time."""


def checks(work: Workplace) -> dict[str, Check]:
    """Return name -> check."""
    end_to_end = {
        f"{model}-{batch_size}": Check(partial(speed.end_to_end, model=model, batch_size=batch_size), 100, True)
        for model, batch_size in work.speed_combinations
    }
    return {
        "fp32": Check(correctness.fp32, 100),
        "evaluation": Check(correctness.evaluation, 45),
        "bf16": Check(correctness.bf16, 30),
        "fp16": Check(correctness.fp16, 30),
        "resume": Check(correctness.resume, 90),
        "nccl": Check(correctness.nccl, 45),
        "device_data": Check(correctness.device_data, 45),
        **dict(list(end_to_end.items())[:2]),
        "d2l": Check(speed.d2l, 90, True),
        "timm": Check(speed.timm, 90, True),
        **dict(list(end_to_end.items())[2:]),
        "channels_last": Check(correctness.channels_last, 45),
        "gradient_checkpointing": Check(correctness.gradient_checkpointing, 45),
        "cached_features": Check(correctness.cached_features, 45),
        "micro_batches": Check(correctness.micro_batches, 45),
        "compiled": Check(correctness.compiled, 150),
    }

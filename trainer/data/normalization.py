"""Check the mean and standard deviation that normalize images. Uses the standard library only."""

import math
from collections.abc import Sequence

_LOWEST = {"mean": 0.0, "std": 0.001}
_EXPECTED = {"mean": "three numbers from 0 to 1", "std": "three numbers from 0.001 to 1"}


def find_wrong_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> str | None:
    """Return what is wrong with a mean or a standard deviation of red, green and blue, or None. None is not checked."""
    for key, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        lowest = _LOWEST[key]
        if len(values) == 3 and all(lowest <= value <= 1 for value in values):
            continue
        text = ", ".join(f"{value:g}" for value in values)
        reason = f"{key} is [{text}]: expected {_EXPECTED[key]}, for pixel values from 0 to 1"
        is_8_bit = len(values) == 3 and all(lowest <= value <= 255 for value in values)
        if is_8_bit and max(values) > 2 and all(map(math.isfinite, values)):
            scaled = ", ".join(f"{value / 255:.3f}" for value in values)
            reason += f". For pixel values from 0 to 255, divide by 255: [{scaled}]"
        return reason
    return None

"""Check the values of options."""

import math

from trainer.errors import UserError

MAX_SEED = 2**63 - 1


def check_value(option: str, value: object, valid: bool, expected: str) -> None:
    """Raise a UserError if the value of an option is not valid."""
    if not valid:
        raise UserError(f"{option} is {value}: expected {expected}")


def is_positive(value: float | None) -> bool:
    """Return whether a value is null or a finite number above 0."""
    return value is None or 0 < value < math.inf

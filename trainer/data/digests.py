"""Record the hashes of a run's images, so that a resumed run notices an image whose content has changed."""

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically

_DIGITS = 16  # hexadecimal digits of a hash


def write_digests(path: Path, digests: Sequence[str]) -> None:
    """Write the hashes of all images, in the order of the examples; raises OSError."""
    write_text_atomically(path, json.dumps({"blake2b": "".join(digests)}))


def read_digests(path: Path, *, count: int) -> tuple[str, ...] | None:
    """Return the `count` hashes that `write_digests` wrote; None if there is no such file, as in earlier versions.

    Raises:
        UserError: the file cannot be read or is damaged.

    """
    try:
        text = json.loads(path.read_text(encoding="ascii"))["blake2b"]
        if len(bytes.fromhex(text)) * 2 != _DIGITS * count:
            raise ValueError(f"expected {count} hashes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{path}: the hashes of the run's images cannot be read ({error}). Restore the file; or delete it, and the "
            "images are not compared with those that the run began with"
        ) from None
    return tuple(text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS))

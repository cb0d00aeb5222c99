"""Record the hashes of a run's images, so that a resumed run notices an image whose content has changed."""

import json
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically


def to_hex(digests: np.ndarray) -> str:
    """Return hashes, uint64 [N], as 16 hexadecimal digits each."""
    return digests.astype(">u8").tobytes().hex()


def write_digests(path: Path, digests: np.ndarray) -> None:
    """Write the hashes of all images, uint64 [N], in the order of the examples; raises OSError."""
    write_text_atomically(path, json.dumps({"blake2b": to_hex(digests)}))


def read_digests(path: Path, *, count: int) -> np.ndarray | None:
    """Return the `count` hashes, uint64 [N], of `write_digests`; None if there is no such file, as in earlier versions.

    Raises:
        UserError: the file cannot be read or is damaged.

    """
    try:
        content = bytes.fromhex(json.loads(path.read_text(encoding="ascii"))["blake2b"])
        if len(content) != 8 * count:
            raise ValueError(f"expected {count} hashes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(
            f"{path}: the hashes of the run's images cannot be read ({error}). Restore the file; or delete it, and the "
            "images are not compared with those that the run began with"
        ) from None
    return np.frombuffer(content, ">u8").astype(np.uint64)

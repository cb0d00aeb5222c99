"""Every seed of a run, derived from `run.seed`: a hash, so that streams and neighbours are unrelated."""

import hashlib
import struct


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return the 63-bit seed of one use of randomness, as in `derive_seed("crop", seed, epoch, example)`."""
    text = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

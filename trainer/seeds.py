"""Derive every seed of a run from `run.seed` by a hash, so that all random streams are independent."""

import hashlib
import struct


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for one purpose, as in `derive_seed("crop", seed, epoch, example)`."""
    text = purpose.encode() + b"\0" + struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

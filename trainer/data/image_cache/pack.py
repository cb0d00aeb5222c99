"""A pack: a file of images, each uint8 [H, W, 3], with an index of fixed-size records at its end.

The index has a checksum of its own, and each image has one. A pack is written to once and never changed.
"""

import hashlib
import mmap
import os
import struct
import threading
import zlib

import numpy as np

RECORD = np.dtype(
    [
        ("digest", "<u8"),  # hash of the content of the image file
        ("variant", "<u8"),  # hash of what was done to it: see `store.variant`
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("checksum", "<u4"),  # CRC-32 of the pixels
        ("padding", "<u4"),
    ]
)
"""Record of an image in the index of its pack."""
_FOOTER = struct.Struct("<16sQQ16s")  # magic, size of the images, number of records, hash of the records
_MAGIC = b"regraft images 1"
_ALIGNMENT = 64  # of an image in the file [bytes]


class DamagedPackError(Exception):
    """A pack whose size or index is wrong."""


class PackWriter:
    """Writes a pack into an open file. Any number of threads may call `add`."""

    def __init__(self, file: int) -> None:
        """Create a writer; `file` is the descriptor of an empty file, which the caller closes."""
        self._file = file
        self._lock = threading.Lock()
        self._size = 0
        self._records: list[tuple[int, int, int, int, int, int, int]] = []

    @property
    def size(self) -> int:
        """Return the size of the images so far [bytes]."""
        return self._size

    @property
    def count(self) -> int:
        """Return the number of complete images."""
        return len(self._records)

    def add(self, digest: int, variant: int, image: np.ndarray) -> None:
        """Write an image, uint8 [H, W, 3].

        Raises:
            OSError: it could not be written; the pack does not contain it.

        """
        pixels = np.ascontiguousarray(image)
        data = memoryview(pixels.reshape(-1).data)
        checksum = zlib.crc32(data)
        with self._lock:
            offset = self._size
            self._size += -(-pixels.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._write(data, offset)
        height, width, _ = pixels.shape
        with self._lock:
            self._records.append((digest, variant, offset, height, width, checksum, 0))

    def finish(self) -> None:
        """Write the index.

        Raises:
            OSError: it could not be written; the file is not a pack.

        """
        records = np.array(self._records, dtype=RECORD).tobytes()
        footer = _FOOTER.pack(_MAGIC, self._size, len(self._records), _hash(records))
        self._write(memoryview(records + footer), self._size)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written


def read_index(file: int) -> np.ndarray:
    """Return the records of an open pack.

    Raises:
        DamagedPackError: its size or its index is wrong.
        OSError: it cannot be read.

    """
    size = os.fstat(file).st_size
    footer = os.pread(file, _FOOTER.size, max(0, size - _FOOTER.size))
    if len(footer) < _FOOTER.size:
        raise DamagedPackError("it is shorter than its footer")
    magic, images_size, count, digest = _FOOTER.unpack(footer)
    if magic != _MAGIC:
        raise DamagedPackError("its footer is missing")
    if size != images_size + count * RECORD.itemsize + _FOOTER.size:
        raise DamagedPackError("its size is wrong")
    content = os.pread(file, count * RECORD.itemsize, images_size)
    if _hash(content) != digest:
        raise DamagedPackError("the checksum of its index is wrong")
    return np.frombuffer(content, dtype=RECORD)


class Pack:
    """A pack that is read. Its file is memory-mapped when it is first used, in each process that unpickles it."""

    def __init__(self, path: str, records: np.ndarray) -> None:
        """Create a pack; `records` are those of its index."""
        self.path, self.records = path, records
        self._verified = bytearray(len(records))
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the memory map: another process opens the file itself."""
        return self.__dict__ | {"_map": None}

    def map_file(self, file: int) -> None:
        """Map the open file of this pack. The map shares the locks of the file, and holds them until it is freed."""
        self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ)

    def read(self, index: int) -> np.ndarray | None:
        """Return an image, a read-only view uint8 [H, W, 3]; None if its checksum is wrong.

        The checksum is verified when this process first reads the image.

        Raises:
            OSError: the file is gone.

        """
        if self._map is None:
            with open(self.path, "rb") as file:  # noqa: PTH123
                self.map_file(file.fileno())
        assert self._map is not None  # for mypy
        _, _, offset, height, width, checksum, _ = self.records[index].item()
        pixels = np.frombuffer(self._map, np.uint8, height * width * 3, offset)
        if not self._verified[index]:
            if zlib.crc32(pixels.data) != checksum:
                return None
            self._verified[index] = True
        return pixels.reshape(height, width, 3)


def image_sizes(records: np.ndarray) -> np.ndarray:
    """Return the size of each image [bytes], int64."""
    sizes: np.ndarray = records["height"].astype(np.int64) * records["width"] * 3
    return sizes


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()

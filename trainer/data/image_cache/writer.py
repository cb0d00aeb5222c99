"""Write images into new packs, from several threads."""

import threading
from typing import Protocol

import numpy as np

from trainer.data.image_cache.pack import PackWriter


class NewFile(Protocol):
    """A file that becomes a pack."""

    file: int
    """Descriptor."""
    capacity: int
    """Size at which the pack is complete [bytes]."""

    def publish(self) -> None:
        """Let readers find the pack; raises OSError."""

    def discard(self) -> None:
        """Remove the file."""


class PackFiles(Protocol):
    """Where packs are created: `PackFolder` or `PackMemory`."""

    def create(self) -> NewFile:
        """Create a file; raises OSError."""


class _OpenPack:
    def __init__(self, file: NewFile) -> None:
        self.file, self.writer = file, PackWriter(file.file)
        self.pending = 0  # images that threads are writing


class ImageWriter:
    """Writes images into packs. Any number of threads may call `add`."""

    def __init__(self, files: PackFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._pack: _OpenPack | None = None
        self.images, self.bytes = 0, 0
        """Number and size of the images that were published."""

    def add(self, digest: int, variant: int, image: np.ndarray) -> None:
        """Write an image, uint8 [H, W, 3].

        Raises:
            OSError: it could not be written. Complete images of its pack are not lost.

        """
        with self._lock:
            if self._pack is None:
                self._pack = _OpenPack(self._files.create())
            pack = self._pack
            pack.pending += 1
        try:
            pack.writer.add(digest, variant, image)
        finally:
            with self._lock:
                pack.pending -= 1
                if pack.writer.size >= pack.file.capacity and self._pack is pack:
                    self._pack = None  # the next image begins a new pack
                is_complete = self._pack is not pack and pack.pending == 0
        if is_complete:
            self._publish(pack)

    def close(self) -> None:
        """Publish the last pack. No thread may call `add` any more.

        Raises:
            OSError: it could not be written.

        """
        pack, self._pack = self._pack, None
        if pack is not None:
            self._publish(pack)

    def _publish(self, pack: _OpenPack) -> None:
        if not pack.writer.count:
            pack.file.discard()
            return
        try:
            pack.writer.finish()
        except OSError:
            pack.file.discard()
            raise
        pack.file.publish()
        with self._lock:
            self.images += pack.writer.count
            self.bytes += pack.writer.size

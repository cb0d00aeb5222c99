"""Build the image cache of a run: decode each image once, in threads, and store it in the form that the run reads."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.data.decode import UnreadableImage, decode_file, hash_file, open_image_file
from trainer.data.image_cache.pack import Pack
from trainer.data.image_cache.store import MISSING, ImageStore
from trainer.data.image_cache.writer import ImageWriter

_BATCH_SIZE = 8  # images that a thread decodes per task


@dataclass(frozen=True)
class CacheForm:
    """How images are stored."""

    variant: int
    """Hash of the version of the decoder and of the transform, see `store.variant`."""
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    """Deterministic transform whose output is stored; None stores the decoded image."""
    output_bytes: int = 0
    """Size of the transform's output [bytes]; 0 without a transform, since decoded images differ in size."""


class _Task(NamedTuple):
    path: str
    digest: str
    form: CacheForm
    original: int
    """Entry of the decoded image in the store, or MISSING."""


class CacheBuilder:
    """Stores the images of a run up to a limit."""

    def __init__(
        self,
        paths: Mapping[CacheForm, Sequence[str]],
        *,
        original: CacheForm,
        store: ImageStore,
        writer: ImageWriter,
        limit: int,
        open_pack: Callable[[Pack], object] = lambda pack: None,
    ) -> None:
        """Create a builder.

        Args:
            paths: the images to store in each form.
            original: the form of decoded images.
            store: the images that are cached already.
            writer: writes the others.
            limit: most bytes of the run's images.
            open_pack: protects a pack of the run's images from eviction.

        """
        self._paths, self._original, self._store, self._writer = paths, original, store, writer
        self._open_pack = open_pack
        self._path_sets: dict[CacheForm, frozenset[str]] = {}
        self._known: dict[CacheForm, frozenset[int]] = {}
        self._added: dict[CacheForm, set[int]] = {form: set() for form in paths}
        self._lock = threading.Lock()
        self._free = limit
        # Outputs of a transform come first: they are smaller and save more.
        self._reserved = sum(form.output_bytes * len(of_form) for form, of_form in self._paths.items())
        self._full: set[CacheForm] = set()  # no further image of these forms fits
        self.error: OSError | None = None
        """Why nothing more could be written."""

    def add_decoded(self, path: str, digest: str, image: np.ndarray) -> None:
        """Store a decoded image in the forms that the run reads; several threads may call it."""
        for form in self._paths:
            if self._has_room(form) and self._is_wanted(path, digest, form):
                self._add(digest, form, image)

    def add_missing(
        self,
        images: Mapping[CacheForm, tuple[Sequence[str], np.ndarray]],
        *,
        workers: int,
        display: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext,
    ) -> None:
        """Decode and store what is not cached yet.

        Args:
            images: paths and digests (uint64 [N]) of the images to store in each form; the first forms take precedence.
            workers: number of threads.
            display: opens a progress display, which yields a callback for (images stored, images to store).

        """
        tasks = [task for form, (paths, digests) in images.items() for task in self._missing(form, paths, digests)]
        if not tasks:
            return
        done, self._full = 0, set()
        self._reserved = sum(task.form.output_bytes for task in tasks)
        with display() as on_progress, closing(self._store_batches(tasks, workers)) as batches:
            for count in batches:
                done += count
                if on_progress is not None:
                    on_progress(done, len(tasks))

    def _has_room(self, form: CacheForm) -> bool:
        return self.error is None and form not in self._full

    def _is_wanted(self, path: str, digest: str, form: CacheForm) -> bool:
        with self._lock:
            if form not in self._known:  # only if the validation decodes images at all
                self._path_sets[form] = frozenset(self._paths[form])
                self._known[form] = self._store.digests(form.variant)
        number = int(digest, 16)
        return path in self._path_sets[form] and number not in self._known[form] and number not in self._added[form]

    def _missing(self, form: CacheForm, paths: Sequence[str], digests: np.ndarray) -> list[_Task]:
        """Return a task for each image that is not cached, and subtract those that are from the limit."""
        entries = self._store.locate(digests, form.variant)
        self._free -= self._store.total_size(entries)
        for pack in self._store.packs_of(entries):
            self._open_pack(pack)
        (positions,) = np.nonzero(entries == MISSING)
        _, first = np.unique(digests[positions], return_index=True)
        positions = positions[first]
        originals = self._store.locate(digests[positions], self._original.variant)
        return [
            _Task(paths[position], f"{digest:016x}", form, original)
            for position, digest, original in zip(
                positions.tolist(), digests[positions].tolist(), originals.tolist(), strict=True
            )
            if digest not in self._added[form]
        ]

    def _store_batches(self, tasks: Sequence[_Task], workers: int) -> Generator[int, None, None]:
        stop = threading.Event()

        def store(start: int) -> int:
            batch = tasks[start : start + _BATCH_SIZE]
            for task in batch:
                if not stop.is_set() and self._has_room(task.form) and (image := self._read(task)) is not None:
                    self._add(task.digest, task.form, image)
            return len(batch)

        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="cache") as pool:
            try:
                yield from pool.map(store, range(0, len(tasks), _BATCH_SIZE))
            finally:
                stop.set()  # after Ctrl-C, each thread finishes its image

    def _read(self, task: _Task) -> np.ndarray | None:
        """Return the decoded image; None if its file has changed since it was validated."""
        if task.original != MISSING and (image := self._store.read(task.original)) is not None:
            return image
        try:
            with open_image_file(task.path) as file:
                if hash_file(file) != task.digest:
                    return None
                return decode_file(file, task.path).pixels
        except UnreadableImage:  # the run reports it if it reads the image
            return None

    def _add(self, digest: str, form: CacheForm, image: np.ndarray) -> None:
        if form.transform is not None:
            image = form.transform(image)
        with self._lock:
            self._reserved -= form.output_bytes
            if image.nbytes + (0 if form.output_bytes else self._reserved) > self._free:
                self._full.add(form)
                return
            self._free -= image.nbytes
            self._added[form].add(int(digest, 16))
        try:
            self._writer.add(int(digest, 16), form.variant, image)
        except OSError as error:
            self.error = error

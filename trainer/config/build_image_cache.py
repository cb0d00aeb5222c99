"""From a config to the image cache: which images are cached in which form, where, and up to which size."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torchvision
from accelerate.utils import gather_object
from rich.filesize import decimal

from regraft.memory import available_memory, total_memory
from trainer.config.resolve import ResolvedDataConfig
from trainer.data.augment import EvalTransform, ResizeShorter
from trainer.data.decode import decoder_version
from trainer.data.image_cache.build import CacheBuilder, CacheForm
from trainer.data.image_cache.cached import CachedImages
from trainer.data.image_cache.folder import PackFolder
from trainer.data.image_cache.memory import PackMemory, open_packs
from trainer.data.image_cache.pack import Pack
from trainer.data.image_cache.store import MISSING, ImageStore, variant
from trainer.data.image_cache.writer import ImageWriter
from trainer.data.index import DatasetIndex
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.text import escape_unprintable

_memory = PackMemory()  # of this process: the fine-tuning finds what the pretraining has cached
_UNLIMITED = 2**62


class ImageCache:
    """The image cache of a run: one process of each machine builds it, and every process opens it.

    Images of a split that is seen through the evaluation transform alone are cached as its output, the others as
    decoded, or resized to data.cache_resize.
    """

    def __init__(self, data: ResolvedDataConfig) -> None:
        """Create the object; nothing is read or written yet."""
        self._mode = data.cache_images
        self._has_random_transform = data.has_random_transform
        # The system keeps the packs in memory if they fit. Otherwise reading them may be as slow as decoding.
        self._limit = _UNLIMITED if self._mode == "disk" else (available_memory() + _memory.size) // 2
        max_bytes = None if self._mode == "disk" else total_memory()
        self._folder = PackFolder(Path(data.cache) / "images", max_bytes=max_bytes)
        decoder, like = decoder_version(), data.preprocessing
        resize = (like.image_size, like.resize_size, like.resize, like.interpolation)
        self._original = self._train = CacheForm(variant(decoder))
        if data.cache_resize is not None:
            reduce = ResizeShorter(data.cache_resize)
            self._train = CacheForm(variant(decoder, reduce), reduce)
        self._output = CacheForm(
            variant(decoder, torchvision.__version__, resize), EvalTransform(like), 3 * like.image_size**2
        )
        self._store: ImageStore | None = None  # while nothing was added to it
        self._messages: list[str] = []
        self._problem: str | None = None
        self._added, self._seconds = 0, 0.0

    @contextmanager
    def building(self, index: DatasetIndex) -> Iterator[CacheBuilder]:
        """Yield a builder of the examples' images. What it has stored is kept if the block is interrupted.

        Raises:
            UserError: data.cache_images is disk, and nothing could be written.

        """
        began = time.monotonic()
        if self._mode == "ram":
            packs = open_packs(_memory.paths)
        else:
            self._folder.remove_leftovers()
            packs, self._messages = self._folder.read_packs()
        self._store = store = ImageStore(packs)
        writer = ImageWriter(_memory if self._mode == "ram" else self._folder)
        paths = index.paths
        builder = CacheBuilder(
            {form: paths[part] for form, part in self._forms(index).items()},
            original=self._original,
            store=store,
            writer=writer,
            limit=self._limit,
            open_pack=self._open_pack,
        )
        try:
            yield builder
        finally:
            try:
                writer.close()
            except OSError as error:
                builder.error = error
        if writer.images:
            self._store = None
        self._added, self._seconds = writer.images, time.monotonic() - began
        if builder.error is not None:
            self._problem = f"{self._where} cannot be written to ({builder.error.strerror})"
            if self._mode == "disk" and not writer.images:
                raise UserError(
                    f"data.cache_images is disk, but {self._problem}. Set data.cache (or $REGRAFT_CACHE) to a folder "
                    "with room, or set data.cache_images to auto"
                )

    def by_form(self, index: DatasetIndex, digests: np.ndarray) -> dict[CacheForm, tuple[list[str], np.ndarray]]:
        """Return paths and digests of the images that are cached in each form; `digests` has those of all examples."""
        paths = index.paths
        return {form: (paths[part], digests[part]) for form, part in self._forms(index).items()}

    def open(self, index: DatasetIndex, digests: np.ndarray, ctx: DistributedContext) -> tuple[CachedImages, list[str]]:
        """Return the cached images of the run, and the lines to print about them. Every process must call it.

        Raises:
            UserError: a process cannot open what another one has stored in memory.

        """
        in_memory = _open_memory(ctx) if self._mode == "ram" else None
        store = self._store or ImageStore(self._folder.read_packs()[0] if in_memory is None else in_memory)
        entries = {form: np.full(len(digests), MISSING) for form in (self._output, self._train)}
        room = self._limit
        for form, part in self._forms(index).items():
            found = store.locate(digests[part], form.variant)
            sizes = store.sizes(found)
            if sizes.sum() > room:
                _, first = np.unique(found, return_index=True)
                sizes[np.setdiff1d(np.arange(len(sizes)), first)] = 0  # repeated images
            fits = np.cumsum(sizes) <= room
            room -= int(sizes[fits].sum())
            entries[form][part] = np.where(fits, found, MISSING)
        outputs, originals = entries.values()
        packs = store.packs_of(np.concatenate([outputs, originals]))
        for pack in packs:
            self._open_pack(pack)
        if self._mode == "ram":
            _memory.keep_only({pack.path for pack in packs})
        images = CachedImages(store, originals=originals, outputs=outputs)
        return images, [*self._messages, self._describe(images)]

    @property
    def _where(self) -> str:
        return "memory" if self._mode == "ram" else escape_unprintable(str(self._folder.folder))

    def _open_pack(self, pack: Pack) -> None:
        if self._mode != "ram":  # packs in memory are open already
            self._folder.open_pack(pack)

    def _forms(self, index: DatasetIndex) -> dict[CacheForm, slice]:
        """Return which examples are cached in which form. Outputs come first: they are smaller and save more."""
        train = len(index.train) if self._has_random_transform else 0
        forms = {self._output: slice(train, None), self._train: slice(0, train)}
        return {form: part for form, part in forms.items() if part != slice(0, 0)}

    def _describe(self, images: CachedImages) -> str:
        size = decimal(images.store.total_size(np.concatenate([images.outputs, images.originals])))
        total = len(images.originals)
        count = np.count_nonzero((images.outputs != MISSING) | (images.originals != MISSING))
        text = f"image cache: {count} of {total} images, {size}, in {self._where}"
        if self._added:
            text += f"; {self._added} were added in {self._seconds:.1f} s"
        if count < total:
            problem = self._problem or f"they do not fit into half of the available memory, {decimal(self._limit)}"
            text += f". The others are decoded in every epoch: {problem}"
        return text


def _open_memory(ctx: DistributedContext) -> list[Pack]:
    """Return the packs in the memory of this machine's first process."""
    paths = gather_object([_memory.paths])[ctx.rank - ctx.accelerator.local_process_index]
    packs, error = [], None
    try:
        packs = open_packs(paths)
    except OSError as caught:
        error = UserError(
            f"data.cache_images is ram, but the processes of this machine do not share memory ({caught.strerror}: "
            f"{caught.filename}): set it to auto"
        )
    ctx.raise_on_all_ranks(error)
    return packs

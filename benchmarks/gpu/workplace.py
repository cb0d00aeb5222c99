"""Where the checks of a GPU work, in which sizes, and how a check ends."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import write_photographs

Details = Mapping[str, object]
"""What a check has measured, for results.json."""


class CheckFailed(Exception):
    """The result is wrong; the message says what was measured and what was expected."""


class CheckSkipped(Exception):
    """The check does not apply to this machine or to this version of regraft."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Folder and sizes of all checks."""

    folder: Path
    """Images and runs; the checks share them."""
    device: str
    """`cuda`, or `cpu` for a test of the checks themselves."""

    @property
    def on_gpu(self) -> bool:
        """Return whether this is not a test on a CPU."""
        return self.device == "cuda"

    @property
    def image_size(self) -> int:
        """Return the size of the model's input in the checks of correctness."""
        return 128 if self.on_gpu else 64

    @property
    def model(self) -> str:
        """Return the model of the checks of correctness."""
        return "resnet18" if self.on_gpu else "squeezenet1_1"

    @property
    def batch_size(self) -> int:
        """Return the batch size of the checks of correctness."""
        return 16 if self.on_gpu else 8

    @property
    def image_cache(self) -> str:
        """Return the value of data.cache_images that keeps the images closest to the device."""
        return "device" if self.on_gpu else "ram"

    @property
    def speed_combinations(self) -> list[tuple[str, int]]:
        """Return the models and batch sizes whose speed is measured."""
        if self.on_gpu:
            return [(model, batch_size) for batch_size in (128, 512) for model in ("resnet18", "resnet50")]
        return [("squeezenet1_1", 4)]

    def small_images(self) -> Path:
        """Return the folder for the checks of correctness: 8 batches to train on; it is drawn once."""
        return self._images("small", train=8 * self.batch_size, val=32)

    def loop_images(self) -> Path:
        """Return the folder for programs that decode in the training process."""
        return self._images("loop", train=1024 if self.on_gpu else 8, val=64 if self.on_gpu else 4)

    def many_images(self) -> Path:
        """Return the folder for the measurements of speed: 4,096 files, an eighth of them distinct."""
        if not self.on_gpu:
            return self.loop_images()
        return self._images("many", train=512, val=64, copies=8)

    def _images(self, name: str, *, train: int, val: int, copies: int = 1) -> Path:
        folder, unfinished = self.folder / name, self.folder / f"{name}.unfinished"
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            write_photographs(unfinished, train=train, val=val, copies=copies)
            unfinished.rename(folder)
        return folder

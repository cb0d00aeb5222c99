"""Where the features of frozen layers are kept: on the device, in memory, or nowhere."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regraft.memory import available_memory
from trainer.distributed.context import DistributedContext
from trainer.model.batch_norm import is_frozen, named_batch_norms
from trainer.transfer.frozen_prefix import FrozenSplit

MAX_RATIO = 8
"""Greatest size of the features of an image, as a multiple of the bytes of its pixels.

Features of this size take about as long to read as a decoded image to crop and resize. Larger ones, those of the first
layers, would take the memory of many images to save little arithmetic.
"""


@dataclass(frozen=True)
class FeatureStore:
    """Where and how features are kept."""

    device: torch.device
    like: Tensor
    """Features of two images, for their shape, type and memory format."""

    @property
    def is_channels_last(self) -> bool:
        """Return whether the values of all channels at one position lie side by side."""
        is_image = self.like.ndim == 4 and not self.like.is_contiguous()
        return is_image and self.like.is_contiguous(memory_format=torch.channels_last)

    def to_rows(self, features: Tensor) -> Tensor:
        """Return features [B, ...] as contiguous rows [B, ...]."""
        return (features.movedim(1, -1) if self.is_channels_last else features).contiguous()

    def from_rows(self, rows: Tensor) -> Tensor:
        """Return the features of rows."""
        return rows.movedim(-1, 1) if self.is_channels_last else rows

    def empty_rows(self, count: int) -> Tensor:
        """Return uninitialized rows of `count` images."""
        shape = self.to_rows(self.like).shape[1:]
        return torch.empty(count, *shape, dtype=self.like.dtype, device=self.device)


@dataclass(frozen=True, kw_only=True)
class FrozenLayers:
    """Computes features, and decides where they are kept."""

    ctx: DistributedContext
    normalize: Callable[[Tensor], Tensor]
    """Images uint8 [B, 3, H, W] -> the model's input."""
    blank: Tensor
    """Two images as in a batch, of any content."""
    memory_share: float
    """Share of the available memory that features may take: first of the GPU's, else of the machine's."""
    log: Callable[[str], object]
    """Called with lines for the console."""

    def compute(self, prefix: nn.Module, images: Tensor) -> Tensor:
        """Return the features of images, in the precision of training."""
        with torch.no_grad(), self.ctx.accelerator.autocast():
            features: Tensor = prefix(self.normalize(images))
        return features

    def choose_store(self, split: FrozenSplit | None, count: int, name: str) -> FeatureStore | None:
        """Return where the features of `count` images are kept, or None if they are not. Every process must call it.

        Args:
            split: the layers; None: none is frozen.
            count: number of images whose features this process holds.
            name: what the images are, for the console.

        """
        features = None if split is None else self.compute(split.prefix, self.blank)
        if split is None or not isinstance(features, Tensor) or features.shape[:1] != (2,):
            return None  # nothing is frozen, or there is not one row for each image
        bytes_each, image_bytes = features[0].nbytes, self.blank[0].nbytes
        if bytes_each > MAX_RATIO * image_bytes:
            self.log(
                f"frozen layers: the input of {split.layer} is {bytes_each / image_bytes:.1f} times as large as the "
                f"image, so it is computed anew for {name} in every epoch"
            )
            return None
        size = bytes_each * count
        device = self.ctx.device
        on_device = device.type == "cuda" and size <= self.memory_share * torch.cuda.mem_get_info(device)[0]
        free = available_memory() // self.ctx.local_world_size
        fits = on_device or size <= self.memory_share * free
        shape = " x ".join(map(str, features.shape[1:]))
        kept = f"frozen layers: the input of {split.layer} ({shape}) for {count} {name}, {_in_mb(size)}"
        if self.ctx.all_reduce_max([not fits])[0]:  # all processes decide the same
            self.log(
                f"{kept}, does not fit into {_in_mb(self.memory_share * free)} of memory: it is computed every time"
            )
            return None
        self.log(f"{kept}, is computed once")
        return FeatureStore(device if on_device else torch.device("cpu"), features)


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the frozen parameters, and of the BatchNorm layers with frozen statistics."""
    parameters = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return frozenset((*parameters, *(name for name, layer in named_batch_norms(model) if is_frozen(layer))))


def _in_mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"

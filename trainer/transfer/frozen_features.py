"""Train on features of frozen layers: what these compute from an image is computed once, and kept.

During a stage, the layers before the first one that trains give the same output for the same image. Training images are
the same in every epoch if they are not augmented, or if each has a few fixed views (`data.views`). The features of a
view are computed in one pass, in the precision of training, when an epoch first needs them. An update runs only the
layers after them.

The batches of the pass are those of an evaluation, wherever a run resumes, so a resumed run computes the same bits.
Features equal those within an update up to rounding, since kernels may sum in another order for another batch size.
Every process computes its part and holds all of them.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.evaluate import Interrupted
from trainer.transfer.feature_store import FeatureStore, FrozenLayers, frozen_names
from trainer.transfer.frozen_prefix import FrozenSplit, split_frozen

Batch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]."""


class StageFeatures(Protocol):
    """What trains in a stage of a model, and on what."""

    @property
    def is_active(self) -> bool:
        """Return whether the current stage trains on features."""

    def start_stage(self) -> nn.Module:
        """Return what trains now: the whole model, or the layers after the frozen ones."""

    def start_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        """Compute the features of an epoch (counted from 0), unless they are kept."""

    def to_input(self, images: Tensor) -> Tensor:
        """Return the input of what trains from the images, or features, of a batch."""

    def lookup(self, epoch: int, examples: Tensor) -> Tensor:
        """Return the features of examples, int64 [B], in an epoch, on the device."""


@dataclass(frozen=True)
class NoFeatures:
    """Trains the whole model on images."""

    model: nn.Module
    """Unwrapped."""
    normalize: Callable[[Tensor], Tensor]
    """Images uint8 [B, 3, H, W] -> the model's input."""

    is_active = False

    def start_stage(self) -> nn.Module:
        """Return the model."""
        return self.model

    def start_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        """Compute nothing."""

    def to_input(self, images: Tensor) -> Tensor:
        """Return the normalized images."""
        return self.normalize(images)

    def lookup(self, epoch: int, examples: Tensor) -> Tensor:
        """Raise a RuntimeError: this stage trains on images."""
        raise RuntimeError("there are no features")


@dataclass(frozen=True, kw_only=True)
class FixedViews:
    """The fixed views of the training images."""

    views: int
    """Number of views of each image. Epoch e shows view e mod `views`."""
    images: int
    """Number of training images."""
    batches: Callable[[int], Iterable[Batch]]
    """View -> this process's batches of one pass over the images."""
    num_batches: int
    """Number of batches of the process that has most of them."""
    batch_size: int
    """Greatest number of images in a batch."""
    epochs: int
    """Number of epochs of the run."""


class FrozenFeatures:
    """Features of the layers that are frozen in the current stage of a model. Every process must call its methods."""

    def __init__(self, model: nn.Module, layers: FrozenLayers, train: FixedViews) -> None:
        """Keep nothing yet.

        Args:
            model: unwrapped, on its device. Its flags say what is frozen; they may change between epochs.
            layers: computes the features.
            train: the images.

        """
        self._model, self._layers, self._train = model, layers, train
        self._frozen: frozenset[str] | None = None
        self._split: FrozenSplit | None = None
        self._store: FeatureStore | None = None
        self._views: dict[int, Tensor] = {}

    @property
    def is_active(self) -> bool:
        """Return whether the current stage trains on features."""
        return self._store is not None

    def start_stage(self) -> nn.Module:
        """Return the layers after the frozen ones; or the model, if nothing is frozen, or its output is too large."""
        if (frozen := frozen_names(self._model)) != self._frozen:
            self._frozen, self._split = frozen, split_frozen(self._model, training=True)
            self._views.clear()
            count = min(self._train.views, self._train.epochs) * self._train.images
            self._store = self._layers.choose_store(self._split, count, "images to train on")
        return self._model if self._split is None or self._store is None else self._split.rest

    def start_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        """Compute the features of an epoch (counted from 0), unless an earlier one did.

        Raises:
            Interrupted: `interrupted`, which is called before each batch, returned True.

        """
        view = epoch % self._train.views
        if self._split is None or self._store is None or view in self._views:
            return
        began = time.perf_counter()
        self._views[view] = self._compute(self._split.prefix, self._store, view, interrupted)
        of_view = f" of view {view + 1} of {self._train.views}" if self._train.views > 1 else ""
        self._layers.log(f"frozen layers: features{of_view} computed in {time.perf_counter() - began:.1f} s")

    def to_input(self, images: Tensor) -> Tensor:
        """Return features as they are, and images normalized."""
        return images if self.is_active else self._layers.normalize(images)

    def lookup(self, epoch: int, examples: Tensor) -> Tensor:
        """Return copies of the features of examples, int64 [B], in an epoch, on the device."""
        assert self._store is not None  # for mypy: it is active
        rows = self._views[epoch % self._train.views]
        local = rows[examples.to(rows.device)]
        return self._store.from_rows(local.to(self._layers.ctx.device, non_blocking=True))

    def _compute(self, prefix: nn.Module, store: FeatureStore, view: int, interrupted: Callable[[], bool]) -> Tensor:
        """Return the features of all training images in one view, as rows."""
        rows = store.empty_rows(self._train.images)
        counts = torch.zeros(self._train.images, dtype=torch.int64, device=store.device)
        batches = iter(self._train.batches(view))
        for _ in range(self._train.num_batches):
            if interrupted():
                raise Interrupted
            batch = next(batches, None)  # None: this process has a batch less than others
            features, examples = store.like[:0], torch.empty(0, dtype=torch.int64, device=store.like.device)
            if batch is not None:
                features, examples = self._layers.compute(prefix, batch[0]), batch[2]
            features, examples = self._gather(store.to_rows(features), examples)
            examples = examples.to(store.device)
            rows[examples] = features.to(store.device)
            counts[examples] += 1
        if not bool((counts == 1).all()):
            raise RuntimeError(f"features of {int((counts == 1).sum())} of {len(rows)} images were computed once")
        return rows

    def _gather(self, features: Tensor, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and examples of all processes' batches."""
        ctx, padding = self._layers.ctx, self._train.batch_size - len(examples)
        if ctx.world_size == 1:
            return features, examples
        rows = torch.cat([features, features.new_zeros(padding, *features.shape[1:])])
        # As bytes, since not every backend gathers every floating-point type.
        gathered = ctx.accelerator.gather(rows.view(torch.uint8)).view(features.dtype)
        examples = ctx.accelerator.gather(torch.cat([examples, examples.new_full((padding,), -1)]))
        return gathered[examples >= 0], examples[examples >= 0]

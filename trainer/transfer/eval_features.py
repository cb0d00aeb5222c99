"""Evaluate on features of frozen layers: the images of a split are always the same, and so are their features.

The first evaluation computes the features in its own batches, and later ones read them, so all give the same bits as
evaluations of the whole model.
"""

from collections.abc import Callable, Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trainer.transfer.feature_store import FeatureStore, FrozenLayers, frozen_names
from trainer.transfer.frozen_prefix import FrozenSplit, split_at, split_frozen

Batch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 [B, 3, H, W] or features [B, ...], labels int64 [B], examples int64 [B]."""
EvalInputs = tuple[nn.Module, Iterable[Batch], Callable[[Tensor], Tensor]]
"""A model, its batches, and the conversion of their images to its input."""


class LayersAfter(nn.Module):
    """The layers after the frozen ones. It holds the frozen ones too, so that both are in the same mode."""

    def __init__(self, split: FrozenSplit) -> None:
        super().__init__()
        self.prefix, self.rest = split.prefix, split.rest

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs of the model."""
        outputs: Tensor = self.rest(features)
        return outputs


class EvalFeatures:
    """Features of the evaluation splits in the current stage of a model."""

    def __init__(self, model: nn.Module, layers: FrozenLayers, *, num_images: int) -> None:
        """Keep nothing yet.

        Args:
            model: unwrapped, on its device. Its flags say what is frozen; they may change between epochs.
            layers: computes the features.
            num_images: number of images in all splits that this process evaluates.

        """
        self._model, self._layers, self._num_images = model, layers, num_images
        self._frozen: frozenset[str] | None = None
        self._split: FrozenSplit | None = None
        self._store: FeatureStore | None = None
        self._models: WeakKeyDictionary[nn.Module, LayersAfter] = WeakKeyDictionary()
        self._batches: dict[str, list[Batch]] = {}

    def inputs(self, model: nn.Module, split: str, batches: Iterable[Batch], count: int) -> EvalInputs:
        """Return the layers after the frozen ones, and batches of features. Every process must call it.

        Args:
            model: the model, or an average of its weights, whose frozen layers are equal. Any other is returned as it
                is, with the images.
            split: name of the split.
            batches: images of the split, in the same order each time.
            count: number of images in these batches.

        """
        self._find_split()
        layers_after = self._layers_after(model)
        if layers_after is None:
            return model, batches, self._layers.normalize
        layers_after.train(model.training)
        kept = self._batches.get(split, [])
        if sum(len(labels) for _, labels, _ in kept) == count:
            return layers_after, self._copies(kept), _unchanged
        kept = self._batches[split] = []  # none yet, or those of an interrupted evaluation
        return layers_after, self._compute(layers_after.prefix, batches, kept), _unchanged

    def _find_split(self) -> None:
        """Split the model where it is frozen now, unless it was split there before."""
        if (frozen := frozen_names(self._model)) == self._frozen:
            return
        self._frozen, self._split = frozen, split_frozen(self._model, training=False)
        self._models.clear()
        self._batches.clear()
        self._store = self._layers.choose_store(self._split, self._num_images, "images to evaluate on")

    def _layers_after(self, model: nn.Module) -> LayersAfter | None:
        """Return the layers of a model after the frozen ones; None if it has no frozen layers, or other ones."""
        if self._split is None or self._store is None:
            return None
        if model not in self._models:
            split = split_at(model, self._split.node, training=False)
            accelerator = self._layers.ctx.accelerator
            self._models[model] = accelerator.prepare_model(LayersAfter(split), evaluation_mode=True)
        layers_after = self._models[model]
        pairs = zip(layers_after.prefix.state_dict().values(), self._split.prefix.state_dict().values(), strict=True)
        return layers_after if all(a is b or torch.equal(a, b) for a, b in pairs) else None

    def _compute(self, prefix: nn.Module, batches: Iterable[Batch], kept: list[Batch]) -> Iterator[Batch]:
        assert self._store is not None  # for mypy: it was chosen before
        for images, labels, examples in batches:
            features = self._layers.compute(prefix, images)
            kept.append((features.to(self._store.device, copy=True), labels, examples))
            yield features, labels, examples

    def _copies(self, kept: list[Batch]) -> Iterator[Batch]:
        """Yield copies on the device, since the first layer after the frozen ones may work in place."""
        for features, labels, examples in kept:
            yield features.to(self._layers.ctx.device, copy=True), labels, examples


def _unchanged(features: Tensor) -> Tensor:
    return features

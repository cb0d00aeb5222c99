"""Grad-CAM (Selvaraju et al. 2017) by the package grad-cam: where a trained model looks for its prediction."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.model.file import LoadedModel, load
from trainer.model.images import Preprocess
from trainer.pages.galleries import PICTURE_SIZE, Overlay, locate
from trainer.pages.run_files import PredictedImage
from trainer.pages.thumbnails import thumbnail

_BATCH = 8
_TOKEN_NORMS = 3
"""The LayerNorm before the last attention is the third from the end: the last block has one more, and the model one."""
_SHADE, _HEAT = 0.45, 0.55
"""Weights of the gray picture and of the colors on it."""


class Explainer:
    """Draws heat maps on images for the class that the model predicts."""

    def __init__(self, folder: Path, root: Path | None) -> None:
        """Load the model of a run.

        Args:
            folder: the run folder.
            root: working folder of the run, which relative paths are relative to.

        Raises:
            UserError: the model file cannot be read, or its layers have no positions to draw.

        """
        loaded = load(folder)
        self._classes = {name: label for label, name in enumerate(loaded.metadata.classes)}
        self._preprocess, self._root = Preprocess(loaded.metadata.preprocessing), root
        self._cam, self._size = _make_cam(loaded), loaded.metadata.preprocessing.image_size

    def __call__(self, images: Sequence[PredictedImage]) -> Mapping[str, Overlay]:
        """Return path -> picture and heat map of the images that can be read."""
        overlays: dict[str, Overlay] = {}
        known = [entry for entry in images if entry.prediction in self._classes]
        for start in range(0, len(known), _BATCH):
            batch = known[start : start + _BATCH]
            pixels = {entry.path: shown for entry in batch if (shown := self._pixels(entry.path)) is not None}
            read = [entry for entry in batch if entry.path in pixels]
            if not read:
                continue
            inputs = self._preprocess([pixels[entry.path] for entry in read])
            targets = [ClassifierOutputTarget(self._classes[entry.prediction]) for entry in read]
            for entry, heat in zip(read, self._cam(inputs, targets), strict=True):
                picture = pixels[entry.path]
                overlays[entry.path] = Overlay(
                    thumbnail(picture, PICTURE_SIZE), thumbnail(_blend(picture, heat), PICTURE_SIZE)
                )
        return overlays

    def _pixels(self, path: str) -> np.ndarray | None:
        try:
            return self._preprocess.pixels(locate(path, self._root))
        except UserError:
            return None


def _blend(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], in gray with the colors of the heat map, float [H, W] from 0 to 1."""
    gray = picture.astype(np.float32).mean(2, keepdims=True)
    colors = mpl.colormaps["inferno"](heat)[..., :3].astype(np.float32) * 255
    blended: np.ndarray = np.clip(_SHADE * gray + _HEAT * colors, 0, 255).astype(np.uint8)
    return blended


def _make_cam(loaded: LoadedModel) -> Callable[[Tensor, list[ClassifierOutputTarget]], np.ndarray]:
    """Return (input, targets) -> heat maps, float [B, H, W] from 0 to 1."""
    size = loaded.metadata.preprocessing.image_size
    layer, to_positions = _find_layer(loaded.module, loaded.heads[0], size)
    cam = GradCAM(model=loaded.module, target_layers=[layer], reshape_transform=to_positions)
    return lambda inputs, targets: cam(input_tensor=inputs, targets=targets)


def _find_layer(model: nn.Module, head: str, size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """Return the last layer before the output layer whose output has positions, and what converts it to [B, C, H, W].

    Raises:
        UserError: there is none.

    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    is_before_head = True

    def record(module: nn.Module, _: object, output: object) -> None:
        if is_before_head and isinstance(output, Tensor) and not isinstance(module, nn.Dropout):
            outputs.append((module, output))

    def stop(*_: object) -> None:
        nonlocal is_before_head
        is_before_head = False

    handles = [module.register_forward_hook(record) for name, module in model.named_modules() if name]
    handles.append(model.get_submodule(head).register_forward_pre_hook(stop))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    finally:
        for handle in handles:
            handle.remove()
    calls = [module for module, _ in outputs]
    for module, output in reversed(outputs):
        if output.dim() == 4 and min(output.shape[1:3]) > 1 and output.shape[3] > 1 and calls.count(module) == 1:
            if output.shape[1] == output.shape[2] != output.shape[3]:  # [B, H, W, C]
                return module, lambda tensor: tensor.permute(0, 3, 1, 2)
            if output.shape[2] > 1:
                return module, None
        if output.dim() == 3:  # tokens of a transformer
            break
    norms = [(module, output) for module, output in outputs if isinstance(module, nn.LayerNorm) and output.dim() == 3]
    if len(norms) >= _TOKEN_NORMS:
        module, output = norms[-_TOKEN_NORMS]
        side = int(output.shape[1] ** 0.5)  # class and register tokens come before the patches
        return module, lambda tensor: tensor[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
    raise UserError("the model has no layer with positions, which Grad-CAM draws")

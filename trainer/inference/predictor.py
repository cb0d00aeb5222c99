"""Compute logits and features of images as a run's evaluation does: same normalization, precision and memory layout."""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from trainer.data.augment import Normalize
from trainer.distributed.precision import Execution, set_float32_precision, supported_precisions
from trainer.errors import UserError
from trainer.model.autocast import with_cast_weights
from trainer.model.file import LoadedModel
from trainer.model.metadata import ModelMetadata
from trainer.text import first_line

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """Computes the logits of images. Several threads may use one at the same time."""

    def __init__(self, loaded: LoadedModel, device: torch.device, execution: Execution) -> None:
        """Move the model to the device, into the memory layout of `execution`.

        Args:
            loaded: the model; it is moved in place, and stays in float32.
            device: computes the logits.
            execution: precision and memory layout, see `eval_execution`.

        """
        set_float32_precision(execution.precision, device)
        self.device, self.execution = device, execution
        self.module: nn.Module = loaded.module.to(device).to(memory_format=execution.memory_format)
        """The model that computes: in float32, or with weights in the dtype of autocast."""
        self._head = loaded.heads[0]
        self._normalize = Normalize(loaded.metadata.preprocessing, device)
        self._features: nn.Module | None = None
        self._lock = threading.Lock()
        self.slow_because: str | None = None
        """Why autocast casts the weights in each forward pass; None if they are cast once, or need no cast."""
        if (dtype := _AUTOCAST.get(execution.precision)) is not None:
            self._cast_weights(dtype, loaded.metadata.preprocessing.image_size)

    @torch.inference_mode()
    def logits(self, images: Tensor, *, tta: bool = False) -> Tensor:
        """Return the logits of images, float32 [B, K], on the device.

        Args:
            images: uint8 [B, 3, S, S], resized and cropped by `EvalTransform`.
            tta: test-time augmentation: the mean of the logits of each image and of its mirror image.

        """
        images = images.to(self.device, non_blocking=True)
        logits = self._forward(self.module, images)
        return (logits + self._forward(self.module, images.flip(3))) / 2 if tta else logits

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Return the input of the output layer, averaged over positions: float32 [B, D], on the device.

        `images` are as for `logits`.
        """
        features = self._forward(self._feature_module(), images.to(self.device, non_blocking=True))
        return features.flatten(2).mean(2) if features.ndim > 2 else features

    @torch.inference_mode()
    def _cast_weights(self, dtype: torch.dtype, image_size: int) -> None:
        """Cast the weights once, not in each forward pass, if the logits stay equal bit for bit."""
        generator = torch.Generator().manual_seed(0)  # PyTorch's own random state stays as it is
        images = torch.randint(256, (1, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
        images = images.to(self.device)
        expected = self._forward(self.module, images)
        try:
            cast = with_cast_weights(self.module, dtype)
            is_equal = torch.equal(self._forward(cast, images), expected)
        except RuntimeError as error:  # a layer computes with these weights outside of autocast, or no memory is left
            self.slow_because = first_line(error)
            return
        if is_equal:
            self.module = cast
        else:
            self.slow_because = "weights that are cast once change the logits"

    def _forward(self, module: nn.Module, images: Tensor) -> Tensor:
        inputs = self._normalize(images.contiguous(memory_format=self.execution.memory_format))
        with self._autocast():
            return cast(Tensor, module(inputs)).float()

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _AUTOCAST.get(self.execution.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _feature_module(self) -> nn.Module:
        """Return the model without its output layer. It shares the tensors of the model.

        A hook on the output layer would record the images of other threads, too.
        """
        with self._lock:
            if self._features is None:
                shared = {id(tensor): tensor for tensor in chain(self.module.parameters(), self.module.buffers())}
                module = copy.deepcopy(self.module, shared)
                module.set_submodule(self._head, nn.Identity())
                self._features = module.eval()
        return self._features


def eval_execution(metadata: ModelMetadata, device: torch.device) -> Execution:
    """Return precision and memory layout of the run's evaluation; fp32 if the device lacks its precision."""
    saved = metadata.execution or Execution("fp32", channels_last=False)
    is_supported = saved.precision in supported_precisions(device) and not (
        device.type == "cpu" and saved.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return saved if is_supported else Execution("fp32", saved.channels_last)


def make_predictor(loaded: LoadedModel, device: torch.device, *, warn: Callable[[str], object]) -> Predictor:
    """Return a predictor that computes as the run's evaluation did; `warn` is told what differs, or is slower."""
    saved, execution = loaded.metadata.execution, eval_execution(loaded.metadata, device)
    if saved is not None and saved.precision != execution.precision:
        warn(
            f"the run was evaluated in {saved.precision}, which this {device.type.upper()} lacks: the model is "
            f"computed in {execution.precision}, so probabilities differ slightly"
        )
    predictor = Predictor(loaded, device, execution)
    if predictor.slow_because is not None:
        warn(
            f"{execution.precision}: the weights are cast in each forward pass, which is slower than once "
            f"({predictor.slow_because})"
        )
    return predictor


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of a name: `auto` (a GPU if there is one), `cpu`, `cuda`, or `cuda:1`.

    Raises:
        UserError: the name is not valid, or this machine lacks the device.

    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device is {name!r}: expected auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: expected auto, cpu or cuda")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device is {name!r}, but torch finds {gpus} GPUs here: choose auto or cpu")
    return device

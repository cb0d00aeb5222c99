"""Copy the backbone's weights into a model with a new head, by name, and report what does not fit."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from trainer.errors import UserError
from trainer.model.architectures import architectures, base_name
from trainer.model.build import construct_empty
from trainer.model.head import Head
from trainer.model.torchvision_weights import find_enum
from trainer.model.weights import SourceWeights
from trainer.text import join_truncated

_CANDIDATES = 8
"""Architectures that are built and compared, those with the most similar number of parameters."""
_MIN_EXTRA = 4
"""Tensors in the weights but not in the model, from which on the weights may be those of a larger architecture."""
_MAX_DIFFERING = 6
"""Parameters that may differ: weight and bias of up to two output layers, and a position embedding."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file fit a model; the heads' tensors are not counted."""

    source: str
    copied: int
    """Number of the backbone's tensors that were copied."""
    missing: tuple[str, ...]
    """Tensors of the backbone that the file does not contain."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the model does not have."""
    mismatched: tuple[str, ...]
    """Tensors with another shape or dtype, each with its shape and the expected one."""
    interpolated: str = ""
    """Sentence on a position embedding that was interpolated to another image size."""

    def lines(self) -> list[str]:
        """Return the report as lines for the console."""
        total = self.copied + len(self.missing) + len(self.mismatched)
        lines = [f"{self.copied} of the backbone's {total} tensors from {self.source}; the output layer is new"]
        if self.interpolated:
            lines.append(self.interpolated)
        for problem, keys in (
            ("NOT IN THE FILE, left random", self.missing),
            ("OF ANOTHER SHAPE OR DTYPE, left random", self.mismatched),
            ("in the file but not in the model, ignored", self.unexpected),
        ):
            if keys:
                lines.append(f"{len(keys)} {problem}: {join_truncated(keys)}")
        return lines


def match_weights(
    model: nn.Module,
    heads: Sequence[Head],
    weights: SourceWeights,
    *,
    name: str,
    image_size: int,
    allow_partial: bool = False,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Return which tensors of the backbone fit, and these tensors.

    A ViT's position embedding is interpolated to the image size, by torchvision's function.

    Args:
        model: with its new heads, which are not compared; it may be on the meta device.
        heads: the output layers.
        weights: what was read.
        name: architecture, for errors.
        image_size: side of the model's images in pixels.
        allow_partial: the option model.allow_partial_weights: the backbone's other tensors may stay random.

    Raises:
        UserError: a tensor of the backbone is missing or does not fit, or a position embedding cannot be interpolated.

    """
    head_keys = tuple(f"{head.name}." for head in heads)
    resized, interpolated = _interpolate_positions(model, weights.tensors, image_size, weights.source)
    loaded = {k: v for k, v in resized.items() if not k.startswith(head_keys)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(head_keys)}
    fitting = {k: loaded[k] for k in expected if k in loaded and fits(k, expected[k], loaded[k])}
    report = LoadReport(
        source=weights.source,
        copied=len(fitting),
        missing=tuple(k for k in expected if k not in loaded and not k.endswith("num_batches_tracked")),
        unexpected=(*(k for k in loaded if k not in expected), *weights.others),
        mismatched=tuple(
            _describe_mismatch(k, expected[k], loaded[k]) for k in expected if k in loaded and k not in fitting
        ),
        interpolated=interpolated,
    )
    none_fits = all(key.endswith("num_batches_tracked") for key in fitting)
    if none_fits or (not allow_partial and (report.missing or report.mismatched)):
        raise UserError(_explain_misfit(report, name, weights.tensors, expected, none_fits=none_fits))
    extra = [key for key in loaded if key not in expected]
    is_partial = report.missing or report.mismatched
    larger = None if is_partial or allow_partial or len(extra) < _MIN_EXTRA else _guess_architecture(weights.tensors)
    if larger not in {None, base_name(name)}:  # such as a ResNet-101 for resnet50, whose tensors all fit
        raise UserError(
            f"{weights.source} contains a {larger}, not a {name}: {len(extra)} of its tensors would be ignored "
            f"({join_truncated(extra, limit=3)}). Set model.name to {larger}, or --model.allow_partial_weights true"
        )
    return report, fitting


def load_weights(
    model: nn.Module,
    heads: Sequence[Head],
    weights: SourceWeights,
    *,
    name: str,
    image_size: int,
    allow_partial: bool = False,
) -> LoadReport:
    """Copy the backbone's tensors into a model with new heads, which keep their initialization; see `match_weights`."""
    report, fitting = match_weights(
        model, heads, weights, name=name, image_size=image_size, allow_partial=allow_partial
    )
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in fitting.items():
            state[key].copy_(tensor)
    return report


def _describe_mismatch(key: str, expected: Tensor, loaded: Tensor) -> str:
    if expected.shape != loaded.shape:
        return f"{key} {list(loaded.shape)}, expected {list(expected.shape)}"
    if expected.dtype != loaded.dtype:
        return f"{key} {loaded.dtype}, expected {expected.dtype}"
    return f"{key} has other constants"


def _explain_misfit(
    report: LoadReport, name: str, loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, none_fits: bool
) -> str:
    total = report.copied + len(report.missing) + len(report.mismatched)
    if none_fits:
        lines = [
            f"no tensor in {report.source} fits {name}.",
            f"  it contains: {join_truncated(loaded, limit=4)}",
            f"  {name} has: {join_truncated(expected, limit=4)}",
        ]
    else:
        lines = [
            f"{report.source} does not fit {name}: {total - report.copied} of the backbone's {total} tensors differ."
        ]
        if report.missing:
            lines.append(f"  {len(report.missing)} missing: {join_truncated(report.missing, limit=4)}")
    if report.mismatched:
        lines.append(
            f"  {len(report.mismatched)} of another shape or dtype: {join_truncated(report.mismatched, limit=4)}"
        )
    guess = _guess_architecture(loaded)
    if guess is not None and guess != base_name(name):
        lines.append(f"  The file contains a {guess}: set model.name to {guess}, or choose other weights.")
    elif guess is None:
        lines.append("  Is model.name the architecture that the file was saved from?")
    if not none_fits:
        lines.append("  --model.allow_partial_weights true leaves these tensors random.")
    return "\n".join(lines)


def _guess_architecture(state: Mapping[str, Tensor]) -> str | None:
    """Return the architecture whose tensors, except for its output layers, are those of a state dict, or None."""
    parameters = sum(tensor.numel() for name, tensor in state.items() if not name.endswith(_BUFFERS))
    published = {name: find_enum(name, "DEFAULT").meta["num_params"] for name in architectures()}
    for name in sorted(published, key=lambda name: abs(published[name] - parameters))[:_CANDIDATES]:
        expected = construct_empty(name).state_dict()
        differing = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
        if sum(not key.endswith(_BUFFERS) for key in differing) <= _MAX_DIFFERING:
            return name
    return None


def fits(key: str, expected: Tensor, loaded: Tensor) -> bool:
    """Return whether a loaded tensor can replace a model's tensor.

    Integer tensors other than BatchNorm's counters are constants of the architecture, such as Swin's indices: they must
    be equal.
    """
    if expected.shape != loaded.shape:
        return False
    if expected.is_floating_point():
        return loaded.is_floating_point()
    return expected.dtype == loaded.dtype and (key.endswith("num_batches_tracked") or torch.equal(expected, loaded))


def _interpolate_positions(
    model: nn.Module, state: Mapping[str, Tensor], image_size: int, source: str
) -> tuple[Mapping[str, Tensor], str]:
    """Return the state with a position embedding of the model's size, and a sentence if it was interpolated."""
    key = "encoder.pos_embedding"
    if not isinstance(model, VisionTransformer) or key not in state:
        return state, ""
    old, new = state[key], model.state_dict()[key]
    is_other_model = old.dim() == 3 and old.shape[2] != new.shape[2]
    if old.shape == new.shape or is_other_model:
        return state, ""
    patches = old.shape[1] - 1 if old.dim() == 3 and old.is_floating_point() else 0
    if old.shape[:1] != new.shape[:1] or patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise UserError(
            f"{source}: its position embedding {list(old.shape)} cannot be interpolated to "
            f"{list(new.shape)}, which images of {image_size} px need: expected "
            f"[1, 1 + n x n patches, {new.shape[2]}]"
        )
    resized: Mapping[str, Tensor] = interpolate_embeddings(
        image_size, model.patch_size, OrderedDict({**state, key: old.float()})
    )
    before, after = math.isqrt(patches), image_size // model.patch_size
    return resized, f"position embedding interpolated from {before} x {before} to {after} x {after} patches"

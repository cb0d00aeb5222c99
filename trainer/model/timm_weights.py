"""Read weights for timm's models: published ones or a file, with the names and shapes that timm gives them.

Checkpoints of other programs, older versions of timm, or another image size are converted by the function that timm
itself applies to the model's published weights.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from trainer.model.architectures import TIMM
from trainer.model.encoder_classifier import EncoderClassifier
from trainer.model.state_dict import require_plain, select_state
from trainer.model.timm_hub import find_published
from trainer.model.timm_models import pretrained_cfg
from trainer.model.torchvision_weights import file_path, is_file
from trainer.model.weights import SourceWeights
from trainer.model.weights_file import read_weights_file
from trainer.text import join_truncated

_Filter: TypeAlias = Callable[..., Mapping[str, Tensor]]


def read_timm_weights(
    name: str, weights: str, model: nn.Module, *, key: str = "auto", on_progress: Callable[[str], None] | None = None
) -> SourceWeights:
    """Return the weights, downloaded if no cache holds them.

    Args:
        name: `timm/NAME`.
        weights: DEFAULT for timm's published ones, or the path of a file or folder.
        model: built for the image size, with any output layer.
        key: the option model.weights_key.
        on_progress: called with one line before a download.

    Raises:
        UserError: there are no such weights, the download fails, or the file is missing, damaged, unsafe or not finite.

    """
    read = _read(name, weights, model, key=key, mmap=False)
    if read is None:
        find_published(name, pretrained_cfg(name)).download(on_progress)
        read = _read(name, weights, model, key=key, mmap=False)
    assert read is not None  # for mypy: it was downloaded
    return read


def peek_timm_weights(name: str, weights: str, model: nn.Module, *, key: str = "auto") -> SourceWeights | None:
    """Return the weights without reading most of their values; None if they have to be downloaded first.

    Raises:
        UserError: as `read_timm_weights`, except that values that are not finite are not noticed.

    """
    return _read(name, weights, model, key=key, mmap=True)


def _read(name: str, weights: str, model: nn.Module, *, key: str, mmap: bool) -> SourceWeights | None:
    # The weights of an encoder that timm has no classifier for are those of the encoder alone.
    encoder, prefix = (model.encoder, "encoder.") if isinstance(model, EncoderClassifier) else (model, "")

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + key: tensor for key, tensor in tensors.items()}

    if is_file(weights):
        path, source = file_path(weights), f"file {weights}"
        content = read_weights_file(path, mmap=mmap)
        is_published = False
    else:
        published = find_published(name, pretrained_cfg(name))
        cached = published.cached()
        if cached is None:
            return None
        path, source = cached, f"timm's {name.removeprefix(TIMM)}, {published.label}"
        content = read_weights_file(path, advice="delete it, and it will be downloaded again", mmap=mmap)
        is_published = True
    if is_published and key == "auto" and _is_state(content):
        # As timm does it: the names of a larger model, such as CLIP's, can only be converted with their prefix.
        plain = require_plain(content, str(path), check_values=not mmap)
        converted = _convert(plain, encoder, name)
        if not _misfits(converted, encoder):
            return SourceWeights(named(converted), source, notes=_describe_resized(converted, plain))
    selected = select_state(content, list(encoder.state_dict()), key=key, path=str(path))
    plain = require_plain(selected.tensors, str(path), check_values=not mmap)
    converted = _convert(plain, encoder, name)
    notes = (*selected.notes, *_describe_resized(converted, plain))
    return SourceWeights(named(converted), source, selected.others, notes)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())


def _convert(state: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return a state with the model's names and shapes, by timm's function; unchanged if that does not apply to it."""
    convert = _published_filter(name) if _misfits(state, model) else None
    if convert is None:
        return state
    # Not every interpolation works in half precision.
    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    arguments = (floats, model)[: len(inspect.signature(convert).parameters)]
    try:
        with torch.no_grad():
            converted = convert(*arguments)
    except Exception:  # noqa: BLE001 (timm's code for one format may raise anything for another)
        return state  # the caller compares names and shapes, and says what differs
    return {key: tensor for key, tensor in converted.items() if isinstance(tensor, Tensor)}


def _misfits(state: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Return the names of the model's tensors that a state lacks or has in another shape, except for its classifier."""
    differing = {
        name
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != tensor.shape)
    }
    return differing - _classifier_keys(model)


def _classifier_keys(model: nn.Module) -> set[str]:
    """Return the names of the tensors of a model's classifier."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else ()
    parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
    ids = {id(parameter) for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def _published_filter(name: str) -> _Filter | None:
    """Return the function by which timm converts the published weights of a model; None if it takes them as they are.

    timm passes it to its own loader, within the function that constructs the model, and offers no other access.
    """
    import timm  # noqa: PLC0415 (an optional package: `check_architecture` comes first)
    from timm.models import _builder  # noqa: PLC0415

    filters: list[_Filter | None] = []

    def record(*_: Any, filter_fn: _Filter | None = None, **__: Any) -> None:
        filters.append(filter_fn)

    builder: Any = _builder
    load_pretrained = builder.load_pretrained
    try:
        builder.load_pretrained = record
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            timm.create_model(name.removeprefix(TIMM), pretrained=True)
    finally:
        builder.load_pretrained = load_pretrained
    return filters[0] if filters else None


def _describe_resized(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a line on tensors that timm's function has interpolated, such as position embeddings."""
    resized = [
        f"{key} {list(before[key].shape)} -> {list(tensor.shape)}"
        for key, tensor in state.items()
        if key in before and before[key].ndim == tensor.ndim and before[key].shape != tensor.shape
    ]
    return (f"resized to the image size by timm: {join_truncated(resized, limit=2)}",) if resized else ()

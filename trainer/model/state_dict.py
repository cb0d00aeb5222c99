"""Select a model's state dict in a checkpoint of any script: under a key, with or without a prefix, raw or averaged."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.text import join_truncated

_MAX_NESTING = 4
_PROBES = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# An average of the weights (EMA, SWA), or MoCo's and BYOL's slow copy of the encoder.
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?|shadow|momentum|target|encoder_k)([._]|$)")
# Wrappers within a model: fully sharded modules, and those with activation checkpointing.
_WRAPPERS = re.compile(r"(?<=\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Module names must not contain dots, but torchvision's DenseNet files are older than that rule.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


@dataclass(frozen=True)
class SelectedState:
    """A model's tensors in a checkpoint."""

    tensors: dict[str, Tensor]
    """Under the model's names."""
    others: tuple[str, ...]
    """Names of the tensors beside them."""
    notes: tuple[str, ...]
    """Lines to print: where the tensors were, and which other copies of the model the file contains."""


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a checkpoint that may be the model."""

    key: str
    """Keys of the checkpoint above the tensors, joined by dots."""
    prefix: str
    """Start of the tensors' names, with its last dot."""
    tensors: Mapping[str, Tensor]
    count: int
    """Number of the model's names among them."""

    @property
    def label(self) -> str:
        return ".".join(filter(None, (self.key, self.prefix.rstrip("."))))

    def select(self) -> dict[str, Tensor]:
        length = len(self.prefix)
        return {name[length:]: tensor for name, tensor in self.tensors.items() if name.startswith(self.prefix)}


def select_state(content: Any, expected: Collection[str], *, key: str, path: str) -> SelectedState:
    """Return the tensors of a checkpoint under the model's names: those that match most of the model's names.

    Wrappers' keys (`state_dict`, `model`) and prefixes (`module.`, `backbone.`, `module.encoder_q.`) need no list.
    An average beside the raw weights (`model_ema`) is taken only by its key.

    Args:
        content: as read from the file.
        expected: names of the model's tensors.
        key: the option model.weights_key: `auto`, or a key or a prefix in the file.
        path: of the file, for errors.

    Raises:
        UserError: the file contains no tensors by name, nothing under the key, or several models.

    """
    containers = list(_containers(content, "", 0, set()))
    if not containers:
        _refuse_whole_model(content, path)
        is_mapping = isinstance(content, Mapping)
        found = (
            f"the keys {join_truncated(map(str, content)) or '(none)'}" if is_mapping else f"a {type(content).__name__}"
        )
        raise UserError(f"{path}: contains {found} and no tensors by name; expected a model's state dict")
    names = [name for name in expected if not name.endswith("num_batches_tracked")]
    candidates = [candidate for where, tensors in containers for candidate in _candidates(where, tensors, names)]
    if not candidates:  # another architecture: the caller compares the names
        _refuse_whole_model(content, path)
        candidates = [_Candidate(where, "", tensors, 0) for where, tensors in containers]
    if key != "auto":
        under_key = [candidate for candidate in candidates if f".{key}." in f".{candidate.label}."]
        if not under_key:
            labels = sorted({candidate.label for candidate in candidates if candidate.label})
            raise UserError(
                f"{path}: contains no such model under model.weights_key {key}; "
                f"expected {join_truncated(labels) or 'auto'}"
            )
        candidates = under_key
    best = max(candidate.count for candidate in candidates)
    complete = [candidate for candidate in candidates if candidate.count >= 0.9 * best]
    chosen = _choose(complete, path) if best else max(candidates, key=lambda candidate: len(candidate.tensors))
    others = [candidate for candidate in complete if best and candidate is not chosen]
    return SelectedState(
        tensors=chosen.select(),
        others=tuple(name for name in chosen.tensors if not name.startswith(chosen.prefix)),
        notes=tuple(_notes(chosen, others)),
    )


def _containers(content: Any, key: str, depth: int, seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (keys joined by dots, tensors by name) of each Mapping in a checkpoint that holds tensors."""
    if not isinstance(content, Mapping) or depth > _MAX_NESTING or id(content) in seen:  # it may contain itself
        return
    seen.add(id(content))
    tensors = {
        _OLD_DENSENET.sub(r"\1\2", _WRAPPERS.sub("", str(name))): tensor
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
    if tensors:
        yield key, tensors
    for name, value in content.items():
        yield from _containers(value, f"{key}.{name}" if key else str(name), depth + 1, seen)


def _refuse_whole_model(content: Any, path: str) -> None:
    """Raise a UserError if a file contains a module itself, whose attributes the reader has put in a `__dict__`."""
    for value in [content, *(content.values() if isinstance(content, Mapping) else [])]:
        if "_modules" in getattr(value, "__dict__", {}):
            raise UserError(
                f"{path}: refused, because it contains a whole model as a Python object: loading it could run any code "
                "on this machine. Save only the state dict: torch.save(model.state_dict(), ...), or a .safetensors file"
            )


def _candidates(key: str, tensors: Mapping[str, Tensor], expected: list[str]) -> Iterator[_Candidate]:
    """Yield the prefixes under which a good part of the model's names are found."""
    probes = expected[:: max(1, len(expected) // _PROBES)]
    prefixes = dict.fromkeys(  # in the order of the file
        name.removesuffix(probe) for name in tensors for probe in probes if name == probe or name.endswith(f".{probe}")
    )
    for prefix in prefixes:
        count = sum(prefix + name in tensors for name in expected)
        below = sum(name.startswith(prefix) and not name.endswith("num_batches_tracked") for name in tensors)
        # A part of a network (`layer1.0.`) contains some of the names, too.
        if count >= 0.3 * len(expected) or count >= 0.8 * below:
            yield _Candidate(key, prefix, tensors, count)


def _choose(candidates: list[_Candidate], path: str) -> _Candidate:
    raw = [candidate for candidate in candidates if not _AVERAGE.search(candidate.label)] or candidates
    if len(raw) > 1 and not all(_same(raw[0], other) for other in raw[1:]):
        labels = [candidate.label or "(none)" for candidate in raw]
        raise UserError(
            f"{path}: contains several models: {join_truncated(labels)}. Choose one by model.weights_key, such as "
            f"--model.weights_key {next(label for label in labels if label != '(none)')}"
        )
    return raw[0]


def _same(one: _Candidate, other: _Candidate) -> bool:
    a, b = one.select(), other.select()
    return a.keys() == b.keys() and all(
        tensor.data_ptr() == b[name].data_ptr() or torch.equal(tensor, b[name]) for name, tensor in a.items()
    )


def _notes(chosen: _Candidate, others: list[_Candidate]) -> Iterator[str]:
    if chosen.label:
        average = ", an average of the weights" * bool(_AVERAGE.search(chosen.label))
        yield f"the weights are those under {chosen.label!r} in the file{average}"
    averages = [candidate.label for candidate in others if _AVERAGE.search(candidate.label)]
    if averages:
        yield (
            f"the file also contains averaged weights, which are not used: --model.weights_key {averages[0]} takes them"
        )


def require_plain(tensors: Mapping[str, Tensor], path: str, *, check_values: bool = True) -> dict[str, Tensor]:
    """Return the tensors, those of floating point as float32.

    Args:
        tensors: on the CPU.
        path: of the file, for errors.
        check_values: also check that they are finite, which reads all of them.

    Raises:
        UserError: a tensor is sparse, quantized, not stored in full, or not finite.

    """
    return {name: _plain(tensor, name, path, check_values=check_values) for name, tensor in tensors.items()}


def _plain(tensor: Tensor, name: str, path: str, *, check_values: bool) -> Tensor:
    is_plain = (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and (tensor.dtype in _FLOATS or not tensor.is_floating_point())
    )
    if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {name} is not a plain dense tensor ({tensor.dtype}, {tensor.layout}); save the model in "
            "float32, float16 or bfloat16"
        )
    if not tensor.is_floating_point() or not check_values:
        return tensor
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{path}: {name} contains NaN or infinite values: the file is damaged, or its training diverged"
        )
    return tensor

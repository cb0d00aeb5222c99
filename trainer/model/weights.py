"""Read pretrained weights: those of torchvision, from torch.hub's cache or the network, or a file."""

import http.client
import socket
import urllib.error
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models import WeightsEnum

from trainer.errors import UserError
from trainer.model.state_dict import require_plain, select_state
from trainer.model.torchvision_weights import cache_path, file_path, find_enum, is_file
from trainer.model.weights_file import read_weights_file

_STALL_SECONDS = 30.0


@dataclass(frozen=True)
class SourceWeights:
    """Tensors of a model, as read from a file."""

    tensors: dict[str, Tensor]
    """On the CPU, under the model's names; those of floating point are float32."""
    source: str
    """Description of where they came from."""
    others: tuple[str, ...] = ()
    """Names of the file's other tensors."""
    notes: tuple[str, ...] = ()
    """Lines to print on what was taken from the file."""


def read_weights(
    name: str,
    weights: str,
    expected: Collection[str],
    *,
    key: str = "auto",
    on_progress: Callable[[str], None] | None = None,
) -> SourceWeights:
    """Return the weights, downloaded if torch.hub's cache does not hold them.

    Args:
        name: architecture.
        weights: a torchvision name, or the path of a file or folder.
        expected: names of the model's tensors.
        key: the option model.weights_key.
        on_progress: called with one line before a download.

    Raises:
        UserError: there are no such weights, the download fails, or the file is missing, damaged, unsafe or not finite.

    """
    path, source, advice = _locate(name, weights)
    if is_file(weights) or path.exists():
        content = read_weights_file(path, advice=advice)
    else:
        content = _download(name, find_enum(name, weights), on_progress)
    return _select(content, expected, key=key, path=str(path), source=source, check_values=True)


def peek_weights(name: str, weights: str, expected: Collection[str], *, key: str = "auto") -> SourceWeights | None:
    """Return the weights without reading most of their values; None if they have to be downloaded first.

    Raises:
        UserError: as `read_weights`, except that values that are not finite are not noticed.

    """
    path, source, advice = _locate(name, weights)
    if not is_file(weights) and not path.exists():
        return None
    content = read_weights_file(path, advice=advice, mmap=True)
    return _select(content, expected, key=key, path=str(path), source=source, check_values=False)


def _locate(name: str, weights: str) -> tuple[Path, str, str]:
    """Return path and description of the weights, and what to do if the file is damaged."""
    if is_file(weights):
        return file_path(weights), f"file {weights}", "download or save it again"
    entry = find_enum(name, weights)
    return cache_path(entry), f"torchvision {entry!r}", "delete it, and it will be downloaded again"


def _select(
    content: Any, expected: Collection[str], *, key: str, path: str, source: str, check_values: bool
) -> SourceWeights:
    selected = select_state(content, expected, key=key, path=path)
    tensors = require_plain(selected.tensors, path, check_values=check_values)
    return SourceWeights(tensors, source, selected.others, selected.notes)


def _download(name: str, entry: WeightsEnum, on_progress: Callable[[str], None] | None) -> Any:
    """Download torchvision's state dict and return it. torch.hub checks its SHA-256 and keeps it in its cache."""
    path = cache_path(entry)
    if on_progress is not None:
        on_progress(f"downloading {entry.url} ({entry.meta['_file_size']:.0f} MB) to {path}")
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)  # torch.hub sets no timeout: a stalled server would hang the run
    try:
        return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, urllib.error.URLError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"could not download the weights {entry!r} of {name} ({error}).\n"
            f"  from: {entry.url}\n"
            f"  Either put that file at {path}, name a local file in model.weights, or set model.weights to "
            "null for random weights"
        ) from error
    finally:
        socket.setdefaulttimeout(default_timeout)

"""Read weights from torchvision or from a file, check them, and copy them into a model by name."""

import http.client
import math
import os
import pickle  # for the class of an error; it unpickles nothing
import re
import socket
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer, WeightsEnum, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from trainer.errors import UserError
from trainer.model.head import Head
from trainer.text import join_truncated

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_NESTED = ("state_dict", "model_state_dict", "model", "model_state", "net", "model_ema")
"""Keys under which training scripts save the model's state dict."""
_MAX_NESTING = 4
_STALL_SECONDS = 30.0
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")
"""First bytes of torch.save's files: a zip archive, or a pickle before torch 1.6."""
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)|(TorchScript)")
# Module names must not contain dots, but torchvision's DenseNet files are older than that rule.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


def is_file(weights: str) -> bool:
    """Return whether `weights` is a local file rather than a name of torchvision's weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or os.sep in weights


def find_enum(name: str, weights: str) -> WeightsEnum:
    """Return torchvision's enum member of the model `name` for weights such as `DEFAULT` or `IMAGENET1K_V1`.

    Raises:
        UserError: the model has no such weights.

    """
    entries = get_model_weights(name)
    entry = entries.__members__.get(weights.removeprefix(f"{entries.__name__}."))
    if entry is None:
        raise UserError(
            f"{name} has no weights {weights!r}; expected one of {', '.join(entries.__members__)}, a local "
            f"file ({', '.join(SUFFIXES)}), or null for random weights"
        )
    return entry


def read_weights(
    name: str, weights: str, *, on_progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return (state dict on the CPU with floating-point tensors as float32, description of its source).

    Args:
        name: architecture.
        weights: a torchvision name, or a path that ends in one of SUFFIXES.
        on_progress: called with one line before a download.

    Raises:
        UserError: there are no such weights, the download fails, or the file is missing, damaged, unsafe or not finite.

    """
    if is_file(weights):
        path = Path(weights).expanduser()
        return _extract_state(_read_file(path), str(path)), f"file {weights}"
    entry = find_enum(name, weights)
    return _extract_state(_download(name, entry, on_progress), str(cache_path(entry))), f"torchvision {entry!r}"


def cache_path(entry: WeightsEnum) -> Path:
    """Return the path at which torch.hub caches torchvision's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name


def _download(name: str, entry: WeightsEnum, on_progress: Callable[[str], None] | None) -> Any:
    """Return torchvision's state dict, from its cache or from the network (torch.hub checks the SHA-256)."""
    path = cache_path(entry)
    if path.exists():
        return _read_file(path, advice="delete it, and it will be downloaded again")
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


def _read_file(path: Path, *, advice: str = "download or save it again") -> Any:
    if not path.is_file():
        raise UserError(f"{path}: there is no such weights file; expected a file ending in {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors and torch raise many kinds
            raise UserError(f"{path}: not a readable safetensors file ({error}); {advice}") from error
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a weights file ending in {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not start.startswith(_TORCH_MAGIC):
        # For example a web page, or a pointer file of Git LFS.
        content = f"it starts with {start!r}" if start else "it is empty"
        raise UserError(f"{path}: not a readable torch file ({content}); {advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are handled below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise many kinds
        # torch's own message recommends weights_only=False, so it is not shown.
        code = _PICKLED_CODE.search(str(error))
        if code is not None:
            raise UserError(
                f"{path}: refused, because it contains more than plain tensors ({code[1] or code[2]}): loading it "
                "could run any code on this machine. Save only the state dict: "
                "torch.save(model.state_dict(), ...), or a .safetensors file"
            ) from error
        is_unpickling = isinstance(error, pickle.UnpicklingError)
        reason = "it was not written by torch.save" if is_unpickling else _first_sentence(error)
        raise UserError(f"{path}: not a readable torch file ({reason}); {advice}") from error


def _first_sentence(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _extract_state(loaded: Any, path: str) -> dict[str, Tensor]:
    """Return the state dict without the prefixes of DDP and torch.compile, as finite float32."""
    for _ in range(_MAX_NESTING):  # a pickle may contain itself
        nested = _nested_state(loaded)
        if nested is None:
            break
        loaded = nested
    tensors = (
        {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        content = (
            f"the keys {join_truncated(map(str, loaded)) or '(none)'}"
            if isinstance(loaded, Mapping)
            else f"a {type(loaded).__name__}"
        )
        raise UserError(
            f"{path}: contains {content} and no tensors by name; expected a model's state dict, at the top level or "
            f"under {', '.join(_NESTED)}"
        )
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", key)
        if plain in state:
            raise UserError(f"{path}: contains {plain} twice, with and without a wrapper's prefix: save one model only")
        state[plain] = _plain_tensor(tensor, plain, path)
    return state


def _nested_state(loaded: Any) -> Mapping[Any, Any] | None:
    """Return the model's state in a checkpoint; tensors next to it (`best_acc1`) do not belong to the model."""
    if not isinstance(loaded, Mapping):
        return None
    return next((loaded[key] for key in _NESTED if isinstance(loaded.get(key), Mapping)), None)


def _plain_tensor(tensor: Tensor, key: str, path: str) -> Tensor:
    is_plain = (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and (tensor.dtype in _FLOATS or not tensor.is_floating_point())
    )
    if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {key} is not a plain dense tensor ({tensor.dtype}, {tensor.layout}); save the model in "
            "float32, float16 or bfloat16"
        )
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {key} contains NaN or infinite values: the file is damaged, or its training diverged")
    return tensor


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file were copied; the heads' tensors are not counted."""

    source: str
    copied: int
    """Number of the backbone's tensors that were copied."""
    missing: tuple[str, ...]
    """Tensors of the backbone that the file does not contain: they stay random."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the model does not have."""
    mismatched: tuple[str, ...]
    """Tensors with another shape or dtype: they stay random."""
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


def load_weights(
    model: nn.Module, heads: Sequence[Head], state: Mapping[str, Tensor], *, name: str, image_size: int, source: str
) -> LoadReport:
    """Copy the backbone's tensors into a model with new heads, by name; the heads keep their initialization.

    A ViT's position embedding is interpolated to the image size, by torchvision's function.

    Args:
        model: with its new heads.
        heads: not copied.
        state: as returned by `read_weights`.
        name: architecture, for errors.
        image_size: side of the model's images in pixels.
        source: description of where the weights came from.

    Raises:
        UserError: no tensor of the backbone fits, or a position embedding cannot be interpolated.

    """
    head_keys = tuple(f"{head.name}." for head in heads)
    renamed = {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in state.items()}
    resized, interpolated = _interpolate_positions(model, renamed, image_size, source)
    loaded = {k: v for k, v in resized.items() if not k.startswith(head_keys)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(head_keys)}
    fitting = {k for k in expected.keys() & loaded.keys() if fits(k, expected[k], loaded[k])}
    report = LoadReport(
        source=source,
        copied=len(fitting),
        missing=tuple(k for k in expected if k not in loaded and not k.endswith("num_batches_tracked")),
        unexpected=tuple(k for k in loaded if k not in expected),
        mismatched=tuple(k for k in expected if k in loaded and k not in fitting),
        interpolated=interpolated,
    )
    if not any(not k.endswith("num_batches_tracked") for k in fitting):
        shapes = [f"{k} {list(loaded[k].shape)}, expected {list(expected[k].shape)}" for k in report.mismatched]
        raise UserError(
            f"no tensor in {source} fits {name}.\n"
            f"  it contains: {join_truncated(loaded, limit=4)}\n"
            f"  {name} has: {join_truncated(expected, limit=4)}\n"
            + (f"  of another shape: {join_truncated(shapes, limit=4)}\n" if shapes else "")
            + "  Is model.name the architecture that the file was saved from?"
        )
    with torch.no_grad():
        for key in fitting:
            expected[key].copy_(loaded[key])
    return report


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
    model: nn.Module, state: dict[str, Tensor], image_size: int, source: str
) -> tuple[Mapping[str, Tensor], str]:
    """Return the state with a position embedding of the model's size, and a sentence if it was interpolated."""
    key = "encoder.pos_embedding"
    if not isinstance(model, VisionTransformer) or key not in state:
        return state, ""
    old, new = state[key], model.state_dict()[key]
    if old.shape == new.shape:
        return state, ""
    patches = old.shape[1] - 1 if old.dim() == 3 and old.is_floating_point() else 0
    if old.shape[::2] != new.shape[::2] or patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise UserError(
            f"{source}: its position embedding {list(old.shape)} cannot be interpolated to "
            f"{list(new.shape)}, which images of {image_size} px need: expected "
            f"[1, 1 + n x n patches, {new.shape[2]}]"
        )
    resized: Mapping[str, Tensor] = interpolate_embeddings(image_size, model.patch_size, OrderedDict(state))
    before, after = math.isqrt(patches), image_size // model.patch_size
    return resized, f"position embedding interpolated from {before} x {before} to {after} x {after} patches"

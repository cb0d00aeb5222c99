"""Weights from torchvision or from a file, checked, and copied into a grafted model by name."""

import http.client
import math
import os
import pickle  # for the class of an error only: nothing is unpickled by it
import re
import socket
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
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

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_NESTED = ("state_dict", "model_state_dict", "model", "model_state", "net", "model_ema")
"""Where training scripts keep the model's state in their checkpoint."""
_DEEPEST = 4
_STALL_SECONDS = 30.0
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_BEGINS = (b"PK\x03\x04", b"\x80")
"""What torch.save writes first: a zip archive, or a pickle before torch 1.6."""
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)|(TorchScript)")
# Module names must not hold dots; torchvision's DenseNet files are older than that rule and still do.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)


def is_file(weights: str) -> bool:
    """Return whether `weights` means a local file rather than one of torchvision's enum names."""
    return weights.endswith(SUFFIXES) or "/" in weights or os.sep in weights


def find_enum(name: str, weights: str) -> WeightsEnum:
    """Return torchvision's entry for weights such as `DEFAULT`, `IMAGENET1K_V1` of the model `name`.

    Raises:
        UserError: the model has no such weights.

    """
    entries = get_model_weights(name)
    entry = entries.__members__.get(weights.removeprefix(f"{entries.__name__}."))
    if entry is None:
        raise UserError(
            f"{name} has no weights {weights!r}; expected one of {', '.join(entries.__members__)}, a local "
            f"file ({', '.join(SUFFIXES)}), or null for a random start"
        )
    return entry


def read_weights(
    name: str, weights: str, *, on_progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return (state on the CPU, floating-point tensors as float32; where it came from, for a person).

    Args:
        name: the model, as in `build.names()`.
        weights: an enum name of torchvision, or a path that ends in one of SUFFIXES.
        on_progress: hears one line before a download begins.

    Raises:
        UserError: no such weights, no network, or a file that is missing, damaged, unsafe, not finite.

    """
    if is_file(weights):
        path = Path(weights).expanduser()
        return _checked(_read_file(path), str(path)), f"file {weights}"
    entry = find_enum(name, weights)
    return _checked(_download(name, entry, on_progress), str(_place(entry))), f"torchvision {entry!r}"


def _place(entry: WeightsEnum) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name


def _download(name: str, entry: WeightsEnum, on_progress: Callable[[str], None] | None) -> Any:
    """Return torchvision's state dict, from its cache or from the network (the file's SHA-256 is checked)."""
    place = _place(entry)
    if place.exists():
        return _read_file(place, advice="delete it, and it is downloaded again")
    if on_progress is not None:
        on_progress(f"downloading {entry.url} ({entry.meta['_file_size']:.0f} MB) to {place}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)  # torch.hub sets none: a stalled server would hang the run
    try:
        return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, urllib.error.URLError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(
            f"could not download the weights {entry!r} of {name} ({error}).\n"
            f"  from: {entry.url}\n"
            f"  Either put that file at {place}, name a local file in model.weights, or set model.weights to "
            "null for a random start"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _read_file(path: Path, *, advice: str = "fetch or write it again") -> Any:
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such weights file; expected a file ending in {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors' own, and nearly any other from torch
            raise UserError(f"{path}: not a readable safetensors file ({error}); {advice}") from error
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a weights file ending in {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            beginning = file.read(40)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not beginning.startswith(_TORCH_BEGINS):
        # A web page, perhaps, or the pointer that Git LFS leaves in a file's place.
        found = f"it begins with {beginning!r}" if beginning else "it is empty"
        raise UserError(f"{path}: not a readable torch file ({found}); {advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on formats that are refused or read below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        # torch's own text advises weights_only=False, so it is not passed on.
        code = _PICKLED_CODE.search(str(error))
        if code is not None:
            raise UserError(
                f"{path}: not read, since it holds more than plain tensors ({code[1] or code[2]}): loading "
                "that could run any code on this machine. Save the state dict alone: "
                "torch.save(model.state_dict(), ...), or a .safetensors file"
            ) from error
        is_unpickling = isinstance(error, pickle.UnpicklingError)
        reason = "no plain torch.save" if is_unpickling else _first_sentence(error)
        raise UserError(f"{path}: not a readable torch file ({reason}); {advice}") from error


def _first_sentence(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _checked(loaded: Any, path: str) -> dict[str, Tensor]:
    """Return the plain state: unwrapped, without wrappers' prefixes, float32, finite."""
    for _ in range(_DEEPEST):  # a file may well contain itself
        inner = _inner(loaded)
        if inner is None:
            break
        loaded = inner
    tensors = (
        {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    )
    if not tensors:
        found = (
            f"the keys {_some(map(str, loaded)) or '(none)'}"
            if isinstance(loaded, Mapping)
            else f"a {type(loaded).__name__}"
        )
        raise UserError(
            f"{path}: holds {found} and no tensors by name; expected a model's state dict, as it is or under "
            f"{', '.join(_NESTED)}"
        )
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = re.sub(r"^(?:(?:module|_orig_mod)\.)+", "", key)
        if plain in state:
            raise UserError(
                f"{path}: holds {plain} twice, with and without a wrapper's prefix: save one model only"
            )
        state[plain] = _plain_tensor(tensor, plain, path)
    return state


def _inner(loaded: Any) -> Mapping[Any, Any] | None:
    """Return what a checkpoint holds for the model; tensors beside it (`best_acc1`) are not the model's."""
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
        raise UserError(
            f"{path}: {key} holds NaN or infinite values: the file is damaged, or its training diverged"
        )
    return tensor


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors; the heads' are left out of the lists."""

    source: str
    copied: int
    """Tensors of the backbone that were copied."""
    missing: tuple[str, ...]
    """Of the backbone, but not in the file: left at their random start."""
    unexpected: tuple[str, ...]
    """In the file, but not in the model."""
    mismatched: tuple[str, ...]
    """In both, with another shape or kind of number: left at their random start."""
    interpolated: str = ""
    """What became of a position embedding for another image size."""

    def lines(self) -> list[str]:
        """Return the report for a person."""
        total = self.copied + len(self.missing) + len(self.mismatched)
        lines = [
            f"{self.copied} of the backbone's {total} tensors from {self.source}; "
            "the output layer starts anew"
        ]
        if self.interpolated:
            lines.append(self.interpolated)
        for what, keys in (
            ("NOT IN THE FILE, left random", self.missing),
            ("OF ANOTHER SHAPE OR KIND, left random", self.mismatched),
            ("in the file but not in the model, ignored", self.unexpected),
        ):
            if keys:
                lines.append(f"{len(keys)} {what}: {_some(keys)}")
        return lines


def _some(keys: Iterable[str], most: int = 10) -> str:
    """Return the first keys and how many more there are, as they may be shown in a terminal."""
    listed = [key if key.isprintable() else repr(key) for key in keys]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def load_weights(
    model: nn.Module,
    heads: Sequence[Head],
    state: Mapping[str, Tensor],
    *,
    name: str,
    image_size: int,
    source: str,
) -> LoadReport:
    """Copy the backbone's tensors into a grafted model, by name; the heads are left as they were initialised.

    A ViT's position embedding for another image size is interpolated, as torchvision does.

    Raises:
        UserError: nothing of the backbone fits, or a position embedding cannot be interpolated.

    """
    head_keys = tuple(f"{head.name}." for head in heads)
    renamed = {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in state.items()}
    fitted, interpolated = _fit_positions(model, renamed, image_size, source)
    given = {k: v for k, v in fitted.items() if not k.startswith(head_keys)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(head_keys)}
    fitting = {k for k in wanted.keys() & given.keys() if fits(k, wanted[k], given[k])}
    missing = tuple(k for k in wanted if k not in given and not k.endswith("num_batches_tracked"))
    report = LoadReport(
        source=source,
        copied=sum(k in fitting for k in wanted),
        missing=missing,
        unexpected=tuple(k for k in given if k not in wanted),
        mismatched=tuple(k for k in wanted if k in given and k not in fitting),
        interpolated=interpolated,
    )
    if not any(not k.endswith("num_batches_tracked") for k in fitting):
        shapes = [f"{k} {list(given[k].shape)} for {list(wanted[k].shape)}" for k in report.mismatched]
        raise UserError(
            f"nothing in {source} fits {name}.\n"
            f"  it holds: {_some(given, 4)}\n"
            f"  {name} has: {_some(wanted, 4)}\n"
            + (f"  of another shape: {_some(shapes, 4)}\n" if shapes else "")
            + "  Is model.name the architecture that the file was saved from?"
        )
    with torch.no_grad():
        for key in fitting:
            wanted[key].copy_(given[key])
    return report


def fits(key: str, wanted: Tensor, given: Tensor) -> bool:
    """Return whether a file's tensor can stand in a model.

    Whole numbers other than BatchNorm's counters are the design's own constants, such as Swin's indices: they
    are equal, or of another model.
    """
    if wanted.shape != given.shape:
        return False
    if wanted.is_floating_point():
        return given.is_floating_point()
    return wanted.dtype == given.dtype and (key.endswith("num_batches_tracked") or torch.equal(wanted, given))


def _fit_positions(
    model: nn.Module, state: dict[str, Tensor], image_size: int, source: str
) -> tuple[Mapping[str, Tensor], str]:
    """Return the state with a position embedding that fits, and a sentence where it was interpolated."""
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
    fitted: Mapping[str, Tensor] = interpolate_embeddings(image_size, model.patch_size, OrderedDict(state))
    before, after = math.isqrt(patches), image_size // model.patch_size
    return fitted, f"position embedding interpolated from {before} x {before} to {after} x {after} patches"

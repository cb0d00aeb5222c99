"""Read a file of weights by its content: safetensors, torch.save, or a folder or index of shards as of Hugging Face.

Nothing in a file is executed. Python objects beside the tensors, such as a script's arguments, are not created: empty
containers take their place.
"""

import json
import os
import pickle  # for the class of an error; it unpickles nothing
import re
import stat
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files with the weights in a folder of Hugging Face, or in a run folder, in this order."""
_EXPECTED = "expected a safetensors file or a file that torch.save has written"
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80")
"""First bytes of torch.save's files: a zip archive, or a pickle before torch 1.6."""
_MAX_SAFETENSORS_HEADER = 100_000_000
_MAX_INDEX = 64 << 20
_PICKLED_CODE = re.compile(r"GLOBAL ([\w.]+)|(TorchScript)")
# Objects that have no place beside weights, and those that contain tensors, which must not be lost.
_REFUSED = re.compile(
    r"(builtins|os|posix|nt|sys|subprocess|shutil|ctypes|socket|pty|runpy|importlib|pickle|webbrowser|torchao)\."
    r"|torch\.(_|ao\.|distributed|jit|nn\.parameter|storage)"
)
_HARMLESS_BUILTINS = (
    *("frozenset", "slice", "range", "object", "type", "list", "dict", "tuple", "set", "int", "float", "str", "bool"),
    *("bytes", "complex"),
)
_MAX_CLASSES = 100
"""Classes of Python objects in a checkpoint."""
_OTHER_FORMATS = {
    b"\x89HDF": "an HDF5 file of Keras",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
    b"<": "a web page or XML",
    b"\x08": "an ONNX or TensorFlow file",
}


class _Unread:
    """Takes the place of a Python object in a checkpoint, and ignores its content."""

    def __new__(cls, *_: object, **__: object) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _UnreadMapping:
    """Takes the place of an object of an unknown class: an OrderedDict, which torch's unpickler can fill.

    The items of a subclass of dict become its items, and an object's attributes become its `__dict__`.
    """

    def __new__(cls, *_: object, **__: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


class _UnreadList:
    """Takes the place of a deque: a list."""

    def __new__(cls, *_: object) -> list[object]:  # type: ignore[misc]
        return []


# Objects whose content does not fit an OrderedDict. The real classes are never called.
_UNREAD: tuple[tuple[type, str], ...] = (
    *((_Unread, name) for name in ("numpy.dtype", "numpy.ndarray", "functools.partial")),
    *(
        (_Unread, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    (_UnreadList, "collections.deque"),
)


def find_weights_file(path: Path) -> Path:
    """Return the file to read: in a folder one of FOLDER_FILES, else the path itself.

    Raises:
        UserError: there is no such file or folder, it cannot be read, or the folder contains none of them.

    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (raises for a parent folder without permission)
        names = os.listdir(path) if stat.S_ISDIR(mode) else []  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: there is no such weights file; {_EXPECTED}, or a folder with one") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{escape_unprintable(str(path))}: cannot be read ({reason})") from None
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path}: not a regular file; {_EXPECTED}")
    found = next((name for name in FOLDER_FILES if name in names), None)
    if found is None:
        raise UserError(
            f"{path}: a folder without weights: expected {', '.join(FOLDER_FILES[:-1])} or {FOLDER_FILES[-1]} in it, "
            f"or the name of a file; it contains {join_truncated(sorted(names), limit=5) or 'nothing'}"
        )
    return path / found


def is_safetensors(path: Path) -> bool:
    """Return whether a file starts as a safetensors file does, whatever its name is."""
    start = _read_start(path)
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_SAFETENSORS_HEADER


def read_weights_file(path: Path, *, advice: str = "download or save it again", mmap: bool = False) -> Any:
    """Return the content of a weights file or folder: tensors by name, or the Mapping that a script has saved.

    Args:
        path: a file or a folder, of any name.
        advice: what to do with a damaged file.
        mmap: read the values of the tensors only when they are used, if the format allows it. The file must not change.

    Raises:
        UserError: the file is missing, damaged, unsafe or of another format.

    """
    file = find_weights_file(path)
    if file.name.endswith(".index.json"):
        return _read_shards(file, advice, mmap=mmap)
    start = _read_start(file)
    if is_safetensors(file):
        try:
            return load_file(file)
        except Exception as error:  # safetensors and torch raise many kinds
            raise UserError(f"{file}: not a readable safetensors file ({error}); {advice}") from error
    if start.startswith(_TORCH_MAGIC):
        can_mmap = start.startswith(_TORCH_MAGIC[0]) and file.suffix != ".safetensors"
        return _read_torch(file, advice, mmap=mmap and can_mmap)
    known = next((text for signature, text in _OTHER_FORMATS.items() if start.lstrip().startswith(signature)), None)
    content = "it is empty" if not start else f"it starts with {start!r}" + (f": {known}" if known else "")
    raise UserError(f"{file}: not a weights file ({content}); {_EXPECTED}; {advice}")


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(40)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_torch(path: Path, advice: str, *, mmap: bool) -> Any:
    unread = list(_UNREAD)
    refused: str | None = None
    try:
        while True:
            try:
                return _load_torch(path, unread, mmap=mmap)
            except pickle.UnpicklingError as error:  # it names the first class that is neither known nor unread
                code = _PICKLED_CODE.search(str(error))
                name = code[1] if code is not None and code[1] else ""
                if name in _HARMLESS_BUILTINS:  # torch's message lacks their module
                    name = f"builtins.{name}"
                elif "." not in name or _REFUSED.match(name) or len(unread) > _MAX_CLASSES:
                    raise
                refused = refused or name
                unread.append((_Unread if name.startswith("numpy.") else _UnreadMapping, name))
    except Exception as error:  # a damaged file makes torch.load raise many kinds
        # torch's own message recommends weights_only=False, so it is not shown.
        code = _PICKLED_CODE.search(str(error))
        if code is not None or (refused is not None and isinstance(error, pickle.UnpicklingError | TypeError)):
            raise UserError(
                f"{path}: refused, because it contains more than plain tensors "
                f"({refused if code is None else code[1] or code[2]}): loading it could run any code on this machine. "
                "Save only the state dict: torch.save(model.state_dict(), ...), or a .safetensors file"
            ) from error
        foreign = isinstance(error, pickle.UnpicklingError) or str(error).startswith("[enforce fail")
        reason = "it was not written by torch.save" if foreign else _first_sentence(error)
        raise UserError(f"{path}: not a readable torch file ({reason}); {advice}") from error


def _load_torch(path: Path, unread: Sequence[tuple[type, str]], *, mmap: bool) -> Any:
    context: AbstractContextManager[None] = torch.serialization.safe_globals(list(unread))
    with warnings.catch_warnings(), context:
        warnings.simplefilter("ignore")  # about formats that the callers handle
        if mmap:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:  # torch.load would look at the name, not at the content
            return torch.load(file, map_location="cpu", weights_only=True)


def _first_sentence(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _read_shards(index: Path, advice: str, *, mmap: bool) -> dict[str, Any]:
    """Return the tensors of the files that an index names. They must lie beside it."""
    state: dict[str, Any] = {}
    for name, names in _read_index(index).items():
        shard = index.parent / name
        content = read_weights_file(shard, advice=advice, mmap=mmap) if shard.is_file() else None
        if not isinstance(content, Mapping):
            reason = "missing" if content is None else "not a file of tensors"
            raise UserError(f"{index}: its file {escape_unprintable(name)} is {reason}; {advice}")
        missing = [key for key in names if key not in content]
        if missing:
            raise UserError(f"{shard}: lacks {join_truncated(missing, limit=3)}, which {index.name} lists; {advice}")
        state |= {key: content[key] for key in names}
    return state


def _read_index(index: Path) -> dict[str, list[str]]:
    """Return file -> names of its tensors."""
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError("it is too large")
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        files: dict[str, list[str]] = {}
        for key, name in entries:
            if not isinstance(name, str) or name in {"", ".", ".."} or re.search(r"[/\\\0]", name):
                raise ValueError(f"{str(name)[:100]!r} is not the name of a file beside it")
            files.setdefault(name, []).append(key)
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: not an index of weights ({escape_unprintable(str(error))[:200]}); expected "
            '{"weight_map": {tensor: file}} of Hugging Face'
        ) from None
    return files

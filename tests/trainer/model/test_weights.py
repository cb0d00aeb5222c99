import hashlib
import io
import json
import os
import pickle
import random
import socket
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torchvision import models
from torchvision.models import Weights, WeightsEnum

from tests.web import Response, Server, complete, not_found, serving, stalled, truncated
from trainer.errors import UserError
from trainer.model import weights as weights_module
from trainer.model.torchvision_weights import cache_path, find_enum, is_file, is_torchvision_name
from trainer.model.weights import peek_weights, read_weights

State = dict[str, Tensor]
NAME = "squeezenet1_1"


@pytest.fixture(scope="module")
def state() -> State:
    """Return a state dict with 1000 classes, exactly representable in 16 bits."""
    torch.manual_seed(1)
    return {key: value.to(torch.bfloat16).float() for key, value in models.squeezenet1_1().state_dict().items()}


EXPECTED = list(models.squeezenet1_1().state_dict())


@pytest.fixture(autouse=True)
def _own_torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's cache out of the user's home, and tests off the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **_: pytest.fail(f"the network was used: {args}"))


def read(path: Path, weights: str | None = None) -> State:
    """Return the tensors; what can be told without their values must be equal."""
    text = weights or str(path)
    peeked, loaded = peek_weights(NAME, text, EXPECTED), read_weights(NAME, text, EXPECTED)
    assert peeked is not None
    assert loaded.source == peeked.source == f"file {text}"
    assert list(peeked.tensors) == list(loaded.tensors)
    return loaded.tensors


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Names ----------------------------------------------------------------------------------------------------------


def test_names_and_files_are_distinguished() -> None:
    names = ("DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2", "IMAGENET1K_SWAG_E2E_V1")
    assert all(map(is_torchvision_name, names))
    assert not any(map(is_file, names))
    files = ("a.pth", "a.PTH", "a.pth.tar", "a.ckpt", "a.bin", "a.safetensors", "a.index.json", "folder/DEFAULT", "./x")
    assert all(map(is_file, files))
    assert not any(map(is_torchvision_name, (*files, "default", "weights")))


def test_an_unknown_weights_name_lists_the_known_ones() -> None:
    assert find_enum("resnet50", "IMAGENET1K_V2") is models.ResNet50_Weights.IMAGENET1K_V2
    assert find_enum("resnet50", "ResNet50_Weights.IMAGENET1K_V1") is models.ResNet50_Weights.IMAGENET1K_V1
    assert find_enum("resnet50", "DEFAULT") is models.ResNet50_Weights.DEFAULT
    for name in ("IMAGENET1K_V2", "default", "", "ResNet50_Weights.IMAGENET1K_V1", "__class__"):
        with pytest.raises(UserError) as error:
            read_weights("resnet18", name, EXPECTED)
        expected = f"resnet18 has no weights {name!r}; expected one of IMAGENET1K_V1, DEFAULT, a local file"
        assert expected in str(error.value)
    for address in ("https://host/resnet18.pth", "hf-hub:timm/resnet18", "s3://host/x.pth", "~nobody-here/x.pth"):
        with pytest.raises(UserError, match=f"model.weights is {address}: .*expected a local file"):
            read_weights("resnet18", address, EXPECTED)
    for name in models.list_models(module=models):
        entry = find_enum(name, "DEFAULT")
        assert cache_path(entry).parent == Path(torch.hub.get_dir()) / "checkpoints"
        assert entry.url.endswith(f"/{cache_path(entry).name}")
        assert all(map(is_torchvision_name, type(entry).__members__))


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weights.pth", torch.float16),
        ("weights.PTH", torch.float64),
        ("model_best.pth.tar", torch.float32),
        ("epoch=3.ckpt", torch.bfloat16),
        ("no-ending", torch.float32),
        ("named.safetensors", torch.float32),  # by torch.save: the content decides
    ],
)
def test_files_of_every_name_and_dtype(tmp_path: Path, state: State, name: str, dtype: torch.dtype) -> None:
    saved = {key: tensor.to(dtype) for key, tensor in state.items()}
    expected = {key: tensor.float() for key, tensor in saved.items()}
    for is_zip in (True, False):
        torch.save(saved, tmp_path / name, _use_new_zipfile_serialization=is_zip)
        assert equal(read(tmp_path / name), expected)
    save_file(saved, tmp_path / name)
    assert equal(read(tmp_path / name), expected)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_folders_and_shards_of_hugging_face(tmp_path: Path, state: State, ending: str) -> None:
    stem, write = ("model", save_file) if ending == "safetensors" else ("pytorch_model", torch.save)
    (tmp_path / "config.json").write_text('{"architectures": ["ResNet"]}')
    write(state, tmp_path / f"{stem}.{ending}")  # type: ignore[operator]
    assert equal(read(tmp_path), state)
    (tmp_path / f"{stem}.{ending}").unlink()
    keys, files = list(state), [f"{stem}-0000{number}-of-00002.{ending}" for number in (1, 2)]
    parts = {files[0]: {k: state[k] for k in keys[:9]}, files[1]: {k: state[k] for k in keys[9:]}}
    for name, part in parts.items():
        write(part, tmp_path / name)  # type: ignore[operator]
    index = tmp_path / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    assert equal(read(tmp_path), state)
    assert equal(read(index), state)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=f"{index.name}: its file {files[1]} is missing"):
        read(index)
    outside = tmp_path.parent / "outside.safetensors"
    save_file(state, outside)
    for name in ("../outside.safetensors", str(outside), "..", "", "a\\b", 3, None, "x\0"):
        index.write_text(json.dumps({"weight_map": {"features.0.weight": name}}))
        with pytest.raises(UserError, match="is not the name of a file beside it"):
            read(index)
    for text in ("", "[]", "{}", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(UserError, match=f"{index.name}: not an index of weights"):
            read(index)


def test_a_path_may_start_with_the_home_folder_and_contain_any_character(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "模型 ✿").mkdir()
    save_file(state, tmp_path / "模型 ✿" / "a b.safetensors")
    assert equal(read(tmp_path, "~/模型 ✿/a b.safetensors"), state)


# Hostile files --------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch created",)


class Builtin:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('created', 'w')",)


def pickled(content: object, *, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def pickled_weight(tensor: Tensor) -> bytes:
    return pickled({"fc.weight": tensor})


def another_zip() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.ones(3))
    return file.getvalue()


VALID = pickled_weight(torch.randn(400))
ENDLESS: dict[str, object] = {}
ENDLESS["model"] = ENDLESS
NOT_SAFETENSORS = "not a readable safetensors file ("
NOT_DENSE = "fc.weight is not a plain dense tensor ("
NOT_FINITE = "fc.weight contains NaN or infinite values: the file is damaged, or its training diverged"
CODE = "refused, because it contains more than plain tensors ("
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "payload": (".pth", pickled(Payload()), f"{CODE}posix.system): "),
    "payload in the old format": (".pth", pickled({"state_dict": Payload()}, is_zip=False), f"{CODE}posix.system): "),
    "payload next to the state": (".pth", pickled({"model": {"x": torch.ones(1)}, "args": Payload()}), CODE),
    "payload in a plain pickle": (".pth", pickle.dumps(Payload(), protocol=2), f"{CODE}posix.system): "),
    "whole model": (
        ".pt",
        pickled(models.squeezenet1_1()),
        "refused, because it contains a whole model as a Python object: ",
    ),
    "arguments": (".pt", pickled({"args": SimpleNamespace(lr=1)}), "contains the keys args and no tensors by name"),
    "call of a builtin": (".pt", pickled({"model": {"x": torch.ones(1)}, "args": Builtin()}), f"{CODE}exec): "),
    "empty": (".pth", b"", "not a weights file (it is empty)"),
    "text": (".pth", b"my weights\n" * 9, "not a weights file (it starts with b'my weights"),
    "web page": (
        ".bin",
        b"<!DOCTYPE html><html>404",
        "(it starts with b'<!DOCTYPE html><html>404': a web page or XML)",
    ),
    "Git LFS pointer": (
        ".pt",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a pointer of Git LFS: run git lfs pull",
    ),
    "truncated": (".pth", VALID[: len(VALID) // 2], "not a readable torch file (PytorchStreamReader failed"),
    "another zip archive": (".npz", another_zip(), "not a readable torch file (it was not written by torch.save)"),
    "plain pickle": (".pth", pickle.dumps([1, 2], protocol=4), "not a readable torch file ("),
    "list": (".pth", pickled([1, 2]), "contains a list and no tensors by name; expected a model's state dict"),
    "no tensors": (".pth", pickled({"epoch": 3}), "contains the keys epoch and no tensors by name"),
    "contains itself": (".pth", pickled(ENDLESS), "contains the keys model and no tensors by name"),
    "NaN": (".pth", pickled_weight(torch.tensor([1, torch.nan])), NOT_FINITE),
    "too large for float32": (".pth", pickled_weight(torch.tensor([1e300]).double() * 1e300), NOT_FINITE),
    "expanded": (".pth", pickled_weight(torch.zeros(1).expand(10**12)), NOT_DENSE),
    "sparse": (".pth", pickled_weight(torch.eye(3).to_sparse()), NOT_DENSE),
    "on the meta device": (".pth", pickled_weight(torch.empty(3, device="meta")), NOT_DENSE),
    "8 bits": (".safetensors", save({"fc.weight": torch.zeros(8, dtype=torch.float8_e4m3fn)}), NOT_DENSE),
    "truncated safetensors": (".safetensors", save({"fc.weight": torch.zeros(9)})[:-4], NOT_SAFETENSORS),
    "huge header": (".safetensors", struct.pack("<Q", 2**63 - 1) + b"{}", "not a weights file (it starts with"),
    "gzip": (".pth.tar", b"\x1f\x8b\x08\0", "a gzip archive: unpack it first"),
    "no tensors in safetensors": (".safetensors", save({}), "contains the keys (none) and no tensors"),
    "Keras": (".h5", b"\x89HDF\r\n", "an HDF5 file of Keras); expected a safetensors file or a file that torch.save"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_an_error_with_its_path_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix, content, reason = BROKEN[case]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            read_weights(NAME, f"{path.parent}/{path.name}", EXPECTED)
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "weights_only" not in str(error.value), "torch's message recommends weights_only=False"
    assert str(error.value).isprintable()
    assert not Path("created").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("created").exists(), "unpickling executes the payload"


def test_missing_and_special_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "folder.pth" / "best.pt").touch()
    os.mkfifo(tmp_path / "pipe.pth")
    for name, reason in {
        "none.pth": "there is no such weights file; expected a safetensors file or a file that torch.save has written",
        "folder.pth": "a folder without weights: expected model.safetensors, .*; it contains best.pt",
        "pipe.pth": "not a regular file",
        "folder.pth/best.pt/x.pth": "there is no such weights file",
    }.items():
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read(tmp_path / name)


@contextmanager
def without_root() -> Iterator[None]:
    """Give up root's right to read every file within the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "folder"])
def test_a_file_without_permission_is_an_error(state: State, name: str) -> None:
    with TemporaryDirectory() as folder:  # pytest's own folder is closed to other users
        Path(folder).chmod(0o755)
        path = Path(folder) / name
        path.mkdir() if name == "folder" else save_file(state, path)
        path.chmod(0)
        with without_root(), pytest.raises(UserError, match=rf"{name}: cannot be read \(Permission denied\)"):
            read(path)


@pytest.mark.parametrize("name", ["valid.safetensors", "valid.pth", "old.pth"])
def test_random_damage_raises_only_user_errors(tmp_path: Path, name: str) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng, path = random.Random(seed), tmp_path / name
    tensors = {"features.0.weight": torch.randn(64, 3, 3, 3), "features.0.bias": torch.randn(64)}
    valid = save(tensors) if path.suffix == ".safetensors" else pickled(tensors, is_zip=name != "old.pth")
    for _ in range(60):
        damaged = bytearray(valid[: rng.randint(1, len(valid))] if rng.random() < 0.5 else valid)
        for _ in range(rng.randrange(4)):
            damaged[rng.randrange(min(len(damaged), 2000))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(NAME, str(path), EXPECTED)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 (the damage may be harmless)


# Downloads ------------------------------------------------------------------------------------------------------


def test_a_cached_file_is_used(state: State) -> None:
    path = cache_path(find_enum(NAME, "DEFAULT"))
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    lines: list[str] = []
    loaded = read_weights(NAME, "DEFAULT", EXPECTED, on_progress=lines.append)
    assert equal(loaded.tensors, state)
    assert loaded.source == "torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert lines == []
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"not a readable torch file .*; delete it, and it will be downloaded again"):
        read_weights(NAME, "IMAGENET1K_V1", EXPECTED)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("torch.hub.urlopen", urllib.request.urlopen)
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def entry(server: Server, monkeypatch: pytest.MonkeyPatch) -> WeightsEnum:
    """Return an enum member like torchvision's, for the server's file; `find_enum` returns it."""
    url = f"http://127.0.0.1:{server.server_port}/small-{hashlib.sha256(VALID).hexdigest()[:8]}.pth"

    class Small_Weights(WeightsEnum):
        DEFAULT = Weights(url=url, transforms=lambda: None, meta={"_file_size": 1.0})

    monkeypatch.setattr(weights_module, "find_enum", lambda name, weights: Small_Weights.DEFAULT)
    return Small_Weights.DEFAULT


def test_a_download_is_verified_and_cached(server: Server, entry: WeightsEnum) -> None:
    server.responses = [lambda handler: handler.send(VALID, Content_Length=len(VALID)), not_found]
    assert peek_weights("small", "DEFAULT", ["fc.weight"]) is None, "not downloaded yet"
    for _ in range(2):
        loaded = read_weights("small", "DEFAULT", ["fc.weight"])
        assert equal(loaded.tensors, torch.load(io.BytesIO(VALID)))
        assert loaded.source == "torchvision Small_Weights.DEFAULT"
    assert cache_path(entry).read_bytes() == VALID


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (complete, "invalid hash value"),
        (not_found, "HTTP Error 404"),
        (truncated, ""),
        (stalled, "timed out"),
        (None, "<urlopen error [Errno -3] Temporary failure in name resolution>"),
    ],
)
def test_a_failed_download_leaves_no_file(
    server: Server, entry: WeightsEnum, monkeypatch: pytest.MonkeyPatch, response: Response | None, reason: str
) -> None:
    def offline(*args: object, **options: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(weights_module, "_STALL_SECONDS", 0.3)
    if response is None:
        monkeypatch.setattr("torch.hub.urlopen", offline)
    else:
        server.responses = [response]
    lines, path = list[str](), cache_path(entry)
    with pytest.raises(UserError) as error:
        read_weights("small", "DEFAULT", ["fc.weight"], on_progress=lines.append)
    first, *others = str(error.value).split("\n")
    assert first.startswith("could not download the weights Small_Weights.DEFAULT of small (")
    assert reason in first
    assert others == [
        f"  from: {entry.url}",
        f"  Either put that file at {path}, name a local file in model.weights, or set model.weights to null for "
        "random weights",
    ]
    assert lines == [f"downloading {entry.url} (1 MB) to {path}"]
    assert [*path.parent.iterdir()] == []
    assert socket.getdefaulttimeout() is None

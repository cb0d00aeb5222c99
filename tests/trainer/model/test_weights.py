import hashlib
import http.server
import io
import json
import os
import pickle
import re
import socket
import struct
import threading
import time
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer, Weights, WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from trainer.errors import UserError
from trainer.model import weights as weights_module
from trainer.model.head import Head, find_heads, replace_head
from trainer.model.weights import LoadReport, find_enum, is_file, load_weights, read_weights

State = dict[str, Tensor]
SMALL = "squeezenet1_1"
PUBLISHED_NAME = "squeezenet1_1-b8a52dc0.pth"  # at download.pytorch.org/models


@pytest.fixture(scope="module")
def state() -> State:
    """Return a 1000-class state of the small model, exactly representable in 16 bits."""
    torch.manual_seed(1)
    return {
        key: tensor.to(torch.bfloat16).float() for key, tensor in models.squeezenet1_1().state_dict().items()
    }


@pytest.fixture(autouse=True)
def _own_torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's cache out of the user's home, and tests off the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def no_network(*args: object, **settings: object) -> None:
        pytest.fail(f"the network was asked for {args}")

    monkeypatch.setattr("torch.hub.urlopen", no_network)


def read(path: Path) -> State:
    found, source = read_weights(SMALL, str(path))
    assert source == f"file {path}"
    return found


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Names ----------------------------------------------------------------------------------------------------


def test_names_and_files_are_told_apart() -> None:
    assert not any(map(is_file, ("DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2")))
    assert all(map(is_file, ("a.pth", "a.pt", "a.bin", "a.safetensors", "folder/DEFAULT", "./x", "/x")))


def test_a_wrong_weights_name_lists_the_right_ones() -> None:
    assert find_enum("resnet50", "IMAGENET1K_V2") is models.ResNet50_Weights.IMAGENET1K_V2
    assert find_enum("resnet50", "ResNet50_Weights.IMAGENET1K_V1") is models.ResNet50_Weights.IMAGENET1K_V1
    assert find_enum("resnet50", "DEFAULT") is models.ResNet50_Weights.DEFAULT
    for wrong in ("IMAGENET1K_V2", "default", "", "ResNet50_Weights.IMAGENET1K_V1", "__class__"):
        with pytest.raises(UserError) as info:
            read_weights("resnet18", wrong)
        assert (
            f"resnet18 has no weights {wrong!r}; expected one of IMAGENET1K_V1, DEFAULT, a local file"
            in str(info.value)
        )
        assert "or null for a random start" in str(info.value)


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_model_has_default_weights_at_a_place_of_their_own(name: str) -> None:
    entry = find_enum(name, "DEFAULT")
    place = weights_module._place(entry)
    assert place.parent == Path(torch.hub.get_dir()) / "checkpoints"
    assert entry.url.endswith(f"/{place.name}")


# Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_files_of_every_kind_and_precision(
    tmp_path: Path, state: State, suffix: str, dtype: torch.dtype
) -> None:
    given = {key: tensor.to(dtype) for key, tensor in state.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
    found = read(path)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    # float16 flushes the smallest values of bfloat16
    assert equal(found, {key: tensor.float() for key, tensor in given.items()})


def wrapped(state: State, *prefixes: str) -> State:
    return {"".join(prefixes) + key: tensor for key, tensor in state.items()}


CHECKPOINTS = {
    "DDP": lambda s: wrapped(s, "module."),
    "compiled": lambda s: wrapped(s, "_orig_mod."),
    "both": lambda s: wrapped(s, "_orig_mod.", "module."),
    "both, the other way": lambda s: wrapped(s, "module.", "_orig_mod."),
    "under state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "under model": lambda s: {"model": s, "optimizer": {"state": {}}, "args": None},
    "of PyTorch's tutorial": lambda s: {
        "epoch": 3,
        "model_state_dict": s,
        "optimizer_state_dict": {},
        "loss": 0.5,
    },
    "of PyTorch's ImageNet example": lambda s: {
        "epoch": 3,
        "arch": SMALL,
        "state_dict": wrapped(s, "module."),
        "best_acc1": torch.tensor(58.0),
        "optimizer": {},
    },
    "of torchvision's references": lambda s: {
        "model": s,
        "model_ema": {"n_averaged": torch.tensor(1)},
        "scaler": {},
    },
    "twice": lambda s: {"model": {"state_dict": s}},
    "an OrderedDict": OrderedDict,
    "parameters": lambda s: {key: nn.Parameter(tensor) for key, tensor in s.items()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_the_usual_scripts(tmp_path: Path, state: State, kind: str, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(CHECKPOINTS[kind](state), path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert equal(found, state)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_path_below_home(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "模型 ✿"
    folder.mkdir()
    save_file(state, folder / "a b.safetensors")
    found, source = read_weights(SMALL, "~/模型 ✿/a b.safetensors")
    assert equal(found, state)
    assert source == "file ~/模型 ✿/a b.safetensors"


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.witness}'",)


def pickled(what: object, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(what, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["zip", "old", "beside", "in the state", "bare"])
def test_a_pickled_payload_is_refused_and_does_nothing(tmp_path: Path, state: State, kind: str) -> None:
    witness = tmp_path / "witness"
    payload = Payload(witness)
    content = {
        "zip": lambda: pickled(payload),
        "old": lambda: pickled({"state_dict": payload}, zipped=False),
        "beside": lambda: pickled({"state_dict": state, "args": payload}),
        "in the state": lambda: pickled({**state, "more": payload}),
        "bare": lambda: pickle.dumps(payload, protocol=2),
    }[kind]()
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as info:
        read(path)
    assert not witness.exists()
    text = str(info.value)
    assert text.startswith(f"{path}: not read, since it holds more than plain tensors (posix.system): ")
    assert "torch.save(model.state_dict(), ...)" in text
    # torch itself advises to load it all the same
    assert "weights_only" not in text
    pickle.loads(pickle.dumps(payload))  # the payload is a real one
    assert witness.exists()


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (models.squeezenet1_1(), "torchvision.models.squeezenet.SqueezeNet"),
        ({"args": SimpleNamespace(lr=0.1), "model": {}}, "types.SimpleNamespace"),
    ],
    ids=["whole model", "arguments"],
)
def test_what_else_is_pickled_is_named(tmp_path: Path, what: object, found: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(what, path)
    with pytest.raises(UserError, match=rf"holds more than plain tensors \({found}\)"):
        read(path)


def safetensors_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], size: int) -> dict[str, object]:
    return {"fc.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


GOOD = pickled({"fc.weight": torch.randn(400)})
OLD = pickled({"fc.weight": torch.randn(400)}, zipped=False)
EMPTY: dict[str, object] = {}
NO_TORCH = "not a readable torch file ("
NO_SAFETENSORS = "not a readable safetensors file ("
NOT_DENSE = "fc.weight is not a plain dense tensor ("
NOT_FINITE = "fc.weight holds NaN or infinite values: the file is damaged, or its training diverged"
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": (".pth", b"", "not a readable torch file (it is empty)"),
    "text": (".pth", b"my weights\n" * 9, "not a readable torch file (it begins with b'my weights"),
    "a web page": (".bin", b"<!DOCTYPE html><html>404", "(it begins with b'<!DOCTYPE html><html>404')"),
    "a Git LFS pointer": (
        ".pt",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "begins with b'version https://git",
    ),
    "a picture": (".pth", b"\x89PNG\r\n\x1a\n" + bytes(99), "(it begins with b'\\x89PNG"),
    "safetensors by another name": (".pth", safetensors_of({}), "not a readable torch file (it begins with"),
    "cut in half": (".pth", GOOD[: len(GOOD) // 2], "not a readable torch file (PytorchStreamReader failed"),
    "old, cut in half": (".pth", OLD[: len(OLD) // 2], NO_TORCH),
    "a zip archive": (".pth", b"PK\x05\x06" + bytes(18), NO_TORCH),
    "a pickle of another kind": (".pth", pickle.dumps([1, 2], protocol=4), NO_TORCH),
    "broken pickle": (".pth", b"\x80\x02\xff\xff\xff", NO_TORCH),
    "a list": (".pth", pickled([1, 2]), "holds a list and no tensors by name; expected a model's state dict"),
    "a tensor": (".pth", pickled(torch.zeros(3)), "holds a Tensor and no tensors by name"),
    "no tensors": (".pth", pickled({"epoch": 3}), "holds the keys epoch and no tensors by name"),
    "nothing": (".pth", pickled({}), "holds the keys (none) and no tensors by name"),
    "NaN": (".pth", pickled({"fc.weight": torch.tensor([1, torch.nan])}), NOT_FINITE),
    "infinite": (".pth", pickled({"fc.weight": torch.tensor([-torch.inf])}), NOT_FINITE),
    "too large for float32": (
        ".pth",
        pickled({"fc.weight": torch.tensor([1e300], dtype=torch.float64)}),
        NOT_FINITE,
    ),
    "an endless tensor": (
        ".pth",
        pickled({"fc.weight": torch.zeros(1).expand(10**12)}),
        NOT_DENSE,
    ),
    "sparse": (".pth", pickled({"fc.weight": torch.eye(3).to_sparse()}), NOT_DENSE),
    "on no device": (".pth", pickled({"fc.weight": torch.empty(3, device="meta")}), NOT_DENSE),
    "twice": (
        ".pth",
        pickled({"fc.weight": torch.zeros(1), "module.fc.weight": torch.zeros(1)}),
        "holds fc.weight twice",
    ),
    "empty safetensors": (".safetensors", b"", NO_SAFETENSORS),
    "text safetensors": (".safetensors", b"my weights\n" * 9, NO_SAFETENSORS),
    "torch by another name": (".safetensors", GOOD, NO_SAFETENSORS),
    "absurd length": (".safetensors", struct.pack("<Q", 2**63 - 1) + b"{}", NO_SAFETENSORS),
    "a length beyond the file": (".safetensors", struct.pack("<Q", 90_000_000) + b"{}", NO_SAFETENSORS),
    "header is no JSON": (".safetensors", safetensors_of(b'{"fc'), NO_SAFETENSORS),
    "header is no UTF-8": (".safetensors", safetensors_of(b'{"\xff\xfe":1}'), NO_SAFETENSORS),
    "data beyond the file": (".safetensors", safetensors_of(entry("F32", [4], 16), bytes(8)), NO_SAFETENSORS),
    "absurd shape": (".safetensors", safetensors_of(entry("F32", [2**62, 4], 8), bytes(8)), NO_SAFETENSORS),
    "no such type": (".safetensors", safetensors_of(entry("F33", [2], 8), bytes(8)), NO_SAFETENSORS),
    "8 bits": (".safetensors", safetensors_of(entry("F8_E4M3", [8], 8), bytes(8)), NOT_DENSE),
    "4 bits": (".safetensors", safetensors_of(entry("F4", [4], 2), bytes(2)), NOT_DENSE),
    "no tensors in safetensors": (
        ".safetensors",
        safetensors_of({}),
        "holds the keys (none) and no tensors by name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    suffix, content, words = BROKEN[case]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as info:
            read(path)
    assert str(info.value).startswith(f"{path}: ")
    assert words in str(info.value)
    assert "weights_only" not in str(info.value)
    assert str(info.value).isprintable()


def test_random_damage_never_escapes_as_another_error(tmp_path: Path, state: State) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    some = dict(list(state.items())[:3])
    save_file(some, tmp_path / "good.safetensors")
    torch.save(some, tmp_path / "good.pth")
    torch.save(some, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pth", "old.pth"):
        good = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(good[: 1 + draw(len(good))] if draw(2) else good)
            for _ in range(draw(4)):
                damaged[draw(min(len(damaged), 2000))] = draw(256)
            path = tmp_path / f"damaged{Path(name).suffix}"
            path.write_bytes(damaged)
            try:
                read(path)
            except UserError as error:
                named = str(error)
            else:
                named = f"{path}: read"
            assert named.startswith(f"{path}: ")


def test_a_checkpoint_that_contains_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(UserError, match="holds the keys model and no tensors by name"):
        read(tmp_path / "endless.pth")


def test_a_missing_file_a_folder_and_another_ending(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    for name in ("none.pth", "none.safetensors", "folder.pth"):
        with pytest.raises(
            UserError, match=f"{name}: there is no such weights file; expected a file ending in .safet"
        ):
            read(tmp_path / name)
    (tmp_path / "weights.ckpt").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"weights.ckpt: expected a weights file ending in .safetensors, .pth, .pt, .bin"
    ):
        read(tmp_path / "weights.ckpt")


# Downloads ------------------------------------------------------------------------------------------------


def test_a_file_in_torchs_cache_is_used(state: State, tmp_path: Path) -> None:
    place = tmp_path / "torch" / "hub" / "checkpoints" / PUBLISHED_NAME
    place.parent.mkdir(parents=True)
    torch.save(state, place)
    said: list[str] = []
    found, source = read_weights(SMALL, "DEFAULT", on_progress=said.append)
    assert equal(found, state)
    assert source == "torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert said == []
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"not a readable torch file .*; delete it, and it is downloaded again"
    ):
        read_weights(SMALL, "IMAGENET1K_V1")


def test_without_network_the_error_names_url_place_and_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **settings: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr("torch.hub.urlopen", offline)
    before = socket.getdefaulttimeout()
    said: list[str] = []
    with pytest.raises(UserError) as info:
        read_weights(SMALL, "DEFAULT", on_progress=said.append)
    place = tmp_path / "torch" / "hub" / "checkpoints" / PUBLISHED_NAME
    url = f"https://download.pytorch.org/models/{PUBLISHED_NAME}"
    assert str(info.value) == (
        "could not download the weights SqueezeNet1_1_Weights.IMAGENET1K_V1 of squeezenet1_1 "
        "(<urlopen error [Errno -3] Temporary failure in name resolution>).\n"
        f"  from: {url}\n"
        f"  Either put that file at {place}, name a local file in model.weights, or set model.weights to null "
        "for a random start"
    )
    assert said == [f"downloading {url} (5 MB) to {place}"]
    assert socket.getdefaulttimeout() == before
    assert not place.exists()


class Server(http.server.ThreadingHTTPServer):
    """On loopback; serves `body`, of which it sends the first `sent` bytes, and may then stall."""

    daemon_threads = True
    body = b""
    sent: int | None = None
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stall = threading.Event()

    def handle_error(self, *args: object) -> None:
        """Say nothing of a client that hung up."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: self.server.sent])
        self.wfile.flush()
        if self.server.sent is not None and self.server.stall.is_set():
            while self.server.stall.is_set():
                time.sleep(0.02)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from urllib.request import urlopen

    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.stall.clear()
        server.shutdown()
        thread.join()


def served(server: Server, body: bytes) -> tuple[WeightsEnum, Path]:
    """Return an entry such as torchvision's, whose file's name holds the body's SHA-256, and its place."""
    digest = hashlib.sha256(body).hexdigest()[:8]
    url = f"http://127.0.0.1:{server.server_port}/models/small-{digest}.pth"

    class Small_Weights(WeightsEnum):
        DEFAULT = Weights(url=url, transforms=lambda: None, meta={"_file_size": 1.0})

    server.body = body
    return Small_Weights.DEFAULT, Path(torch.hub.get_dir()) / "checkpoints" / f"small-{digest}.pth"


@pytest.fixture
def entry_of(monkeypatch: pytest.MonkeyPatch) -> list[WeightsEnum]:
    """Let `find_enum` give what the test puts in the list."""
    entries: list[WeightsEnum] = []
    monkeypatch.setattr(weights_module, "find_enum", lambda name, weights: entries[0])
    return entries


def test_a_download_is_checked_and_kept(server: Server, entry_of: list[WeightsEnum], state: State) -> None:
    entry, place = served(server, pickled(state))
    entry_of.append(entry)
    found, source = read_weights("small", "DEFAULT")
    assert equal(found, state)
    assert source == "torchvision Small_Weights.DEFAULT"
    assert place.read_bytes() == server.body
    server.status = 500
    assert equal(read_weights("small", "DEFAULT")[0], state)


@pytest.mark.parametrize("how", ["lies", "truncates", "stalls", "refuses"])
def test_a_bad_server_leaves_nothing_and_is_named(
    server: Server, entry_of: list[WeightsEnum], state: State, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    entry, place = served(server, pickled(state))
    entry_of.append(entry)
    monkeypatch.setattr(weights_module, "_STALL_SECONDS", 0.3)
    if how == "lies":
        server.body = pickled({key: tensor + 1 for key, tensor in state.items()})
    elif how == "refuses":
        server.status = 404
    else:
        server.sent = 100_000
        if how == "stalls":
            server.stall.set()
    with pytest.raises(UserError) as info:
        read_weights("small", "DEFAULT")
    expected = {
        "lies": "invalid hash value",
        "refuses": "HTTP Error 404",
        "truncates": "",
        "stalls": "timed out",
    }[how]
    assert expected in str(info.value)
    assert f"from: {entry.url}" in str(info.value)
    assert f"put that file at {place}" in str(info.value)
    assert [*place.parent.iterdir()] == []
    assert socket.getdefaulttimeout() is None


# Loading --------------------------------------------------------------------------------------------------


def grafted(model: nn.Module, *, size: int = 64, classes: int = 5) -> tuple[nn.Module, tuple[Head, ...]]:
    heads = find_heads(model, size)
    replace_head(model, heads, classes, "xavier")
    return model, heads


def load(
    model: nn.Module, heads: tuple[Head, ...], state: State, *, name: str = "this", size: int = 64
) -> LoadReport:
    return load_weights(model, heads, state, name=name, image_size=size, source="the file")


def test_all_of_the_backbone_is_copied_and_the_head_left(state: State) -> None:
    model, heads = grafted(models.squeezenet1_1())
    head = {
        key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith("classifier.1.")
    }
    report = load(model, heads, state)
    after = model.state_dict()
    assert len(head) == 2
    assert report == LoadReport("the file", len(state) - 2, (), (), ())
    assert report.lines() == ["50 of the backbone's 50 tensors from the file; the output layer starts anew"]
    assert all(torch.equal(after[key], head[key] if key in head else state[key]) for key in after)


@pytest.mark.parametrize("classes", [5, 1000])
def test_a_head_of_any_size_in_the_file_is_passed_over(state: State, classes: int) -> None:
    model, heads = grafted(models.squeezenet1_1(), classes=5)
    before = model.classifier[1].weight.clone()
    file = {
        **state,
        "classifier.1.weight": torch.zeros(classes, 512, 1, 1),
        "classifier.1.bias": torch.zeros(classes),
    }
    assert load(model, heads, file).lines()[1:] == []
    assert torch.equal(model.classifier[1].weight, before)
    headless = {key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
    assert load(model, heads, headless).lines()[1:] == []


def test_keys_that_do_not_fit_are_listed(state: State) -> None:
    model, heads = grafted(models.squeezenet1_1())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    file = dict(state)
    del file["features.0.weight"]
    file["features.0.bias"] = torch.zeros(65)
    file["features.3.squeeze.bias"] = torch.zeros(16, dtype=torch.int64)
    file |= {f"extra.{i}": torch.zeros(1) for i in range(12)} | {"evil\n\x1b[31m": torch.zeros(1)}
    report = load(model, heads, file)
    assert report.missing == ("features.0.weight",)
    assert report.mismatched == ("features.0.bias", "features.3.squeeze.bias")
    assert report.unexpected == (*(f"extra.{i}" for i in range(12)), "evil\n\x1b[31m")
    assert report.lines() == [
        "47 of the backbone's 50 tensors from the file; the output layer starts anew",
        "1 NOT IN THE FILE, left random: features.0.weight",
        "2 OF ANOTHER SHAPE OR KIND, left random: features.0.bias, features.3.squeeze.bias",
        "13 in the file but not in the model, ignored: "
        "extra.0, extra.1, extra.2, extra.3, extra.4, extra.5, extra.6, extra.7, extra.8, extra.9 and 3 more",
    ]
    after = model.state_dict()
    for key in (*report.missing, *report.mismatched):
        assert torch.equal(after[key], before[key])
    assert torch.equal(after["features.3.squeeze.weight"], state["features.3.squeeze.weight"])
    assert load(model, heads, {**state, "evil\n\x1b[31m": torch.zeros(1)}).lines()[1].isprintable()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"conv1.weight": torch.zeros(64, 3, 7, 7)},
            "it holds: conv1.weight\n  this has: features.0.weight, features",
        ),
        ({"features.0.weight": torch.zeros(1)}, "of another shape: features.0.weight [1] for [64, 3, 3, 3]"),
        ({"classifier.1.weight": torch.zeros(5, 512, 1, 1)}, "nothing in the file fits this"),
    ],
)
def test_a_file_that_fits_nothing_is_an_error(given: State, words: str) -> None:
    model, heads = grafted(models.squeezenet1_1())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as info:
        load(model, heads, given)
    assert str(info.value).startswith("nothing in the file fits this.\n")
    assert str(info.value).endswith("Is model.name the architecture that the file was saved from?")
    assert words in str(info.value)
    assert equal(model.state_dict(), before)


def test_counters_alone_are_nothing_and_their_absence_is_no_loss() -> None:
    model, heads = grafted(models.shufflenet_v2_x0_5())
    state = models.shufflenet_v2_x0_5().state_dict()
    counters = {key: tensor for key, tensor in state.items() if key.endswith("num_batches_tracked")}
    with pytest.raises(UserError, match="nothing in the file fits"):
        load(model, heads, counters)
    # as torchvision's older files are
    without = {key: tensor for key, tensor in state.items() if key not in counters}
    report = load(model, heads, without)
    assert report.missing == report.mismatched == report.unexpected == ()
    assert load(model, heads, state).copied == report.copied + len(counters)


def test_densenets_old_keys() -> None:
    torch.manual_seed(2)
    source = models.densenet121().state_dict()
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
    old = {dotted.sub(r"\1.\2", key): tensor for key, tensor in source.items()}
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    assert "features.denseblock1.denselayer1.norm.1.running_mean" not in source
    model, heads = grafted(models.densenet121())
    report = load(model, heads, old)
    assert report.missing == report.mismatched == report.unexpected == ()
    after = model.state_dict()
    assert all(torch.equal(after[key], source[key]) for key in source if not key.startswith("classifier"))


def small_vit(size: int) -> VisionTransformer:
    return VisionTransformer(
        image_size=size, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=10
    )


@pytest.mark.parametrize("size", [16, 48])
def test_a_vits_positions_are_interpolated_as_torchvision_does(size: int) -> None:
    torch.manual_seed(3)
    source = small_vit(32).state_dict()
    model, heads = grafted(small_vit(size), size=size)
    report = load(model, heads, source, size=size)
    expected = interpolate_embeddings(size, 8, OrderedDict(source))["encoder.pos_embedding"]
    assert expected.shape == (1, 1 + (size // 8) ** 2, 16)
    after = model.state_dict()
    assert torch.equal(after["encoder.pos_embedding"], expected)
    assert report.missing == report.mismatched == report.unexpected == ()
    assert report.lines()[1:] == [
        f"position embedding interpolated from 4 x 4 to {size // 8} x {size // 8} patches"
    ]
    assert source["encoder.pos_embedding"].shape == (1, 17, 16)


def test_a_vit_at_its_own_size_keeps_its_positions() -> None:
    source = small_vit(32).state_dict()
    model, heads = grafted(small_vit(32), size=32)
    assert load(model, heads, source, size=32).lines()[1:] == []
    assert torch.equal(model.state_dict()["encoder.pos_embedding"], source["encoder.pos_embedding"])


@pytest.mark.parametrize(
    "positions",
    [torch.zeros(1, 7, 16), torch.zeros(1, 1, 16), torch.zeros(17, 16), torch.zeros(1, 17, 8), torch.zeros(2, 17, 16),
     torch.zeros(1, 17, 16, dtype=torch.int64), torch.zeros(())],
    ids=lambda tensor: f"{list(tensor.shape)} {tensor.dtype}",
)  # fmt: skip
def test_positions_that_cannot_be_interpolated_are_an_error(positions: Tensor) -> None:
    model, heads = grafted(small_vit(48), size=48)
    with pytest.raises(UserError) as info:
        load(model, heads, {**small_vit(32).state_dict(), "encoder.pos_embedding": positions}, size=48)
    assert (
        f"the file: its position embedding {list(positions.shape)} cannot be interpolated to [1, 37, 16]"
        in str(info.value)
    )
    assert "which images of 48 px need: expected [1, 1 + n x n patches, 16]" in str(info.value)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "maxvit_t"])
def test_window_models_take_their_weights_at_another_size(name: str) -> None:
    # Made for 224 (256) px; what depends on windows does not depend on the picture.
    torch.manual_seed(4)
    source = models.get_model(name, weights=None).state_dict()
    size = 448 if name == "maxvit_t" else 96
    settings = {"input_size": (size, size)} if name == "maxvit_t" else {}
    model, heads = grafted(models.get_model(name, weights=None, **settings), size=size)
    report = load(model, heads, source, size=size)
    assert report.missing == report.mismatched == report.unexpected == ()
    after = model.state_dict()
    own = tuple(f"{head.name}." for head in heads)
    assert all(torch.equal(after[key], source[key]) for key in source if not key.startswith(own))


def test_the_designs_own_constants_are_not_overwritten() -> None:
    source = models.swin_t().state_dict()
    key = next(key for key in source if key.endswith("relative_position_index"))
    model, heads = grafted(models.swin_t())
    report = load(model, heads, {**source, key: source[key] + 10**6})
    assert report.mismatched == (key,)
    assert torch.equal(model.state_dict()[key], source[key])


@pytest.mark.shared
def test_the_shared_imagenet_weights_all_arrive(shared: Path) -> None:
    path = shared / "weights" / "squeezenet1_1-imagenet1k-fp16.safetensors"
    file = load_file(path)
    assert torch.float16 in {tensor.dtype for tensor in file.values()}
    model, heads = grafted(models.squeezenet1_1(), classes=2)
    report = load(model, heads, read(path))
    assert report.lines() == ["50 of the backbone's 50 tensors from the file; the output layer starts anew"]
    after = model.state_dict()
    assert all(
        torch.equal(after[key], file[key].float()) for key in after if not key.startswith("classifier.1.")
    )

import hashlib
import io
import os
import pickle
import random
import re
import socket
import struct
import urllib.error
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer, Weights, WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from tests.web import Response, Server, complete, not_found, serving, stalled, truncated
from trainer.errors import UserError
from trainer.model import weights as weights_module
from trainer.model.head import Head, find_heads, replace_head
from trainer.model.weights import LoadReport, cache_path, find_enum, is_file, load_weights, read_weights

State = dict[str, Tensor]
NAME = "squeezenet1_1"
PUBLISHED_FILE = "squeezenet1_1-b8a52dc0.pth"


@pytest.fixture(scope="module")
def state() -> State:
    """Return a state dict with 1000 classes, exactly representable in 16 bits."""
    torch.manual_seed(1)
    return {key: value.to(torch.bfloat16).float() for key, value in models.squeezenet1_1().state_dict().items()}


@pytest.fixture(autouse=True)
def _own_torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch's cache out of the user's home, and tests off the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **_: pytest.fail(f"the network was used: {args}"))


def read(path: Path) -> State:
    loaded, source = read_weights(NAME, str(path))
    assert source == f"file {path}"
    return loaded


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_weights_name_lists_the_known_ones() -> None:
    assert not any(map(is_file, ("DEFAULT", "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2")))
    assert all(map(is_file, ("a.pth", "a.pt", "a.bin", "a.safetensors", "folder/DEFAULT", "./x", "/x")))
    assert find_enum("resnet50", "IMAGENET1K_V2") is models.ResNet50_Weights.IMAGENET1K_V2
    assert find_enum("resnet50", "ResNet50_Weights.IMAGENET1K_V1") is models.ResNet50_Weights.IMAGENET1K_V1
    assert find_enum("resnet50", "DEFAULT") is models.ResNet50_Weights.DEFAULT
    for name in ("IMAGENET1K_V2", "default", "", "ResNet50_Weights.IMAGENET1K_V1", "__class__"):
        with pytest.raises(UserError) as error:
            read_weights("resnet18", name)
        expected = f"resnet18 has no weights {name!r}; expected one of IMAGENET1K_V1, DEFAULT, a local file"
        assert expected in str(error.value)
    for name in models.list_models(module=models):
        entry = find_enum(name, "DEFAULT")
        assert cache_path(entry).parent == Path(torch.hub.get_dir()) / "checkpoints"
        assert entry.url.endswith(f"/{cache_path(entry).name}")


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".pth", torch.float16), (".pt", torch.float64), (".bin", torch.float32), (".safetensors", torch.bfloat16)],
)
def test_files_of_every_suffix_and_dtype(tmp_path: Path, state: State, suffix: str, dtype: torch.dtype) -> None:
    saved = {key: tensor.to(dtype) for key, tensor in state.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    assert equal(read(path), {key: tensor.float() for key, tensor in saved.items()})


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


CHECKPOINTS = {
    "compiled, then DDP": lambda s: prefixed(s, "module._orig_mod."),
    "DDP, then compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "args": None},
    "PyTorch's tutorial": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.5},
    "PyTorch's ImageNet example": lambda s: {"state_dict": prefixed(s, "module."), "best_acc1": torch.tensor(58.0)},
    "torchvision's references": lambda s: {"model": s, "model_ema": {"n_averaged": torch.tensor(1)}, "scaler": {}},
    "nested": lambda s: {"model": {"state_dict": s}},
    "parameters": lambda s: OrderedDict((key, nn.Parameter(tensor)) for key, tensor in s.items()),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_common_scripts(tmp_path: Path, state: State, kind: str) -> None:
    for is_zip in (True, False):
        path = tmp_path / "checkpoint.pth"
        torch.save(CHECKPOINTS[kind](state), path, _use_new_zipfile_serialization=is_zip)
        loaded = read(path)
        assert equal(loaded, state)
        assert not any(tensor.requires_grad for tensor in loaded.values())


def test_a_path_may_start_with_the_home_folder_and_contain_any_character(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "模型 ✿").mkdir()
    save_file(state, tmp_path / "模型 ✿" / "a b.safetensors")
    loaded, source = read_weights(NAME, "~/模型 ✿/a b.safetensors")
    assert equal(loaded, state)
    assert source == "file ~/模型 ✿/a b.safetensors"


# Hostile files --------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch created",)


def pickled(content: object, *, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def pickled_weight(tensor: Tensor) -> bytes:
    return pickled({"fc.weight": tensor})


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
    "whole model": (".pt", pickled(models.squeezenet1_1()), f"{CODE}torchvision.models.squeezenet."),
    "arguments": (".pt", pickled({"args": SimpleNamespace(lr=1)}), f"{CODE}types.SimpleNamespace)"),
    "empty": (".pth", b"", "not a readable torch file (it is empty)"),
    "text": (".pth", b"my weights\n" * 9, "not a readable torch file (it starts with b'my weights"),
    "web page": (".bin", b"<!DOCTYPE html><html>404", "(it starts with b'<!DOCTYPE html><html>404')"),
    "Git LFS pointer": (".pt", b"version https://git-lfs.github.com/spec/v1\noid", "b'version https://git"),
    "safetensors named .pth": (".pth", save({}), "not a readable torch file (it starts with"),
    "truncated": (".pth", VALID[: len(VALID) // 2], "not a readable torch file (PytorchStreamReader failed"),
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
    "same name twice": (
        ".pth",
        pickled({"fc.weight": torch.zeros(1), "module.fc.weight": torch.zeros(1)}),
        "contains fc.weight twice",
    ),
    "empty safetensors": (".safetensors", b"", NOT_SAFETENSORS),
    "torch named .safetensors": (".safetensors", VALID, NOT_SAFETENSORS),
    "huge header": (".safetensors", struct.pack("<Q", 2**63 - 1) + b"{}", NOT_SAFETENSORS),
    "no tensors in safetensors": (".safetensors", save({}), "contains the keys (none) and no tensors"),
    "unknown suffix": (".ckpt", b"", "expected a weights file ending in .safetensors, .pth, .pt, .bin"),
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
            read_weights(NAME, f"{path.parent}/{path.name}")
    assert str(error.value).startswith(f"{path}: ")
    assert reason in str(error.value)
    assert "weights_only" not in str(error.value), "torch's message recommends weights_only=False"
    assert str(error.value).isprintable()
    assert not Path("created").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert Path("created").exists(), "unpickling executes the payload"


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    for name in ("none.pth", "none.safetensors", "folder.pth"):
        with pytest.raises(UserError, match=f"{name}: there is no such weights file; expected a file ending in"):
            read(tmp_path / name)


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
            read(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 (the damage may be harmless)


# Downloads ------------------------------------------------------------------------------------------------------


def test_a_cached_file_is_used(state: State) -> None:
    path = cache_path(find_enum(NAME, "DEFAULT"))
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    lines: list[str] = []
    loaded, source = read_weights(NAME, "DEFAULT", on_progress=lines.append)
    assert equal(loaded, state)
    assert source == "torchvision SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert lines == []
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"not a readable torch file .*; delete it, and it will be downloaded again"):
        read_weights(NAME, "IMAGENET1K_V1")


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
    for _ in range(2):
        loaded, source = read_weights("small", "DEFAULT")
        assert equal(loaded, torch.load(io.BytesIO(VALID)))
        assert source == "torchvision Small_Weights.DEFAULT"
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
        read_weights("small", "DEFAULT", on_progress=lines.append)
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


# Load -----------------------------------------------------------------------------------------------------------


def with_new_head(model: nn.Module, *, size: int = 64, classes: int = 5) -> tuple[nn.Module, tuple[Head, ...]]:
    heads = find_heads(model, size)
    replace_head(model, heads, classes, "xavier")
    return model, heads


def load(model: nn.Module, heads: tuple[Head, ...], state: State, *, size: int = 64) -> LoadReport:
    return load_weights(model, heads, state, name="net", image_size=size, source="the file")


def assert_loaded(model: nn.Module, heads: tuple[Head, ...], state: State, *, size: int = 64) -> LoadReport:
    """Load a state, and check that every tensor of the backbone was copied and the heads were not."""
    in_heads = tuple(f"{head.name}." for head in heads)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load(model, heads, state, size=size)
    assert report.missing == report.mismatched == report.unexpected == ()
    for key, tensor in model.state_dict().items():
        if key in state or key.startswith(in_heads):
            assert torch.equal(tensor, before[key] if key.startswith(in_heads) else state[key]), key
    return report


def test_the_backbone_is_copied_and_the_head_is_not(state: State) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    without_head = {key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
    head = {"classifier.1.weight": torch.zeros(5, 512, 1, 1), "classifier.1.bias": torch.zeros(5)}
    for saved in (state, without_head, without_head | head):
        report = assert_loaded(model, heads, saved)
        assert report.lines() == ["50 of the backbone's 50 tensors from the file; the output layer is new"]


def test_keys_that_do_not_fit_are_reported(state: State) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    saved = dict(state)
    del saved["features.0.weight"]
    saved["features.0.bias"] = torch.zeros(65)
    saved["features.3.squeeze.bias"] = torch.zeros(16, dtype=torch.int64)
    saved |= {"evil\n\x1b[31m": torch.zeros(1)} | {f"extra.{i}": torch.zeros(1) for i in range(12)}
    report = load(model, heads, saved)
    assert report.lines() == [
        "47 of the backbone's 50 tensors from the file; the output layer is new",
        "1 NOT IN THE FILE, left random: features.0.weight",
        "2 OF ANOTHER SHAPE OR DTYPE, left random: features.0.bias, features.3.squeeze.bias",
        r"13 in the file but not in the model, ignored: evil\n\x1b[31m, "
        "extra.0, extra.1, extra.2, extra.3, extra.4, extra.5, extra.6, extra.7, extra.8 and 3 more",
    ]
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in (*report.missing, *report.mismatched))
    assert torch.equal(after["features.3.squeeze.weight"], state["features.3.squeeze.weight"])


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "it contains: conv1.weight\n  net has: features.0.weight, "),
        ({"features.0.weight": torch.zeros(1)}, "shape: features.0.weight [1], expected [64, 3, 3, 3]"),
        ({"classifier.1.weight": torch.zeros(5, 512, 1, 1)}, "it contains: \n"),
    ],
)
def test_a_file_of_another_architecture_is_an_error(saved: State, message: str) -> None:
    model, heads = with_new_head(models.squeezenet1_1())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load(model, heads, saved)
    assert str(error.value).startswith("no tensor in the file fits net.\n")
    assert str(error.value).endswith("Is model.name the architecture that the file was saved from?")
    assert message in str(error.value)
    assert equal(model.state_dict(), before)


def test_batch_counters_are_optional_and_not_enough() -> None:
    model, heads = with_new_head(models.shufflenet_v2_x0_5())
    state = models.shufflenet_v2_x0_5().state_dict()
    counters = {key: tensor for key, tensor in state.items() if key.endswith("num_batches_tracked")}
    with pytest.raises(UserError, match="no tensor in the file fits"):
        load(model, heads, counters)
    # torchvision's older files have no counters.
    report = assert_loaded(model, heads, {key: tensor for key, tensor in state.items() if key not in counters})
    assert assert_loaded(model, heads, state).copied == report.copied + len(counters)


def test_densenets_old_keys_are_renamed() -> None:
    state = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): tensor for key, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    model, heads = with_new_head(models.densenet121())
    assert_loaded(model, heads, old)
    after = model.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state if not key.startswith("classifier"))


def small_vit(size: int) -> VisionTransformer:
    return VisionTransformer(
        image_size=size, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=10
    )


@pytest.mark.parametrize("size", [16, 32, 48])
def test_position_embeddings_are_interpolated_by_torchvisions_function(size: int) -> None:
    state = small_vit(32).state_dict()
    model, heads = with_new_head(small_vit(size), size=size)
    report = load(model, heads, state, size=size)
    assert report.missing == report.mismatched == report.unexpected == ()
    expected = state["encoder.pos_embedding"]
    if size != 32:
        expected = interpolate_embeddings(size, 8, OrderedDict(state))["encoder.pos_embedding"]
    assert expected.shape == (1, 1 + (size // 8) ** 2, 16)
    assert torch.equal(model.state_dict()["encoder.pos_embedding"], expected)
    line = f"position embedding interpolated from 4 x 4 to {size // 8} x {size // 8} patches"
    assert report.lines()[1:] == ([line] if size != 32 else [])


def test_position_embeddings_that_cannot_be_interpolated_are_an_error() -> None:
    model, heads = with_new_head(small_vit(48), size=48)
    for shape in ((1, 7, 16), (1, 1, 16), (17, 16), (1, 17, 8), (2, 17, 16), ()):
        message = (
            f"the file: its position embedding {list(shape)} cannot be interpolated to [1, 37, 16], which images of "
            "48 px need: expected [1, 1 + n x n patches, 16]"
        )
        with pytest.raises(UserError, match=re.escape(message)):
            load(model, heads, {**small_vit(32).state_dict(), "encoder.pos_embedding": torch.zeros(shape)}, size=48)


@pytest.mark.parametrize(
    ("name", "size", "options"), [("swin_t", 96, {}), ("maxvit_t", 448, {"input_size": (448, 448)})]
)
def test_window_models_load_weights_of_another_image_size(name: str, size: int, options: dict[str, Any]) -> None:
    model, heads = with_new_head(models.get_model(name, weights=None, **options), size=size)
    assert_loaded(model, heads, models.get_model(name, weights=None).state_dict(), size=size)


@pytest.mark.shared
def test_the_shared_imagenet_weights_are_loaded(shared: Path) -> None:
    path = shared / "weights" / "squeezenet1_1-imagenet1k-fp16.safetensors"
    saved = load_file(path)
    assert torch.float16 in {tensor.dtype for tensor in saved.values()}
    loaded = read(path)
    assert equal(loaded, {key: tensor.float() for key, tensor in saved.items()})
    assert_loaded(*with_new_head(models.squeezenet1_1(), classes=2), loaded)

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.create import build_model, check_weights
from trainer.model.file import load
from trainer.model.metadata import ModelMetadata, write_model
from trainer.model.timm_hub import find_published
from trainer.model.timm_models import pretrained_cfg
from trainer.model.timm_weights import peek_timm_weights, read_timm_weights

VIT = "timm/test_vit.r160_in1k"
OPTIONS: dict[str, Any] = {"image_size": 160, "num_classes": 3, "head_init": "xavier"}
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return timm.create_model("test_vit").state_dict()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tests out of the user's caches, and off the network."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return hub


def put_into_hub_cache(hub: Path, state: State, *, file: str = "model.safetensors") -> None:
    folder = hub / "models--timm--test_vit.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    if file.endswith(".safetensors"):
        save_file(state, snapshot / file)
    else:
        torch.save(state, snapshot / file)


def assert_backbone(model: nn.Module, state: State) -> None:
    for key, tensor in model.state_dict().items():
        assert key.startswith("head.") or torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_hubs_cache_is_used(caches: Path, state: State, file: str) -> None:
    put_into_hub_cache(caches, state, file=file)
    check_weights(VIT, image_size=160, weights="DEFAULT")
    built = build_model(VIT, weights="DEFAULT", **OPTIONS)
    assert_backbone(built.model, state)
    assert built.source == "timm's test_vit.r160_in1k, Hugging Face Hub timm/test_vit.r160_in1k"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_in_timms_naming_is_used(tmp_path: Path, state: State, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "arch": "vit"}, path)
    check_weights(VIT, image_size=160, weights=str(path))
    built = build_model(VIT, weights=str(path), **OPTIONS)
    assert_backbone(built.model, state)
    assert built.source == f"file {path}"


def test_a_file_that_was_copied_beside_torchvisions_weights_is_used(state: State) -> None:
    published = find_published(VIT, pretrained_cfg(VIT))
    assert published.local_path.parts[-2:] == ("checkpoints", "timm--test_vit.r160_in1k--model.safetensors")
    published.local_path.parent.mkdir(parents=True)
    save_file(state, published.local_path)
    assert_backbone(build_model(VIT, weights="DEFAULT", **OPTIONS).model, state)


def test_without_network_the_error_names_hub_file_and_place() -> None:
    model = build(VIT, image_size=160, empty=True)
    assert peek_timm_weights(VIT, "DEFAULT", model) is None, "not downloaded yet"
    lines: list[str] = []
    with pytest.raises(UserError) as error:
        read_timm_weights(VIT, "DEFAULT", model, on_progress=lines.append)
    first, *others = str(error.value).split("\n")
    assert first.startswith(f"could not download the weights of {VIT} (")
    path = find_published(VIT, pretrained_cfg(VIT)).local_path
    assert others == [
        "  from: https://huggingface.co/timm/test_vit.r160_in1k, file model.safetensors",
        f"  Either put that file at {path}, name a local file in model.weights, or set model.weights to null for "
        "random weights",
    ]
    assert lines == [f"downloading the weights of {VIT} from Hugging Face Hub timm/test_vit.r160_in1k"]


def test_downloads_try_the_other_file_and_explain_a_license(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    requested: list[str] = []

    def download(repo_id: str, file: str, *, revision: str | None) -> str:
        requested.append(file)
        if file == "model.safetensors":
            raise RemoteEntryNotFoundError("404", response=response)
        torch.save(state, tmp_path / "file.bin")
        return str(tmp_path / "file.bin")

    published = find_published(VIT, pretrained_cfg(VIT))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert published.download(None) == tmp_path / "file.bin"
    assert requested == ["model.safetensors", "pytorch_model.bin"]

    def refuse(*args: object, **options: object) -> str:
        raise GatedRepoError("Access to model is restricted.\nMore text", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"\(Access to model is restricted.\)(?s:.*)Accept their license at https://"):
        published.download(None)


def test_models_without_published_weights_are_an_error() -> None:
    name = "timm/" + next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(UserError, match=f"timm has no weights of {name}"):
        find_published(name, pretrained_cfg(name))
    with pytest.raises(UserError, match="is not a PyTorch file"):
        find_published("timm/x", timm.models.PretrainedCfg(hf_hub_id="a/b", hf_hub_filename="weights.npz"))


@pytest.mark.parametrize("size", [96, 224])
def test_position_embeddings_are_resized_by_timm(tmp_path: Path, state: State, size: int) -> None:
    save_file(state, tmp_path / "w.safetensors")
    check_weights(VIT, image_size=size, weights=str(tmp_path / "w.safetensors"))
    built = build_model(VIT, weights=str(tmp_path / "w.safetensors"), **OPTIONS | {"image_size": size})
    overlay = {"file": str(tmp_path / "w.safetensors")}
    expected = timm.create_model("test_vit", pretrained=True, img_size=size, pretrained_cfg_overlay=overlay)
    assert torch.allclose(built.model.state_dict()["pos_embed"], expected.state_dict()["pos_embed"], atol=1e-6)
    assert f"resized to the image size by timm: pos_embed [1, 101, 64] -> [1, {1 + (size // 16) ** 2}, 64]" in (
        "\n".join(built.summary)
    )


def test_another_programs_names_are_converted_by_timm(tmp_path: Path) -> None:
    """The names are those of Meta's ConvNeXt repository."""
    state = timm.create_model("convnext_atto").state_dict()
    names = {"stem.": "downsample_layers.0.", "head.norm.": "norm.", "head.fc.": "head.", ".blocks.": "."}
    names |= {f"stages.{number}.downsample.": f"downsample_layers.{number}." for number in (1, 2, 3)}
    names |= {"conv_dw": "dwconv", "mlp.fc": "pwconv"}

    def rename(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    renamed = {rename(key): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "meta.safetensors")
    built = build_model(
        "timm/convnext_atto", weights=str(tmp_path / "meta.safetensors"), **OPTIONS | {"image_size": 64}
    )
    assert all(
        torch.equal(tensor, state[key]) for key, tensor in built.model.state_dict().items() if "head.fc" not in key
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/test_convnext", "no tensor in file .* fits timm/test_convnext"),
        ("timm/test_vit2", "does not fit timm/test_vit2: .* of the backbone's"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path: Path, state: State, name: str, message: str) -> None:
    save_file(state, tmp_path / "w.safetensors")
    for run in (
        lambda: check_weights(name, image_size=160, weights=str(tmp_path / "w.safetensors")),
        lambda: build_model(name, weights=str(tmp_path / "w.safetensors"), **OPTIONS),
    ):
        with pytest.raises(UserError, match=f"(?s){message}"):
            run()


# The model file -------------------------------------------------------------------------------------------------


def make_metadata(architecture: str, size: int = 160) -> ModelMetadata:
    preprocessing = Preprocessing(
        image_size=size, resize_size=size, resize="squash", interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return ModelMetadata(
        version="0",
        architecture=architecture,
        classes=("a", "b", "c"),
        preprocessing=preprocessing,
        source="",
        metrics={},
    )


@pytest.mark.parametrize(
    ("name", "size"), [(VIT, 96), ("timm/test_convnext", 64), ("timm/swin_tiny_patch4_window7_224", 64)]
)
def test_the_loaded_model_equals_the_trained_one_and_timms_own(tmp_path: Path, name: str, size: int) -> None:
    model = build_model(name, weights=None, **OPTIONS | {"image_size": size}).model.eval()
    path = tmp_path / "model.safetensors"
    write_model(path, model.state_dict(), make_metadata(name, size))
    images = torch.randn(2, 3, size, size)
    loaded = load(path)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(loaded.module(images), expected)
        options = {"img_size": size} if pretrained_cfg(name).fixed_input_size else {}
        alone = timm.create_model(name.removeprefix("timm/"), num_classes=3, **options).eval()
        alone.load_state_dict(load_file(path))
        assert torch.equal(alone(images), expected)


def test_a_model_file_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, {"a": torch.zeros(1)}, make_metadata("timm/resnet19"))
    with pytest.raises(UserError, match=r"model.safetensors: timm [\d.]+ has no model 'resnet19'"):
        load(path)

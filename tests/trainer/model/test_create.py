from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models

from trainer.errors import UserError
from trainer.model import create as create_module
from trainer.model.built import BuiltModel
from trainer.model.create import build_model
from trainer.model.head import split_outputs

CLASSES = 5
slow = pytest.mark.slow

# Model -> the names of its output layers; image sizes are small, but for those that cannot be.
MATRIX = [
    pytest.param("resnet18", ["fc"], 64),
    pytest.param("squeezenet1_1", ["classifier.1"], 64),
    pytest.param("mobilenet_v3_small", ["classifier.3"], 64),
    pytest.param("shufflenet_v2_x0_5", ["fc"], 64),
    pytest.param("mnasnet0_5", ["classifier.1"], 64),
    pytest.param("regnet_y_400mf", ["fc"], 64),
    pytest.param("googlenet", ["fc", "aux1.fc2", "aux2.fc2"], 64),
    pytest.param("efficientnet_b0", ["classifier.1"], 64),
    pytest.param("densenet121", ["classifier"], 64),
    pytest.param("mobilenet_v2", ["classifier.1"], 64),
    pytest.param("swin_t", ["head"], 64),
    pytest.param("convnext_tiny", ["classifier.2"], 64),
    pytest.param("inception_v3", ["fc"], 96),
    pytest.param("inception_v3", ["fc", "AuxLogits.fc"], 299, marks=slow),
    pytest.param("maxvit_t", ["classifier.5"], 224, marks=slow),
    pytest.param("vit_b_32", ["heads.head"], 64, marks=slow),
]


def source_model(name: str, size: int) -> nn.Module:
    """Return torchvision's model of 1000 classes, as the published weights were trained."""
    settings: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        has_auxiliary = name == "googlenet" or size >= 299
        settings = {"aux_logits": has_auxiliary, "transform_input": True, "init_weights": False}
    elif name.startswith("vit_"):
        settings = {"image_size": size}
    model = models.get_model(name, weights=None, **settings)
    for layer in model.modules():  # as after training, not at its start
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model


def make(name: str, weights: Path | str | None, *, seed: int, size: int = 64, **other: object) -> BuiltModel:
    torch.manual_seed(seed)
    settings: dict[str, object] = {"head_init": "xavier", "num_classes": CLASSES} | other
    return build_model(
        name,
        image_size=size,
        weights=None if weights is None else str(weights),
        **settings,  # type: ignore[arg-type]
    )


def input_of(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """Return what reaches a layer in eval mode."""
    seen: list[Tensor] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "heads", "size"), MATRIX)
def test_a_real_step_of_a_new_head_on_the_sources_backbone(
    name: str, heads: list[str], size: int, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    source = source_model(name, size)
    state = source.state_dict()
    path = tmp_path / "source.safetensors"
    save_file(state, path)

    created = make(name, path, seed=1, size=size)

    model = created.model
    assert list(created.heads) == heads
    assert created.source == f"file {path}"
    of_heads = tuple(f"{head}." for head in heads)
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(of_heads)}
    assert len(backbone) == len(state) - len([key for key in state if key.startswith(of_heads)])
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.items())
    assert f"{len(backbone)} of the backbone's {len(backbone)} tensors from file {path}" in "\n".join(
        created.summary
    )

    images = torch.randn(2, 3, size, size)
    assert torch.equal(input_of(model, heads[0], images), input_of(source, heads[0], images))
    assert model(images).shape == (2, CLASSES)

    model.train()
    logits, auxiliary = split_outputs(model(images))
    assert [tuple(output.shape) for output in (logits, *(output for _, output in auxiliary))] == [
        (2, CLASSES)
    ] * len(heads)
    loss = cross_entropy(logits, torch.tensor([0, 3]))
    for weight, output in auxiliary:
        loss = loss + weight * cross_entropy(output, torch.tensor([0, 3]))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key.startswith(of_heads):
            assert parameter.grad.abs().max() > 0, key
    first = next(model.parameters())
    assert first.grad is not None
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet"])
def test_the_head_follows_the_seed_and_not_the_weights(name: str, tmp_path: Path) -> None:
    for number in (1, 2):
        torch.manual_seed(number)
        torch.save(source_model(name, 64).state_dict(), tmp_path / f"{number}.pth")
    made = {
        (weights, seed): make(name, weights and tmp_path / f"{weights}.pth", seed=seed)
        for weights, seed in ((1, 5), (2, 5), (None, 5), (1, 6))
    }
    for head in made[1, 5].heads:
        one, other, scratch, reseeded = (created.model.get_submodule(head) for created in made.values())
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
        assert torch.equal(one.weight, scratch.weight)
        assert not torch.equal(one.weight, reseeded.weight)
        assert not torch.equal(one.bias, reseeded.bias)
    key = next(iter(made[1, 5].model.state_dict()))
    assert not torch.equal(made[1, 5].model.state_dict()[key], made[2, 5].model.state_dict()[key])
    assert torch.equal(made[1, 5].model.state_dict()[key], made[1, 6].model.state_dict()[key])


def test_head_init_is_passed_on() -> None:
    xavier, torchs = (make("resnet18", None, seed=0, head_init=init).model.fc for init in ("xavier", "torch"))
    assert xavier.weight.abs().max() > (6 / (512 + CLASSES)) ** 0.5 * 0.99
    assert torchs.weight.abs().max() <= 512**-0.5
    assert torch.equal(xavier.bias, torchs.bias)


def test_from_scratch_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        create_module, "read_weights", lambda *args, **settings: pytest.fail("weights were read")
    )
    created = make("shufflenet_v2_x0_5", None, seed=3)
    assert created.source == "from scratch"
    assert created.summary == ("shufflenet_v2_x0_5: new output layer fc",)
    torch.manual_seed(3)
    own = models.shufflenet_v2_x0_5().state_dict()
    assert all(
        torch.equal(tensor, own[key])
        for key, tensor in created.model.state_dict().items()
        if key[:3] != "fc."
    )


def test_what_was_done_is_said() -> None:
    assert make("googlenet", None, seed=0).summary == ("googlenet: new output layers fc, aux1.fc2, aux2.fc2",)
    assert make("squeezenet1_1", None, seed=0).summary == (
        "squeezenet1_1: new output layer classifier.1",
        "taken out, so that logits have no bound: classifier.2",
    )


def test_squeezenets_logits_may_be_negative() -> None:
    model = make("squeezenet1_1", None, seed=0).model.eval()
    with torch.no_grad():
        assert model(torch.randn(8, 3, 64, 64)).min() < 0


def test_a_batch_of_one_trains_where_the_maps_are_1_x_1() -> None:
    model = make("resnet18", None, seed=0, size=32).model.train()
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_googlenet_from_scratch_learns() -> None:
    # Its own weight initialisation is skipped (it takes long): torch's is as good under BatchNorm.
    model = make("googlenet", None, seed=2, num_classes=2).model.train()
    images = torch.cat([torch.randn(4, 3, 64, 64) - 1, torch.randn(4, 3, 64, 64) + 1])
    labels = torch.tensor([0] * 4 + [1] * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(6):
        logits, auxiliary = split_outputs(model(images))
        loss = cross_entropy(logits, labels)
        losses.append(loss.item())
        (loss + sum(weight * cross_entropy(output, labels) for weight, output in auxiliary)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0], losses


def test_what_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model 'resnet'"):
        make("resnet", None, seed=0)
    with pytest.raises(UserError, match="alexnet cannot be trained on images of 32 x 32 px"):
        make("alexnet", None, seed=0, size=32)
    with pytest.raises(UserError, match="a head needs at least one output, not 0"):
        make("resnet18", None, seed=0, num_classes=0)
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"nothing in file .*other.pth fits resnet18.\n  it holds: features.0.weight"
    ):
        make("resnet18", tmp_path / "other.pth", seed=0)


def test_a_download_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args: object, **settings: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"could not download the weights ResNet18_Weights.IMAGENET1K_V1 of resnet18"
    ):
        make("resnet18", "DEFAULT", seed=0, on_progress=said.append)
    assert len(said) == 1
    assert said[0].startswith("downloading https://download.pytorch.org/models/resnet18-")


@pytest.mark.shared
def test_real_weights_see_real_differences(shared: Path) -> None:
    """On ImageNet weights an ant and a bee look different to the backbone; on random ones hardly."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

    pictures = []
    for name in ("ants", "bees"):
        file = sorted((shared / "data" / "hymenoptera" / "val" / name).glob("*.jpg"))[0]
        with Image.open(file) as image:
            pixels = to_tensor(center_crop(resize(image.convert("RGB"), [128]), [128]))
        pictures.append(normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    weights = shared / "weights" / "squeezenet1_1-imagenet1k-fp16.safetensors"
    spread = {}
    for kind, source in (("imagenet", weights), ("random", None)):
        model = make("squeezenet1_1", source, seed=0, size=128).model
        features = input_of(model, "classifier.1", torch.stack(pictures)).mean((2, 3))
        spread[kind] = 1 - torch.cosine_similarity(features[0], features[1], dim=0).item()
    assert spread["imagenet"] > 4 * spread["random"], spread

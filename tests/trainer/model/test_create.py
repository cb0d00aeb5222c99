from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import models

from trainer.model.built import BuiltModel
from trainer.model.create import build_model
from trainer.model.head import split_outputs

CLASSES = 5

# Architecture, its output layers, and a small image size that it can take.
ARCHITECTURES = [
    ("squeezenet1_1", ["classifier.1"], 64),
    ("shufflenet_v2_x0_5", ["fc"], 64),
    ("googlenet", ["fc", "aux1.fc2", "aux2.fc2"], 64),
    ("swin_t", ["head"], 64),
    pytest.param("inception_v3", ["fc", "AuxLogits.fc"], 299, marks=pytest.mark.slow),
    pytest.param("vit_b_32", ["heads.head"], 64, marks=pytest.mark.slow),
]


def make_source(name: str, size: int = 64) -> nn.Module:
    """Return torchvision's model with 1000 classes, random weights, and BatchNorm statistics as after training."""
    options: dict[str, object] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": True, "transform_input": True, "init_weights": False}
    model = models.get_model(name, weights=None, **options)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model


def build(name: str, weights: Path | str | None, *, seed: int = 0, size: int = 64, **options: object) -> BuiltModel:
    torch.manual_seed(seed)
    options = {"head_init": "xavier", "num_classes": CLASSES} | options
    path = None if weights is None else str(weights)
    return build_model(name, image_size=size, weights=path, **options)  # type: ignore[arg-type]


def input_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Return the input of a layer in eval mode."""
    inputs: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with hook, torch.no_grad():
        model.eval()(images)
    return inputs[0]


@pytest.mark.parametrize(("name", "heads", "size"), ARCHITECTURES)
def test_a_new_head_on_the_sources_backbone_can_be_trained(
    name: str, heads: list[str], size: int, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    source = make_source(name, size)
    state = source.state_dict()
    path = tmp_path / "source.safetensors"
    save_file(state, path)

    built = build(name, path, seed=1, size=size)

    model = built.model
    assert list(built.heads) == heads
    assert built.source == f"file {path}"
    in_heads = tuple(f"{head}." for head in heads)
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(in_heads)}
    assert len(backbone) == len([key for key in state if not key.startswith(in_heads)])
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.items())
    count = len(backbone)
    assert f"{count} of the backbone's {count} tensors from file {path}" in "\n".join(built.summary)
    images = torch.randn(2, 3, size, size)
    assert torch.equal(input_of(model, heads[0], images), input_of(source, heads[0], images))

    logits, auxiliary = split_outputs(model.train()(images))
    labels = torch.tensor([0, 3])
    assert {tuple(output.shape) for output in (logits, *(output for _, output in auxiliary))} == {(2, CLASSES)}
    assert len(auxiliary) == len(heads) - 1
    loss = cross_entropy(logits, labels) + sum(w * cross_entropy(output, labels) for w, output in auxiliary)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key.startswith(in_heads):
            assert parameter.grad.abs().max() > 0, key
    assert next(model.parameters()).grad.abs().max() > 0  # type: ignore[union-attr]


def test_the_head_depends_on_the_seed_and_not_on_the_weights(tmp_path: Path) -> None:
    name = "shufflenet_v2_x0_5"
    for number in (1, 2):
        torch.manual_seed(number)
        torch.save(make_source(name).state_dict(), tmp_path / f"{number}.pth")
    built = {
        (weights, seed): build(name, weights and tmp_path / f"{weights}.pth", seed=seed)
        for weights, seed in ((1, 5), (2, 5), (None, 5), (1, 6))
    }
    (head,) = built[1, 5].heads
    one, other, scratch, reseeded = (b.model.get_submodule(head).state_dict() for b in built.values())
    for key in ("weight", "bias"):
        assert torch.equal(one[key], other[key])
        assert torch.equal(one[key], scratch[key])
        assert not torch.equal(one[key], reseeded[key])
    first = {key: next(iter(b.model.state_dict().values())) for key, b in built.items()}
    assert not torch.equal(first[1, 5], first[2, 5])
    assert torch.equal(first[1, 5], first[1, 6])


def test_the_summary_lists_new_layers_and_removed_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.create.read_weights", lambda *_, **__: pytest.fail("weights were read"))
    built = build("googlenet", None)
    assert (built.source, built.summary) == ("from scratch", ("googlenet: new output layers fc, aux1.fc2, aux2.fc2",))
    built = build("squeezenet1_1", None)
    assert built.summary == (
        "squeezenet1_1: new output layer classifier.1",
        "removed, because it would clip the logits: classifier.2",
    )
    with torch.no_grad():
        assert built.model.eval()(torch.randn(8, 3, 64, 64)).min() < 0


def test_a_batch_of_one_can_be_trained_on_maps_of_one_pixel() -> None:
    model = build("resnet18", None, size=32).model.train()
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import softmax
from torchvision import models

from trainer.errors import UserError
from trainer.model.built import BuiltModel
from trainer.model.create import build_model
from trainer.model.head import Head
from trainer.model.source_classes import ClassMapping, init_head_from_source_classes, read_names

NAMES = ("cat", "ant", "dog", "crane", "Crane", "hotdog")


def save_source(name: str, path: Path, classes: int = len(NAMES)) -> dict[str, Tensor]:
    """Write random weights whose output layer is far from mean 0, as after training; return them."""
    torch.manual_seed(7)
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    state = models.get_model(name, weights=None, num_classes=classes, **options).state_dict()
    for key in state:
        if key.endswith(("fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias")):
            state[key] += torch.linspace(1, 3, classes).view(-1, *[1] * (state[key].ndim - 1))
    save_file(state, path)
    return state


def build(
    name: str,
    weights: Path,
    targets: tuple[str, ...],
    *,
    head_init: Any = "source-labels",
    names: str = "auto",
    in_weights_file: tuple[str, ...] | None = NAMES,
    aliases: Mapping[str, str] | None = None,
) -> BuiltModel:
    torch.manual_seed(1)
    mapping = ClassMapping(targets=targets, sources=names, in_weights_file=in_weights_file, aliases=aliases or {})
    return build_model(
        name, image_size=64, num_classes=len(targets), weights=str(weights), head_init=head_init, class_mapping=mapping
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_matched_rows_are_the_sources_and_others_stay_random(name: str, path: Path) -> None:
    state = save_source(name, path)
    built = {
        init: build(name, path, ("ants", "bee", "Hot_Dog"), head_init=init)
        for init in ("xavier", "torch", "source-labels", "linear-probe")
    }
    main, *auxiliary = built["xavier"].heads
    heads = {init: one.model.get_submodule(main) for init, one in built.items()}
    head, xavier = heads["source-labels"], heads["xavier"]
    weight, bias = state[f"{main}.weight"], state[f"{main}.bias"]
    for target, source in ((0, 1), (2, 5)):
        assert torch.equal(head.weight[target], weight[source] - weight.mean(0))
        assert torch.equal(head.bias[target], bias[source] - bias.mean())
    norm = torch.stack([head.weight[target].flatten().norm() for target in (0, 2)]).mean()
    direction = xavier.weight[1].flatten()
    torch.testing.assert_close(head.weight[1].flatten(), direction / direction.norm() * norm)
    # The unmatched class stands for the source's four unmatched classes.
    torch.testing.assert_close(head.bias[1], torch.tensor(float(len(weight) - 2)).log())
    assert torch.equal(heads["linear-probe"].weight, xavier.weight)
    assert torch.equal(heads["linear-probe"].bias, xavier.bias)
    assert torch.equal(heads["torch"].bias, xavier.bias)
    assert not torch.equal(heads["torch"].weight, xavier.weight)
    states = {init: one.model.state_dict() for init, one in built.items()}
    in_heads = tuple(f"{name}." for name in (main, *auxiliary))
    for key, tensor in states["source-labels"].items():
        if key.startswith(tuple(f"{name}." for name in auxiliary)):
            assert torch.equal(tensor, states["xavier"][key])
        elif not key.startswith(in_heads):
            assert all(torch.equal(one[key], state[key]) for one in states.values())


def test_the_softmax_equals_the_sources_if_all_its_classes_match(path: Path) -> None:
    state = save_source("resnet18", path, classes=4)
    built = build("resnet18", path, ("d", "b", "a", "c"), in_weights_file=("a", "b", "c", "d"))
    source = models.resnet18(num_classes=4).eval()
    source.load_state_dict(state)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = softmax(source(images), 1)[:, [3, 1, 0, 2]]
        torch.testing.assert_close(softmax(built.model.eval()(images), 1), expected)


def test_the_summary_lists_matched_ambiguous_and_unmatched_classes(path: Path) -> None:
    save_source("squeezenet1_1", path)
    targets = ("ants", "cranes", "not-hotdog", "cat", "puppy")
    built = build("squeezenet1_1", path, targets, aliases={"puppy": "Dog", "cat": "hotdog"})
    assert built.summary[-7:] == (
        f"output layer from the source's own: 3 of 5 classes (the header of file {path})",
        "  ants <- ant, row 1 (plural)",
        "  cat <- cat, row 0 (name)",
        "    (not hotdog: a class of the same name has priority over an alias)",
        "  puppy <- dog, row 2 (alias)",
        "  cranes: AMBIGUOUS, left random: crane (row 3), Crane (row 4); choose one in model.aliases",
        "  left random, 1 that the source does not have: not-hotdog",
    )


def test_without_matches_the_head_stays_random_with_a_warning(path: Path) -> None:
    save_source("resnet18", path)
    built, xavier = (build("resnet18", path, ("x", "y"), head_init=init) for init in ("source-labels", "xavier"))
    expected = xavier.model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in built.model.state_dict().items())
    assert any("NONE OF YOUR CLASSES IS ONE OF THE SOURCE'S" in line for line in built.summary)


def test_a_head_without_bias_gets_rows_only() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    weight = torch.arange(12.0).view(4, 3)
    mapping = ClassMapping(targets=("b", "d"), in_weights_file=("a", "b", "c", "d"), aliases={})
    init_head_from_source_classes(model, Head("0"), {"0.weight": weight}, mapping, name="m", weights="w")
    assert torch.equal(model[0].weight, weight[[1, 3]] - weight.mean(0))


def test_names_are_read_from_a_text_file(path: Path, tmp_path: Path) -> None:
    state = save_source("resnet18", path)
    names = tmp_path / "names"
    names.write_bytes("\ufeffx\r\n bee \r\n图\r\nu\r\nv\r\nw\r\n\r\n".encode())
    built = build("resnet18", path, ("图", "bees"), names=str(names), in_weights_file=None)
    weight = state["fc.weight"]
    assert torch.equal(built.model.fc.weight, weight[[2, 1]] - weight.mean(0))
    assert f"2 of 2 classes (file {names})" in "\n".join(built.summary)


def test_a_wrong_file_of_names_is_an_error(tmp_path: Path) -> None:
    names = tmp_path / "names"
    with pytest.raises(UserError, match=f"model.source_labels {names}.*cannot be read"):
        read_names(names)
    contents = {b"": "is empty", b" \n\n": "is empty", b"a\n\nb\n": "line 2 is empty", b"\xff\xfe\0": "not UTF-8 text"}
    for content, reason in contents.items():
        names.write_bytes(content)
        with pytest.raises(UserError, match=f"model.source_labels {names}.*{reason}"):
            read_names(names)


def test_weights_without_names_have_torchvisions_if_the_number_of_rows_is_equal(path: Path) -> None:
    state = save_source("squeezenet1_1", path, classes=1000)
    built = build("squeezenet1_1", path, ("ants", "bees"), in_weights_file=None)
    weight = state["classifier.1.weight"]
    assert torch.equal(built.model.classifier[1].weight, weight[[310, 309]] - weight.mean(0))
    summary = "\n".join(built.summary)
    assert f"SqueezeNet1_1_Weights.IMAGENET1K_V1, SINCE file {path} NAMES NO CLASSES" in summary
    save_source("squeezenet1_1", path, classes=6)
    with pytest.raises(UserError, match="names no classes, and its output layer has 6 rows, not the 1000"):
        build("squeezenet1_1", path, ("ants", "bees"), in_weights_file=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aliases": {"bug": "ant"}}, "'bug', which is not one of your classes. Expected one of its 2, such as ants"),
        ({"aliases": {"ant": "ant"}}, "'ant', which is not one of your classes. Did you mean ants?"),
        ({"aliases": {"bees": "crate"}}, "maps 'bees' to 'crate', but the source has no class 'crate'. Did you mean"),
        (
            {"in_weights_file": NAMES[:5]},
            r"there are 5 source classes \(the header of .* but the output layer of .* has 6 rows",
        ),
    ],
)
def test_wrong_names_are_an_error(options: dict[str, object], message: str, path: Path) -> None:
    save_source("resnet18", path)
    with pytest.raises(UserError, match=message):
        build("resnet18", path, ("ants", "bees"), **options)  # type: ignore[arg-type]


def test_a_source_without_its_output_layer_is_an_error(path: Path) -> None:
    state = save_source("resnet18", path)
    save_file({key: tensor for key, tensor in state.items() if key != "fc.weight"}, path)
    with pytest.raises(UserError, match=r"source.safetensors holds no fc.weight, the output layer of resnet18"):
        build("resnet18", path, ("ants", "bees"))
    save_file(state | {"fc.weight": torch.zeros(6, 7)}, path)
    with pytest.raises(UserError, match=r"fc.weight of .* is \[6, 7\], expected \[rows, 512\]"):
        build("resnet18", path, ("ants", "bees"))

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import softmax
from torchvision import models

from trainer.errors import UserError
from trainer.model.built import BuiltModel
from trainer.model.create import build_model
from trainer.model.source_classes import ClassMapping, read_names

NAMES = ("cat", "ant", "dog", "crane", "Crane", "hotdog")


def source(name: str, path: Path, classes: int = len(NAMES)) -> dict[str, Tensor]:
    torch.manual_seed(7)
    settings = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    state = models.get_model(name, weights=None, num_classes=classes, **settings).state_dict()
    for key in state:  # rows far from level, as after training
        if key.endswith(("fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias")):
            state[key] += torch.linspace(1, 3, classes).view(-1, *[1] * (state[key].ndim - 1))
    save_file(state, path)
    return state


def make(
    name: str,
    weights: Path | str,
    targets: tuple[str, ...],
    *,
    head_init: str = "source-labels",
    names: str = "auto",
    described: tuple[str, ...] | None = NAMES,
    aliases: Mapping[str, str] | None = None,
) -> BuiltModel:
    torch.manual_seed(1)
    return build_model(
        name,
        image_size=64,
        num_classes=len(targets),
        weights=str(weights),
        head_init=head_init,  # type: ignore[arg-type]
        labels=ClassMapping(targets=targets, sources=names, described=described, aliases=aliases or {}),
    )


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("googlenet", marks=pytest.mark.slow)])
def test_which_rows_come_from_where(name: str, tmp_path: Path) -> None:
    state = source(name, tmp_path / "s.safetensors")
    targets = ("ants", "bee", "Hot_Dog")
    created = {
        init: make(name, tmp_path / "s.safetensors", targets, head_init=init)
        for init in ("xavier", "torch", "source-labels", "linear-probe")
    }
    main, *auxiliary = created["xavier"].heads
    heads = {init: made.model.get_submodule(main) for init, made in created.items()}
    ours, xavier = heads["source-labels"], heads["xavier"]
    weight, bias = state[f"{main}.weight"], state[f"{main}.bias"]
    for row, taken in ((0, 1), (2, 5)):
        assert torch.equal(ours.weight[row], weight[taken] - weight.mean(0))
        assert torch.equal(ours.bias[row], bias[taken] - bias.mean())
    length = torch.stack([ours.weight[row].flatten().norm() for row in (0, 2)]).mean()
    drawn = xavier.weight[1].flatten()
    torch.testing.assert_close(ours.weight[1].flatten(), drawn / drawn.norm() * length)
    # It stands for the classes of the source that nobody has matched.
    torch.testing.assert_close(ours.bias[1], torch.tensor(float(len(weight) - 2)).log())
    # The others: what was drawn, the same in all that are Xavier's.
    assert torch.equal(heads["linear-probe"].weight, xavier.weight)
    assert torch.equal(heads["linear-probe"].bias, xavier.bias)
    assert torch.equal(heads["torch"].bias, xavier.bias)
    assert not torch.equal(heads["torch"].weight, xavier.weight)
    for head in auxiliary:
        for part in ("weight", "bias"):
            assert torch.equal(
                getattr(created["source-labels"].model.get_submodule(head), part),
                getattr(created["xavier"].model.get_submodule(head), part),
            )
    for made in created.values():
        assert all(
            torch.equal(tensor, state[key])
            for key, tensor in made.model.state_dict().items()
            if not key.startswith(tuple(f"{head}." for head in created["xavier"].heads))
        )


def test_the_softmax_is_the_sources_where_all_its_classes_are_wanted(tmp_path: Path) -> None:
    state = source("resnet18", tmp_path / "s.safetensors", classes=4)
    targets = ("d", "b", "a", "c")
    model = make("resnet18", tmp_path / "s.safetensors", targets, described=("a", "b", "c", "d")).model.eval()
    torch.manual_seed(0)
    original = models.resnet18(num_classes=4).eval()
    original.load_state_dict(state)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = softmax(original(images), 1)[:, [3, 1, 0, 2]]
        torch.testing.assert_close(softmax(model(images), 1), expected)


def test_every_match_is_said_and_what_has_none(tmp_path: Path) -> None:
    source("squeezenet1_1", tmp_path / "s.safetensors")
    lines = make(
        "squeezenet1_1",
        tmp_path / "s.safetensors",
        ("ants", "cranes", "not-hotdog", "cat", "puppy"),
        aliases={"puppy": "Dog", "cat": "hotdog"},
    ).summary
    said = "\n".join(lines)
    assert f"3 of 5 classes (what file {tmp_path / 's.safetensors'} says of itself)" in said
    assert "  ants <- ant, row 1 (plural)" in lines
    assert "  puppy <- dog, row 2 (alias)" in lines
    assert "  cat <- cat, row 0 (name)" in lines
    assert "    (not hotdog: a class of the very same name goes before an alias)" in lines
    assert "  cranes: AMBIGUOUS, left random: crane (row 3), Crane (row 4); model.aliases may choose" in lines
    assert "  left random, 1 that the source does not know: not-hotdog" in lines


def test_without_a_match_the_head_is_as_drawn_and_that_is_said_loudly(tmp_path: Path) -> None:
    source("resnet18", tmp_path / "s.safetensors")
    ours, xavier = (
        make("resnet18", tmp_path / "s.safetensors", ("x", "y"), head_init=init)
        for init in ("source-labels", "xavier")
    )
    for (key, one), other in zip(
        ours.model.state_dict().items(), xavier.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
    assert any("NO CLASS OF YOURS IS THE SOURCE'S" in line for line in ours.summary)


def test_a_head_without_a_bias_gets_rows_alone(tmp_path: Path) -> None:
    from torch import nn

    from trainer.model.head import Head
    from trainer.model.source_classes import init_head_from_source_classes

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    weight = torch.arange(12.0).view(4, 3)
    labels = ClassMapping(targets=("b", "d"), described=("a", "b", "c", "d"), aliases={})
    init_head_from_source_classes(
        model, Head("0", False, 3, 4), {"0.weight": weight}, labels, name="m", weights="w"
    )
    assert torch.equal(model[0].weight, weight[[1, 3]] - weight.mean(0))


def test_names_come_from_a_list(tmp_path: Path) -> None:
    state = source("resnet18", tmp_path / "s.safetensors")
    (tmp_path / "names").write_bytes("\ufeffx\r\n bee \r\n图\r\nu\r\nv\r\nw\r\n\r\n".encode())
    made = make(
        "resnet18", tmp_path / "s.safetensors", ("图", "bees"), names=str(tmp_path / "names"), described=None
    )
    weight = state["fc.weight"]
    assert torch.equal(made.model.fc.weight, weight[[2, 1]] - weight.mean(0))
    assert f"2 of 2 classes (file {tmp_path / 'names'})" in "\n".join(made.summary)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
    ],
)
def test_a_list_that_is_none_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "names"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"model.source_labels {path}.*{said}"):
        read_names(path)


def test_a_file_that_names_no_classes_has_torchvisions_if_it_has_as_many(tmp_path: Path) -> None:
    state = source("squeezenet1_1", tmp_path / "s.safetensors", classes=1000)
    made = make("squeezenet1_1", tmp_path / "s.safetensors", ("ants", "bees"), described=None)
    weight = state["classifier.1.weight"]
    assert torch.equal(made.model.classifier[1].weight, weight[[310, 309]] - weight.mean(0))
    said = "\n".join(made.summary)
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1, SINCE file" in said
    assert "NAMES NO CLASSES" in said
    source("squeezenet1_1", tmp_path / "s.safetensors", classes=6)
    with pytest.raises(UserError, match="names no classes, and its output layer has 6 rows, not the 1000"):
        make("squeezenet1_1", tmp_path / "s.safetensors", ("ants", "bees"), described=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"aliases": {"bug": "ant"}},
            "'bug', which is no class of yours. Expected one of its 2, such as ants, bees",
        ),
        ({"aliases": {"ant": "ant"}}, "'ant', which is no class of yours. Did you mean ants?"),
        ({"aliases": {"bees": "crate"}}, "bees -> crate, but the source has no class 'crate'. Did you mean"),
        ({"described": NAMES[:5]}, r"classes are 5 by what file .* but the output layer of .* has 6 rows"),
    ],
)
def test_names_that_do_not_fit_are_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    source("resnet18", tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=said):
        make("resnet18", tmp_path / "s.safetensors", ("ants", "bees"), **change)  # type: ignore[arg-type]


def test_a_source_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    state = source("resnet18", tmp_path / "s.safetensors")
    save_file({k: v for k, v in state.items() if k != "fc.weight"}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"none.safetensors holds no fc.weight, the output layer of resnet18"):
        make("resnet18", tmp_path / "none.safetensors", ("ants", "bees"))
    save_file(state | {"fc.weight": torch.zeros(6, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"fc.weight of .*other.safetensors is \[6, 7\], expected \[rows, 512\]"
    ):
        make("resnet18", tmp_path / "other.safetensors", ("ants", "bees"))

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.create import build_model
from trainer.transfer.linear_probe import fit_head, held_out_mask, require_linear
from trainer.transfer.logistic_regression import fit_cv

CLASSES = 3


def make_images(count: int, size: int) -> tuple[Tensor, list[int]]:
    """Return images whose color shows their class, and their labels."""
    generator = torch.Generator().manual_seed(3)
    labels = [i % CLASSES for i in range(count)]
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label] += 80
    return images, labels


def normalize(images: Tensor) -> Tensor:
    return (images.float() - 80) / 50


def make_batches(images: Tensor, labels: list[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for examples in torch.arange(len(images)).flip(0).split(5):  # any order will do
        yield images[examples], torch.tensor(labels)[examples], examples


def fit_probe(
    model: nn.Module, head: str, images: Tensor, labels: list[int], ctx: DistributedContext, *, balanced: bool = False
) -> str:
    """Fit the output layer; return the log."""
    lines: list[str] = []
    seconds = fit_head(
        model,
        head,
        make_batches(images, labels),
        labels,
        balanced=balanced,
        held_out=held_out_mask(torch.tensor(labels), 0),
        normalize=normalize,
        ctx=ctx,
        watchdog=nullcontext,
        log=lines.append,
    )
    assert seconds > 0
    return "\n".join(lines)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model.eval()(normalize(images))
    return logits


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("squeezenet1_1", 64),
        ("mobilenet_v3_small", 32),
        pytest.param("vit_b_32", 32, marks=pytest.mark.slow),
        pytest.param("googlenet", 32, marks=pytest.mark.slow),
    ],
)
def test_the_head_is_the_logistic_regression_on_its_inputs(name: str, size: int, ctx: DistributedContext) -> None:
    torch.manual_seed(2)
    built = build_model(name, image_size=size, num_classes=CLASSES, weights=None, head_init="linear-probe")
    model, head = built.model, built.heads[0]
    images, labels = make_images(12, size)
    layer = model.get_submodule(head)
    inputs: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        logits_of(model, images)
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    log = fit_probe(model, head, images, labels, ctx)

    assert model.training
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if key.startswith(f"{head}.")}
    features = inputs[0].flatten(2).mean(2) if inputs[0].ndim == 4 else inputs[0]
    held_out = held_out_mask(torch.tensor(labels), 0)
    solution, _, _ = fit_cv(features, torch.tensor(labels), CLASSES, held_out)
    expected = (features @ solution.weight.T + solution.bias).softmax(1)
    # Features of other batches are rounded differently, which changes the solution slightly.
    torch.testing.assert_close(logits_of(model, images).softmax(1), expected, rtol=0, atol=2e-2)
    assert f"features 12 x {layer.weight.shape[1]} in " in log
    assert f"penalty {solution.penalty:g}, selected on 3 held-out images" in log


def make_net(backbone: nn.Module, last: nn.Module, after: nn.Module | None = None) -> nn.Module:
    """Return a backbone, an output layer, and something after it."""
    return nn.Sequential(OrderedDict(backbone=backbone, last=last, after=after or nn.Identity()))


def pooled_net(last: nn.Module, after: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return make_net(pooled, last, after)


def mean_net(last: nn.Module, pool: nn.Module | None = None) -> nn.Module:
    return make_net(nn.Conv2d(3, 6, 3), last, nn.Sequential(pool or nn.AdaptiveAvgPool2d(1), nn.Flatten()))


TOKENS = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2), nn.Linear(9, 9))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mean_net(nn.Conv2d(6, CLASSES, 3)), "last is a Conv2d on inputs .*Choose xavier or source-labels"),
        (mean_net(nn.Conv2d(6, CLASSES, 1, stride=2)), "last is a Conv2d on inputs"),
        (make_net(TOKENS, nn.Linear(9, CLASSES), nn.Flatten()), r"last is a Linear on inputs \[2, 6, 9\]"),
    ],
    ids=["kernel", "stride", "tokens"],
)
def test_a_layer_that_is_not_pointwise_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_linear(model, "last", 12)


@pytest.mark.parametrize(
    "model",
    [pooled_net(nn.Linear(6, CLASSES), nn.Tanh()), mean_net(nn.Conv2d(6, CLASSES, 1), nn.AdaptiveMaxPool2d(1))],
    ids=["tanh", "maximum"],
)
def test_a_nonlinear_model_is_refused_before_the_pass(model: nn.Module, ctx: DistributedContext) -> None:
    require_linear(model, "last", 12)  # shapes do not show it
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="the model's logits are not those of last on its mean input"):
        fit_probe(model, "last", *make_images(6, 12), ctx)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training


def test_a_layer_without_bias_is_fitted_without_intercept(ctx: DistributedContext) -> None:
    model = pooled_net(nn.Linear(6, CLASSES, bias=False))  # as in MaxViT
    images, labels = make_images(12, 12)
    fit_probe(model, "last", images, labels, ctx)
    with torch.no_grad():
        features, targets = model.eval().backbone(normalize(images)), torch.tensor(labels)
    solution, _, _ = fit_cv(features, targets, CLASSES, held_out_mask(targets, 0), intercept=False)
    torch.testing.assert_close(logits_of(model, images), features @ solution.weight.T, rtol=1e-2, atol=1e-3)


def test_classes_with_one_image_are_not_held_out(ctx: DistributedContext) -> None:
    images, labels = make_images(7, 12)
    log = fit_probe(pooled_net(nn.Linear(6, 4)), "last", images, [*labels[:6], 3], ctx)
    assert "selected on 3 held-out images" in log
    model = pooled_net(nn.Linear(6, CLASSES))
    log = fit_probe(model, "last", images[:3], labels[:3], ctx)
    assert "penalty 0.1 by default: no class has a second image to hold out" in log
    assert logits_of(model, images[:3]).argmax(1).tolist() == labels[:3]


def test_features_that_are_not_finite_and_a_missing_example_are_errors(ctx: DistributedContext) -> None:
    class InfiniteForBlack(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            is_black = images[:, :1, :1, :1] == normalize(images.new_tensor(0))
            return torch.where(is_black, torch.inf, images)

    model = pooled_net(nn.Linear(6, CLASSES))
    images, labels = make_images(6, 12)
    with pytest.raises(RuntimeError, match="features of 5 of 6 examples were computed exactly once"):
        fit_probe(model, "last", images[:5], labels, ctx)
    model.backbone = nn.Sequential(InfiniteForBlack(), model.backbone)
    # The image comes in the last batch, not among those that are checked before the pass.
    images[0, 0, 0, 0], images[1:, 0, 0, 0] = 0, 9
    with pytest.raises(UserError, match="features of 1 training images are not finite"):
        fit_probe(model, "last", images, labels, ctx)


@pytest.mark.parametrize("balanced", [False, True])
def test_balanced_classes_have_equal_weight(balanced: bool, ctx: DistributedContext) -> None:
    model = pooled_net(nn.Linear(6, 2))
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    fit_probe(model, "last", images, [0] * 36 + [1] * 4, ctx, balanced=balanced)
    probability = logits_of(model, images).softmax(1)[:, 1]
    # The bias is not penalized, so the mean probability of a class is the share of its weights.
    assert (probability.mean().item() == pytest.approx(0.1, abs=1e-3)) is not balanced
    mean_over_classes = (probability[:36].mean() + probability[36:].mean()).item() / 2
    assert (mean_over_classes == pytest.approx(0.5, abs=1e-3)) is balanced


def test_a_fifth_of_each_class_is_held_out_by_seed() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] + [3] * 9)
    mask = held_out_mask(labels, 5)
    assert [int(mask[labels == k].sum()) for k in range(4)] == [10, 1, 0, 1]
    assert torch.equal(mask, held_out_mask(labels, 5))
    assert not torch.equal(mask, held_out_mask(labels, 6))
    groups = [None if example % 3 == 0 else f"patient {example % 10}" for example in range(len(labels))]
    mask = held_out_mask(labels, 5, groups)
    held_out, rest = (
        {groups[i] for i in (mask == side).nonzero().flatten().tolist()} - {None} for side in (True, False)
    )
    assert held_out.isdisjoint(rest)
    assert (held_out | rest) == {*groups} - {None}
    assert 0.1 < mask.float().mean() < 0.3


def test_a_solution_that_has_not_converged_is_reported(ctx: DistributedContext, monkeypatch: Any) -> None:
    monkeypatch.setattr("trainer.transfer.logistic_regression._MAX_ITERATIONS", 2)
    log = fit_probe(pooled_net(nn.Linear(6, CLASSES)), "last", *make_images(12, 12), ctx)
    assert "; NOT CONVERGED in " in log

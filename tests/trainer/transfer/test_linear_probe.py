from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.model.create import build_model
from trainer.transfer.linear_probe import fit_head, held_out_mask, require_linear
from trainer.transfer.logistic_regression import fit_cv

CLASSES = 3
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def ctx() -> Iterator[DistributedContext]:
    threads = torch.get_num_threads()
    yield context.start(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


def pictures(count: int, size: int) -> tuple[Tensor, list[int]]:
    """Return pictures whose colour tells their class."""
    generator = torch.Generator().manual_seed(3)
    labels = [i % CLASSES for i in range(count)]
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[label] += 80
    return images, labels


def normalize(images: Tensor) -> Tensor:
    return (images.float() - 80) / 50


def batches(images: Tensor, labels: list[int], size: int = 5) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for places in torch.arange(len(images)).flip(0).split(size):  # in any order
        yield images[places], torch.tensor(labels)[places], places


def probed(
    model: nn.Module,
    head: str,
    images: Tensor,
    labels: list[int],
    ctx: DistributedContext,
    *,
    balanced: bool = False,
    classes: int = CLASSES,
) -> str:
    said: list[str] = []
    seconds = fit_head(
        model,
        head,
        batches(images, labels),
        labels,
        classes=classes,
        balanced=balanced,
        seed=0,
        normalize=normalize,
        ctx=ctx,
        watch=nullcontext,
        log=said.append,
    )
    assert seconds > 0
    return "\n".join(said)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("squeezenet1_1", 64),
        ("mobilenet_v3_small", 32),
        pytest.param("alexnet", 64, marks=slow),
        pytest.param("convnext_tiny", 32, marks=slow),
        pytest.param("vit_b_32", 32, marks=slow),
        pytest.param("swin_t", 32, marks=slow),
        pytest.param("googlenet", 32, marks=slow),
        pytest.param("inception_v3", 96, marks=slow),
        pytest.param("efficientnet_b0", 32, marks=slow),
        pytest.param("densenet121", 32, marks=slow),
    ],
)
def test_the_head_is_the_solution_on_what_reaches_it(name: str, size: int, ctx: DistributedContext) -> None:
    torch.manual_seed(2)
    created = build_model(
        name,
        image_size=size,
        num_classes=CLASSES,
        weights=None,
        head_init="linear-probe",
    )
    model, head = created.model.train(), created.heads[0]
    require_linear(model, head, size)
    images, labels = pictures(12, size)
    layer = model.get_submodule(head)
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])), torch.no_grad():
        model.eval()(normalize(images))
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    said = probed(model, head, images, labels, ctx)

    assert model.training
    assert all(
        torch.equal(tensor, before[key]) != key.startswith(f"{head}.")
        for key, tensor in model.state_dict().items()
    ), "the output layer alone has changed"
    features = seen[0].flatten(2).mean(2) if seen[0].ndim == 4 else seen[0]
    apart = held_out_mask(torch.tensor(labels), 0)
    choice = fit_cv(features, torch.tensor(labels), CLASSES, apart, intercept=layer.bias is not None)
    with torch.no_grad():
        logits = model.eval()(normalize(images))
    expected = features @ choice.solution.weight.T + choice.solution.bias
    # Features rounded another way, in other batches, move the solution a little.
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=0, atol=2e-2)
    assert f"features 12 x {layer.weight.shape[1]} in " in said
    assert f"penalty {choice.solution.penalty:g}, chosen on 3 images held out" in said


class Odd(nn.Module):
    """A body, an output layer, and something after it."""

    def __init__(self, body: nn.Module, last: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.last, self.after = body, last, after

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.after(self.last(self.body(images)))
        return logits


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "last",
    [nn.Conv2d(6, CLASSES, 3), nn.Conv2d(6, CLASSES, 1, stride=2), nn.Conv2d(6, CLASSES, 1, padding=1)],
    ids=["kernel", "stride", "padding"],
)
def test_a_convolution_that_sees_more_than_a_point_is_refused(last: nn.Module) -> None:
    model = Odd(nn.Conv2d(3, 6, 3), last, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(UserError, match=r"last is a Conv2d on inputs .*Choose xavier or source-labels"):
        require_linear(model, "last", 12)


def test_a_linear_layer_on_every_token_is_refused() -> None:
    tokens = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2), nn.Linear(9, 9))
    model = Odd(tokens, nn.Linear(9, CLASSES), nn.Flatten())
    with pytest.raises(UserError, match=r"last is a Linear on inputs \[2, 6, 9\]"):
        require_linear(model, "last", 12)


@pytest.mark.parametrize(
    ("body", "last", "after"),
    [
        (pooled(), nn.Linear(6, CLASSES), nn.Tanh()),
        (pooled(), nn.Linear(6, CLASSES), nn.LayerNorm(CLASSES)),
        (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, CLASSES, 1),
            nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ),
        (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, CLASSES, 1),
            nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        ),
    ],
    ids=["tanh", "norm", "relu ahead of the mean", "maximum"],
)
def test_what_is_not_linear_is_refused_before_the_pass(
    body: nn.Module, last: nn.Module, after: nn.Module, ctx: DistributedContext
) -> None:
    model = Odd(body, last, after)
    require_linear(model, "last", 12)  # not to be seen from shapes
    images, labels = pictures(6, 12)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="the model's logits are not last on the mean of what reaches it"):
        probed(model, "last", images, labels, ctx)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training


def test_a_layer_without_a_bias_is_solved_for_without_one(ctx: DistributedContext) -> None:
    torch.manual_seed(0)
    model = Odd(pooled(), nn.Linear(6, CLASSES, bias=False), nn.Identity())  # as MaxViT's
    images, labels = pictures(12, 12)
    probed(model, "last", images, labels, ctx)
    with torch.no_grad():
        features = model.eval().body(normalize(images))
        logits = model(normalize(images))
    there = torch.tensor(labels)
    choice = fit_cv(features, there, CLASSES, held_out_mask(there, 0), intercept=False)
    torch.testing.assert_close(logits, features @ choice.solution.weight.T, rtol=1e-2, atol=1e-3)


def test_classes_of_one_image_break_nothing(ctx: DistributedContext) -> None:
    torch.manual_seed(0)
    model = Odd(pooled(), nn.Linear(6, 4), nn.Identity())
    images, labels = pictures(7, 12)
    lonely = [*labels[:6], 3]  # class 3 has one image, the others two
    said = probed(model, "last", images, lonely, ctx, classes=4)
    assert "chosen on 3 images held out" in said
    model = Odd(pooled(), nn.Linear(6, CLASSES), nn.Identity())
    said = probed(model, "last", images[:3], labels[:3], ctx)
    assert "penalty 0.1, not chosen: no class has a second image to hold out" in said
    assert (model.eval()(normalize(images[:3])).argmax(1) == torch.tensor(labels[:3])).all()


def test_features_that_are_not_finite_are_refused(ctx: DistributedContext) -> None:
    model = Odd(pooled(), nn.Linear(6, CLASSES), nn.Identity())
    images, labels = pictures(6, 12)
    real = normalize

    class Spoilt(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.where(images[:, :1, :1, :1] == real(images.new_tensor(0)), torch.inf, images)

    images[0, 0, 0, 0], images[1:, 0, 0, 0] = 0, 9
    model.body = nn.Sequential(Spoilt(), model.body)
    with pytest.raises(UserError, match="features of 1 training images are not finite"):
        # The spoilt picture comes with the last batch: the first ones are looked at before the pass.
        probed(model, "last", images, labels, ctx)


def test_a_balanced_probe_weighs_classes_alike(ctx: DistributedContext) -> None:
    torch.manual_seed(0)
    model = Odd(pooled(), nn.Linear(6, 2), nn.Identity())
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = [0] * 36 + [1] * 4
    for balanced in (False, True):
        probed(model, "last", images, labels, ctx, balanced=balanced, classes=2)
        with torch.no_grad():
            found = model.eval()(normalize(images)).softmax(1)[:, 1]
        # The bias is free: where the loss is least, the classes come out as often as they are counted.
        assert (found.mean().item() == pytest.approx(0.1, abs=1e-3)) is not balanced
        weighed = (found[:36].mean() + found[36:].mean()).item() / 2
        assert (weighed == pytest.approx(0.5, abs=1e-3)) is balanced


def test_a_fifth_of_each_class_is_held_out_the_same_for_a_seed() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] + [3] * 9)
    apart = held_out_mask(labels, 5)
    assert [int(apart[labels == k].sum()) for k in range(4)] == [10, 1, 0, 1]
    assert torch.equal(apart, held_out_mask(labels, 5))
    assert not torch.equal(apart, held_out_mask(labels, 6))


def test_a_solution_that_did_not_converge_is_told(
    ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.transfer.logistic_regression._MOST_ITERATIONS", 2)
    model = Odd(pooled(), nn.Linear(6, CLASSES), nn.Identity())
    assert "NOT SOLVED to the end in" in probed(model, "last", *pictures(12, 12), ctx)


def test_a_model_whose_output_is_not_finite_does_not_begin() -> None:
    from trainer.evaluate import Evaluation
    from trainer.train_run import _before_training

    bad = Evaluation(loss_sum=float("nan"), correct=(0,), support=(1,), predicted=(1,))
    with pytest.raises(UserError, match="before the first step is not finite"):
        _before_training(lambda model, interrupted: {"test": bad}, nn.Identity(), Heartbeat())  # type: ignore[arg-type]


def test_an_example_that_was_not_seen_is_an_error(ctx: DistributedContext) -> None:
    model = Odd(pooled(), nn.Linear(6, CLASSES), nn.Identity())
    images, labels = pictures(6, 12)
    with pytest.raises(RuntimeError, match="the features of 5 of 6 examples were found once"):
        fit_head(
            model,
            "last",
            batches(images[:5], labels),
            labels,
            classes=CLASSES,
            balanced=False,
            seed=0,
            normalize=normalize,
            ctx=ctx,
            watch=nullcontext,
            log=print,
        )

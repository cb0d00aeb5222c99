import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.training import SmallNet, make_net, normalize
from trainer.distributed.context import DistributedContext
from trainer.evaluate import Interrupted, evaluate
from trainer.transfer import feature_store
from trainer.transfer.eval_features import EvalFeatures
from trainer.transfer.feature_store import FrozenLayers
from trainer.transfer.frozen_features import FixedViews, FrozenFeatures

EXAMPLES, BATCH_SIZE, VIEWS = 7, 3, 2
Batch = tuple[Tensor, Tensor, Tensor]


class Images:
    """Batches of one pass over some images; it counts the passes over each view."""

    def __init__(self, *, skip: int = -1) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randint(256, (VIEWS, EXAMPLES, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(EXAMPLES) % 3
        self.passes: list[int] = []
        self._skip = skip

    def of_view(self, view: int) -> Iterator[Batch]:
        self.passes.append(view)
        for examples in torch.arange(EXAMPLES).split(BATCH_SIZE):
            some = examples[examples != self._skip]
            yield self.images[view][some], self.labels[some], some

    def __len__(self) -> int:
        return math.ceil(EXAMPLES / BATCH_SIZE)

    def __iter__(self) -> Iterator[Batch]:
        return self.of_view(0)


def make_layers(ctx: DistributedContext, lines: list[str] | None = None) -> FrozenLayers:
    blank = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    return FrozenLayers(
        ctx=ctx, normalize=normalize, blank=blank, memory_share=0.5, log=([] if lines is None else lines).append
    )


def make_frozen_net() -> SmallNet:
    net = make_net()
    net.conv.requires_grad_(False)
    return net


def make_features(model: nn.Module, layers: FrozenLayers, images: Images) -> FrozenFeatures:
    views = FixedViews(
        views=VIEWS, images=EXAMPLES, batches=images.of_view, num_batches=len(images), batch_size=BATCH_SIZE, epochs=9
    )
    return FrozenFeatures(model, layers, views)


def never() -> bool:
    return False


def test_the_features_of_each_view_are_computed_once(ctx: DistributedContext) -> None:
    net, images, lines = make_frozen_net(), Images(), []
    features = make_features(net, make_layers(ctx, lines), images)
    trained = features.start_stage()
    assert features.is_active
    assert {id(p) for p in trained.parameters()} == {id(p) for p in net.fc.parameters()}
    for epoch in range(2 * VIEWS):
        assert features.start_stage() is trained
        features.start_epoch(epoch, never)
        local = features.lookup(epoch, torch.tensor([5, 0]))
        assert local.shape == (2, 4)
        expected = net(normalize(images.images[epoch % VIEWS][[5, 0]]))
        torch.testing.assert_close(trained(features.to_input(local)), expected)
        local.zero_()  # as a layer that works in place
        assert features.lookup(epoch, torch.tensor([5])).any()
        assert features.lookup(epoch, torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    assert images.passes == [0, 1]
    assert lines[0] == "frozen layers: the input of fc (4) for 14 images to train on, 0.0 MB, is computed once"
    assert lines[1].startswith("frozen layers: features of view 1 of 2 computed in ")
    assert len(lines) == 3


def test_an_interrupted_pass_is_repeated(ctx: DistributedContext) -> None:
    images, flags = Images(), iter([False, False, True])
    features = make_features(make_frozen_net(), make_layers(ctx), images)
    features.start_stage()
    with pytest.raises(Interrupted):
        features.start_epoch(0, lambda: next(flags))
    features.start_epoch(0, never)
    assert images.passes == [0, 0]


def test_an_image_without_features_raises(ctx: DistributedContext) -> None:
    features = make_features(make_frozen_net(), make_layers(ctx), Images(skip=4))
    features.start_stage()
    with pytest.raises(RuntimeError, match="features of 6 of 7 images were computed once"):
        features.start_epoch(0, never)


def test_a_new_stage_has_other_features_or_none(ctx: DistributedContext) -> None:
    net, images = make_frozen_net(), Images()
    net.norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    net.norm.requires_grad_(False)
    features = make_features(net, make_layers(ctx), images)
    for unfrozen, shape in ((net.fc, (4,)), (net.norm[1], (4, 6, 6)), (net.norm[0], (4, 6, 6))):
        unfrozen.requires_grad_(True)
        features.start_stage()
        features.start_epoch(0, never)
        assert features.lookup(0, torch.arange(1)).shape == (1, *shape)
    assert images.passes == [0, 0, 0]
    net.conv.requires_grad_(True)
    assert features.start_stage() is net
    assert not features.is_active
    features.start_epoch(0, never)
    assert images.passes == [0, 0, 0]
    assert torch.equal(features.to_input(images.images[0]), normalize(images.images[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("MAX_RATIO", 0.05), "is 0.1 times as large as the image, so it is computed anew for images to train on in"),
        (("available_memory", lambda: 300), "14 images to train on, 0.0 MB, does not fit into 0.0 MB of memory: it is"),
    ],
)
def test_large_features_are_not_kept(
    change: tuple[str, object], message: str, ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, *change)
    net, lines = make_frozen_net(), []
    features = make_features(net, make_layers(ctx, lines), Images())
    assert features.start_stage() is net
    assert message in lines[0]


def test_features_keep_their_memory_format_and_type(ctx: DistributedContext) -> None:
    net = make_net().to(memory_format=torch.channels_last)
    net.norm = nn.Conv2d(4, 2, 1)
    net.conv.requires_grad_(False)
    layers = make_layers(ctx)
    features = make_features(net, layers, images := Images())
    features.start_stage()
    features.start_epoch(0, never)
    local = features.lookup(0, torch.tensor([3, 6]))
    torch.testing.assert_close(local, net.conv(normalize(images.images[0][[3, 6]])))
    assert local.is_contiguous(memory_format=torch.channels_last)


# Evaluation


def run(
    features: EvalFeatures, model: nn.Module, images: Images, interrupted: Callable[[], bool] = never
) -> tuple[float, nn.Module]:
    """Return the loss, and what was evaluated."""
    evaluated, batches, to_input = features.inputs(model, "test", images, EXAMPLES)
    result = evaluate(
        evaluated, batches, classes=3, expected=EXAMPLES, normalize=to_input, reduce=lambda sums: sums,
        device=torch.device("cpu"), num_batches=len(images), interrupted=interrupted,
    )  # fmt: skip
    return result.loss_sum, evaluated


def make_eval_net() -> SmallNet:
    """Return a network with dropout before its output layer, which is the only one that trains."""
    net = make_net(dropout=0.5, batch_norm=True)
    net.conv.requires_grad_(False)
    net.norm = nn.Sequential(nn.ReLU(inplace=True))
    return net


def expected_loss(net: nn.Module, images: Images) -> float:
    net.eval()
    with torch.no_grad():
        logits = [net(normalize(batch)) for batch in images.images[0].split(BATCH_SIZE)]
    net.train()
    loss = sum(nn.functional.cross_entropy(part, labels, reduction="sum").double()
               for part, labels in zip(logits, images.labels.split(BATCH_SIZE), strict=True))  # fmt: skip
    return float(loss)


def test_an_evaluation_reads_images_once_and_its_result_is_the_same(ctx: DistributedContext) -> None:
    net, images = make_eval_net().train(), Images()
    features = EvalFeatures(net, make_layers(ctx), num_images=EXAMPLES)
    for number in range(3):
        loss, evaluated = run(features, net, images)
        assert loss == expected_loss(net, images)
        assert evaluated is not net
        assert all(module.training for module in net.modules())
        with torch.no_grad():
            net.fc.weight += number + 1
    assert images.passes == [0]


def test_an_average_of_the_weights_shares_the_features_and_another_model_does_not(ctx: DistributedContext) -> None:
    net, images = make_eval_net(), Images()
    average = copy.deepcopy(net).requires_grad_(requires_grad=False)
    features = EvalFeatures(net, make_layers(ctx), num_images=EXAMPLES)
    with torch.no_grad():
        average.fc.weight *= 2
    for model in (net, average, net):
        assert run(features, model, images)[0] == expected_loss(model, images)
    assert images.passes == [0]
    with torch.no_grad():
        average.conv.weight *= 2
    loss, evaluated = run(features, average, images)
    assert (loss, evaluated) == (expected_loss(average, images), average)
    net.conv.requires_grad_(True)
    assert run(features, net, images)[1] is net
    assert images.passes == [0] * 3


def test_an_interrupted_evaluation_starts_again(ctx: DistributedContext) -> None:
    net, images, flags = make_eval_net().train(), Images(), iter([False, False, True])
    features = EvalFeatures(net, make_layers(ctx), num_images=EXAMPLES)
    with pytest.raises(Interrupted):
        run(features, net, images, interrupted=lambda: next(flags))
    assert run(features, net, images)[0] == run(features, net, images)[0] == expected_loss(net, images)
    assert images.passes == [0, 0]

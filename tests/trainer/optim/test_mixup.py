from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.trainer.test_loop import PLAN, batches, model, normalize, prepare, same
from trainer.distributed import context
from trainer.loop import NullCheckpointManager, ResumePoint, TrainSchedule, fit
from trainer.optim.loss import MixedTarget
from trainer.optim.mixup import MixParams, Mixup, apply_cutmix, sample_params
from trainer.optim.param_groups import set_lr

SEED = 5
ALPHAS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0), "both": (0.3, 1.0)}


def drawn(kind: str, step: int, size: int = 7) -> MixParams:
    mixup, cutmix = ALPHAS[kind]
    return sample_params(mixup=mixup, cutmix=cutmix, seed=SEED, step=step, size=size)


def alone(kind: str) -> Mixup:
    """Return the mixing of one process."""

    def nobody(tensor: Tensor) -> Tensor:
        raise AssertionError("one process has nobody to gather from")

    mixup, cutmix = ALPHAS[kind]
    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, seed=SEED, rank=0, world_size=1, gather=nobody)


def share(size: int = 7, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 10, 8), dtype=torch.uint8, generator=generator)
    return images, torch.arange(size) % 3


# What is drawn


@pytest.mark.parametrize("kind", ALPHAS)
def test_a_mixture_belongs_to_seed_and_step(kind: str) -> None:
    mixtures = [drawn(kind, step) for step in range(20)]
    np.random.seed(3)
    torch.manual_seed(3)
    assert [drawn(kind, step) for step in range(20)] == mixtures
    assert len({mixture.lam for mixture in mixtures}) == 20
    assert len({mixture.permutation for mixture in mixtures}) > 15
    assert all(sorted(mixture.permutation) == list(range(7)) for mixture in mixtures)
    mixup, cutmix = ALPHAS[kind]
    assert sample_params(mixup=mixup, cutmix=cutmix, seed=SEED + 1, step=0, size=7) != mixtures[0]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_weights_are_of_beta_alpha_alpha(kind: str) -> None:
    alpha = max(ALPHAS[kind])
    weights = np.array([drawn(kind, step).lam for step in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(variance, rel=0.1)
    assert ((weights >= 0) & (weights <= 1)).all()


def test_each_batch_is_the_one_or_the_other() -> None:
    boxes = [drawn("both", step).box is not None for step in range(1000)]
    assert 430 < sum(boxes) < 570
    assert not any(drawn("mixup", step).box for step in range(50))
    assert all(drawn("cutmix", step).box for step in range(50))


def test_a_box_has_its_weight_as_area_and_is_cut_off_at_the_edges() -> None:
    whole = cut = 0
    for step in range(300):
        mixture = drawn("cutmix", step)
        assert mixture.box is not None
        top, left, bottom, right = mixture.box
        assert 0 <= top <= bottom <= 1
        assert 0 <= left <= right <= 1
        area = (bottom - top) * (right - left)
        if top > 0 and bottom < 1 and left > 0 and right < 1:
            whole += 1
            assert area == pytest.approx(mixture.lam)
            assert bottom - top == pytest.approx(right - left)
        else:
            cut += 1
            assert area <= mixture.lam + 1e-9
    assert min(whole, cut) > 30


# What it does to a batch


def test_mixup_adds_each_picture_and_its_partner_by_their_weights() -> None:
    images, labels = share()
    swapped = 0
    for step in range(12):
        mixture = drawn("mixup", step)
        mixed, major, blend = alone("mixup")(images, labels, step, 7)
        permutation = list(mixture.permutation)
        expected = (1 - mixture.lam) * images.double() + mixture.lam * images[permutation].double()
        torch.testing.assert_close(mixed.double(), expected, atol=1e-3, rtol=0)
        own, theirs = labels.tolist(), labels[permutation].tolist()
        if mixture.lam > 0.5:
            swapped += 1
            assert (major.tolist(), blend.labels.tolist()) == (theirs, own)
            assert blend.lam == pytest.approx(1 - mixture.lam)
        else:
            assert (major.tolist(), blend.labels.tolist()) == (own, theirs)
            assert blend.lam == mixture.lam
    assert 0 < swapped < 12


def test_cutmix_takes_a_box_from_the_partner_and_weighs_by_its_pixels() -> None:
    images, labels = share()
    for step in range(12):
        mixture = drawn("cutmix", step)
        mixed, major, blend = alone("cutmix")(images, labels, step, 7)
        assert mixture.box is not None
        rows, columns = (
            range(round(mixture.box[i] * side), round(mixture.box[i + 2] * side))
            for i, side in ((0, 10), (1, 8))
        )
        for position, partner in enumerate(mixture.permutation):
            for y in range(10):
                for x in range(8):
                    source = partner if y in rows and x in columns else position
                    assert torch.equal(mixed[position, :, y, x], images[source, :, y, x])
        area = len(rows) * len(columns) / 80
        assert blend.lam == pytest.approx(min(area, 1 - area))
        greater = labels[list(mixture.permutation)] if area > 0.5 else labels
        assert torch.equal(major, greater)
    assert mixed.dtype == torch.uint8


@pytest.mark.parametrize(
    ("box", "area"), [((0, 0, 1, 1), 1.0), ((0.5, 0.5, 0.5, 0.5), 0.0), ((0, 0.25, 0.5, 1), 0.375)]
)
def test_the_weight_is_the_share_of_pixels(box: tuple[float, float, float, float], area: float) -> None:
    ours, theirs = torch.zeros(2, 3, 4, 8), torch.ones(2, 3, 4, 8)
    mixed, weight = apply_cutmix(ours, theirs, box)
    assert weight == area == mixed.mean().item()
    assert not ours.any(), "what came from the loader stays as it is"


def test_a_batch_of_one_is_its_own_partner() -> None:
    images, labels = share(1)
    for kind in ALPHAS:
        mixed, major, blend = alone(kind)(images, labels, 3, 1)
        torch.testing.assert_close(mixed.float(), images.float(), atol=1e-4, rtol=0)
        assert torch.equal(major, labels)
        assert torch.equal(blend.labels, labels)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_memory_layout_stays(kind: str) -> None:
    images, labels = share()
    for layout in (torch.channels_last, torch.contiguous_format):
        mixed, _, _ = alone(kind)(images.contiguous(memory_format=layout), labels, 0, 7)
        assert mixed.is_contiguous(memory_format=layout)


# Several processes


@pytest.mark.parametrize("kind", ALPHAS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_shares_of_all_ranks_are_the_mixed_global_batch(kind: str, world_size: int, size: int) -> None:
    images, labels = share(size)
    longest = -(-size // world_size)
    mixup, cutmix = ALPHAS[kind]

    def padded(tensor: Tensor, rank: int) -> Tensor:
        mine = tensor[rank::world_size]
        return torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])

    for step in range(4):
        whole, major, blend = alone(kind)(images, labels, step, size)
        for rank in range(world_size):

            def gather(mine: Tensor, rank: int = rank) -> Tensor:
                (full,) = (tensor for tensor in (images, labels) if tensor.dim() == mine.dim())
                assert torch.equal(mine, padded(full, rank)), "all give as much, whatever their share"
                return torch.cat([padded(full, other) for other in range(world_size)])

            mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                seed=SEED,
                rank=rank,
                world_size=world_size,
                gather=gather,
            )
            found = mixup(images[rank::world_size], labels[rank::world_size], step, size)
            assert torch.equal(found[0], whole[rank::world_size])
            assert torch.equal(found[1], major[rank::world_size])
            assert torch.equal(found[2].labels, blend.labels[rank::world_size])
            assert found[2].lam == blend.lam


# In the loop


@pytest.fixture
def accelerator() -> Accelerator:
    return context.start(device="cpu", precision="fp32", threads=1).accelerator


class MetricState:
    """Keeps the figures of each step of an epoch."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int]] = []

    def step(self, epoch: int, epoch_step: int) -> None: ...

    def point(self, progress: object) -> None:
        self.found.append((progress.figures.loss_sum, progress.figures.correct))  # type: ignore[attr-defined]

    def epoch(self, progress: object, evaluations: object) -> None: ...


def train(
    net: nn.Module,
    accelerator: Accelerator,
    plan: TrainSchedule = PLAN,
    *,
    kind: str = "both",
    start: ResumePoint | None = None,
) -> MetricState:
    prepared, optimizer = prepare(net, accelerator)
    start, sums = start or ResumePoint(), MetricState()
    data: Iterator[tuple[Tensor, Tensor, Tensor]] = batches(plan)
    for _ in range(start.step):
        next(data)
    fit(
        prepared, optimizer, data, plan, start, accelerator=accelerator, normalize=normalize,
        evaluate=lambda model, interrupted: {}, keeper=NullCheckpointManager(), listener=sums,
        batch_paths=lambda epoch, step: [], mixup=alone(kind),
    )  # fmt: skip
    return sums


@pytest.mark.parametrize("kind", ALPHAS)
def test_the_loop_learns_from_mixed_pictures_under_mixed_labels(kind: str, accelerator: Accelerator) -> None:
    found, reference = model(), model()
    sums = train(found, accelerator, replace(PLAN, epochs=1), kind=kind)
    prepared, optimizer = prepare(reference, accelerator)
    set_lr(optimizer, 1.0)
    total, right = 0.0, 0
    for step, (images, labels, _) in enumerate(batches(replace(PLAN, epochs=1))):
        size = len(labels)
        mixture = drawn(kind, step, size)
        others = images[list(mixture.permutation)]
        if mixture.box is None:
            mixed, weight = (1 - mixture.lam) * images + mixture.lam * others, mixture.lam
        else:
            mixed, weight = apply_cutmix(images, others, mixture.box)
        logits = prepared(normalize(mixed))
        theirs = labels[list(mixture.permutation)]
        loss = (1 - weight) * cross_entropy(logits, labels, reduction="sum")
        loss = loss + weight * cross_entropy(logits, theirs, reduction="sum")
        (loss / size).backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        right += int((logits.argmax(1) == (theirs if weight > 0.5 else labels)).sum())
        assert sums.found[step] == (pytest.approx(total, rel=1e-5), right)
    for a, b in zip(found.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_cut_batch_is_mixed_as_the_whole(accelerator: Accelerator) -> None:
    whole, pieces = model(), model()
    train(whole, accelerator)
    train(pieces, accelerator, replace(PLAN, grad_accum_steps=3))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_mixes_as_if_it_had_not_ended(accelerator: Accelerator) -> None:
    whole, parts = model(), model()
    train(whole, accelerator)
    train(parts, accelerator, replace(PLAN, epochs=1))
    torch.rand(17)
    np.random.rand(17)
    train(parts, accelerator, start=ResumePoint(epoch=1, step=3))
    assert same(whole, parts)
    unmixed = model()
    train(unmixed, accelerator, replace(PLAN, epochs=1), kind="mixup")
    assert not same(unmixed, parts)


def test_a_piece_of_a_blend_is_that_of_its_labels() -> None:
    piece = MixedTarget(torch.arange(6), 0.25)[2:5]
    assert (piece.labels.tolist(), piece.lam) == ([2, 3, 4], 0.25)

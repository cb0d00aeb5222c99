from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.optim.mixup import MixParams, Mixup, apply_cutmix, sample_params

SEED = 5
ALPHAS = {"mixup": (0.4, 0.0), "cutmix": (0.0, 1.0), "both": (0.3, 1.0)}


def params_of(kind: str, step: int, size: int = 7, *, seed: int = SEED) -> MixParams:
    mixup, cutmix = ALPHAS[kind]
    return sample_params(mixup_alpha=mixup, cutmix_alpha=cutmix, seed=seed, step=step, size=size)


def make_mixup(kind: str, rank: int = 0, world_size: int = 1, gather: Any = pytest.fail) -> Mixup:
    """Return the mixup of one process, by default of a single one, which has nothing to gather."""
    mixup, cutmix = ALPHAS[kind]
    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, seed=SEED, rank=rank, world_size=world_size, gather=gather)


def make_batch(size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, 10, 8), dtype=torch.uint8, generator=generator)
    return images, torch.arange(size) % 3


@pytest.mark.parametrize("kind", ALPHAS)
def test_params_depend_on_seed_and_step_alone(kind: str) -> None:
    params = [params_of(kind, step) for step in range(20)]
    np.random.seed(3)
    torch.manual_seed(3)
    assert [params_of(kind, step) for step in range(20)] == params
    assert len({p.lam for p in params}) == 20
    assert len({p.permutation for p in params}) > 15
    assert all(sorted(p.permutation) == list(range(7)) for p in params)
    assert params_of(kind, 0, seed=SEED + 1) != params[0]


@pytest.mark.parametrize(("kind", "fraction"), [("mixup", 0), ("cutmix", 1), ("both", 0.5)])
def test_lam_has_the_beta_distribution_and_cutmix_its_share_of_the_batches(kind: str, fraction: float) -> None:
    params = [params_of(kind, step) for step in range(4000)]
    assert np.mean([p.box is not None for p in params]) == pytest.approx(fraction, abs=0.03 if kind == "both" else 0)
    for alpha, is_cutmix in zip(ALPHAS[kind], (False, True), strict=True):
        lams = np.array([p.lam for p in params if (p.box is not None) == is_cutmix])
        if alpha:
            assert lams.mean() == pytest.approx(0.5, abs=0.03)
            assert lams.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
            assert ((lams >= 0) & (lams <= 1)).all()


def test_a_box_has_lam_as_its_area_and_is_clipped_at_the_edges() -> None:
    clipped = 0
    for step in range(300):
        params = params_of("cutmix", step)
        assert params.box is not None
        top, left, bottom, right = params.box
        assert 0 <= top <= bottom <= 1
        assert 0 <= left <= right <= 1
        area = (bottom - top) * (right - left)
        if {top, left} & {0} or {bottom, right} & {1}:
            clipped += 1
            assert area <= params.lam + 1e-9
        else:
            assert area == pytest.approx(params.lam)
            assert bottom - top == pytest.approx(right - left)
    assert 30 < clipped < 270


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_batch_is_mixed_pixel_by_pixel_and_its_labels_by_weight(kind: str, memory_format: Any) -> None:
    images, labels = make_batch()
    images = images.contiguous(memory_format=memory_format)
    swapped = 0
    for step in range(12):
        params = params_of(kind, step)
        permutation = list(params.permutation)
        mixed, major, minor = make_mixup(kind)(images, labels, step, 7)
        assert mixed.is_contiguous(memory_format=memory_format)
        if params.box is None:
            lam = params.lam
            expected = (1 - lam) * images.double() + lam * images[permutation].double()
            torch.testing.assert_close(mixed.double(), expected, atol=1e-3, rtol=0)
        else:
            top, left, bottom, right = (
                round(edge * side) for edge, side in zip(params.box, (10, 8, 10, 8), strict=True)
            )
            in_box = torch.zeros(10, 8, dtype=torch.bool)
            in_box[top:bottom, left:right] = True
            lam = in_box.double().mean().item()
            assert torch.equal(mixed, torch.where(in_box, images[permutation], images))
        assert minor is not None
        own, other = labels.tolist(), labels[permutation].tolist()
        swapped += lam > 0.5
        assert (major.tolist(), minor.labels.tolist()) == ((other, own) if lam > 0.5 else (own, other))
        assert minor.lam == pytest.approx(min(lam, 1 - lam))
    assert 0 < swapped < 12


def test_cutmix_returns_the_fraction_of_the_pixels() -> None:
    images, others = torch.zeros(2, 3, 4, 8), torch.ones(2, 3, 4, 8)
    for box, area in (((0, 0, 1, 1), 1.0), ((0.5, 0.5, 0.5, 0.5), 0.0), ((0, 0.25, 0.5, 1), 0.375)):
        mixed, lam = apply_cutmix(images, others, box)
        assert lam == area == mixed.mean().item()
    assert not images.any(), "the loader's batch is not changed"


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 1), (3, 7)])
def test_the_local_batches_of_all_ranks_are_the_mixed_global_batch(kind: str, world_size: int, size: int) -> None:
    """tests/distributed compares the updates of real ranks."""
    images, labels = make_batch(size)
    longest = -(-size // world_size)

    def padded(tensor: Tensor, rank: int) -> Tensor:
        local = tensor[rank::world_size]
        return torch.cat([local, local.new_zeros(longest - len(local), *local.shape[1:])])

    def gather(tensor: Tensor) -> Tensor:
        assert len(tensor) == longest, "every rank must pass the same number of rows"
        (full,) = (each for each in (images, labels) if each.dim() == tensor.dim())
        return torch.cat([padded(full, rank) for rank in range(world_size)])

    for step in range(4):
        whole, major, minor = make_mixup(kind)(images, labels, step, size)
        for rank in range(world_size):
            local = slice(rank, None, world_size)
            on_rank = make_mixup(kind, rank, world_size, gather)
            mixed, local_major, local_minor = on_rank(images[local], labels[local], step, size)
            assert minor is not None
            assert local_minor is not None
            for local_part, part in ((mixed, whole), (local_major, major), (local_minor.labels, minor.labels)):
                assert torch.equal(local_part, part[local])

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.folders import image_folder
from trainer.data.augment import Preprocessing, train_transform
from trainer.data.balance import balanced, repeated
from trainer.data.loader import DistributedBatchSampler, EpochOrder, ImageDataset, SampleKey

COUNTS = {
    "rare": {0: 13, 1: 2, 2: 6},
    "a class missing": {0: 5, 3: 1},
    "one class": {1: 4},
    "even": {0: 3, 1: 3},
}


def labels_of(name: str) -> tuple[int, ...]:
    """Return labels in no order."""
    labels = torch.tensor([label for label, count in COUNTS[name].items() for _ in range(count)])
    return tuple(labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))].tolist())


def order_of(name: str, *, batch_size: int = 4, seed: int = 3) -> EpochOrder:
    labels = labels_of(name)
    return EpochOrder(examples=len(labels), batch_size=batch_size, seed=seed, labels=labels)


@pytest.mark.parametrize("name", COUNTS)
def test_an_epoch_has_as_many_of_each_class_and_of_each_example_within_it(name: str) -> None:
    order, labels = order_of(name), labels_of(name)
    for epoch in range(5):
        drawn = Counter(order.permutation(epoch).tolist())
        assert drawn.total() == len(labels) == sum(order.batch_sizes)
        of_class = {
            label: [drawn[example] for example, own in enumerate(labels) if own == label]
            for label in COUNTS[name]
        }
        totals = [sum(times) for times in of_class.values()]
        assert max(totals) - min(totals) <= 1
        assert all(max(times) - min(times) <= 1 for times in of_class.values())


def test_the_remainder_and_what_is_left_out_of_a_large_class_change_with_the_epoch() -> None:
    order, labels = order_of("rare"), labels_of("rare")  # 21 examples: 7 of each class
    left_out = [set(range(21)) - set(order.permutation(epoch).tolist()) for epoch in range(20)]
    assert all(len(out) == 6 and {labels[example] for example in out} == {0} for out in left_out)
    assert not set.intersection(*left_out), "every example is trained on, sooner or later"
    missing = order_of("a class missing", seed=1)
    assert missing.permutation(0).tolist() != missing.permutation(1).tolist()
    uneven = torch.tensor([0] * 5 + [1] * 2)  # 7 draws of 2 classes: 4 and 3
    generator = torch.Generator().manual_seed(0)
    most = {int(torch.bincount(uneven[balanced(uneven, generator)]).argmax()) for _ in range(20)}
    assert most == {0, 1}


def test_the_order_is_one_of_seed_and_epoch_and_its_digest_tells_it_from_another() -> None:
    order = order_of("rare")
    torch.manual_seed(0)
    assert torch.equal(order.permutation(2), order_of("rare").permutation(2))
    digests = {
        order.digest(0),
        order.digest(1),
        order_of("rare", seed=4).digest(0),
        EpochOrder(examples=21, batch_size=4, seed=3).digest(0),
        EpochOrder(examples=21, batch_size=4, seed=3, labels=labels_of("rare")[::-1]).digest(0),
    }
    assert len(digests) == 5


def test_repeats_are_counted_in_their_order() -> None:
    draws = torch.tensor([4, 1, 4, 4, 0, 1, 2])
    assert repeated(draws).tolist() == [0, 0, 1, 2, 0, 1, 0]
    assert repeated(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_ranks_shares_are_the_global_batch_with_its_repeats_from_any_step_on(world_size: int) -> None:
    order = order_of("rare", batch_size=5)
    ranks = [
        list(DistributedBatchSampler(order, epochs=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for epoch in range(2):
        shares = [[share for share in rank if share and share[0].epoch == epoch] for rank in ranks]
        draws = [draw for rank in shares for share in rank for draw in share]
        assert Counter(draw.example for draw in draws) == Counter(order.permutation(epoch).tolist())
        assert len(set(draws)) == 21, "no two draws are the same"
        for example, times in Counter(draw.example for draw in draws).items():
            assert sorted(draw.repeat for draw in draws if draw.example == example) == list(range(times))
    for step, parts in enumerate(zip(*ranks, strict=True)):
        drawn = [draw.example for part in parts for draw in part]
        assert sorted(drawn) == sorted(order.batch(*divmod(step, order.steps_per_epoch)))
    for rank, whole in enumerate(ranks):
        for start in range(len(whole) + 1):
            rest = DistributedBatchSampler(
                order, epochs=2, start_step=start, rank=rank, world_size=world_size
            )
            assert list(rest) == whole[start:]


def test_an_example_that_comes_again_comes_in_another_crop_and_the_first_as_ever(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"train": {"a": 1}})
    small = Preprocessing(
        image_size=16, resize_size=18, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )  # fmt: skip
    paths = [(str(root / "train" / "a" / "000.png"), 0)]
    images = ImageDataset(paths, train_transform(small, "recipe", (0.08, 1.0)), seed=5)
    crops = [images[SampleKey(0, 0, repeat)][0] for repeat in range(4)]
    assert len({crop.tobytes() for crop in crops}) == 4
    assert np.array_equal(crops[0], images[SampleKey(0, 0)][0])
    assert all(np.array_equal(images[SampleKey(0, 0, repeat)][0], crop) for repeat, crop in enumerate(crops))

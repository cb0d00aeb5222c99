from collections import Counter

import pytest
import torch

from trainer.data.balance import balanced, repeated
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler

COUNTS = {"rare": {0: 13, 1: 2, 2: 6}, "a class missing": {0: 5, 3: 1}, "one class": {1: 4}, "even": {0: 3, 1: 3}}


def labels_of(name: str) -> tuple[int, ...]:
    """Return shuffled labels."""
    labels = torch.tensor([label for label, count in COUNTS[name].items() for _ in range(count)])
    return tuple(labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))].tolist())


def balanced_order(name: str, *, batch_size: int = 4, seed: int = 3) -> EpochOrder:
    labels = labels_of(name)
    return EpochOrder(examples=len(labels), batch_size=batch_size, seed=seed, labels=labels)


@pytest.mark.parametrize("count", [1, 11, 12])
def test_epoch_is_a_permutation_in_batches(count: int) -> None:
    order = EpochOrder(examples=count, batch_size=4, seed=3)
    for epoch in range(3):
        batches = [order.batch(epoch, step) for step in range(order.steps_per_epoch)]
        examples = [example for batch in batches for example in batch]
        assert examples == order.permutation(epoch).tolist()
        assert sorted(examples) == list(range(count))
        assert order.batch_sizes == tuple(map(len, batches))
    assert order.steps_per_epoch == len(order.batch_sizes) == -(-count // 4)


@pytest.mark.parametrize("balance", [False, True])
def test_order_and_digest_depend_on_seed_epoch_and_labels_only(balance: bool) -> None:
    labels = labels_of("rare")

    def order(seed: int, labels: tuple[int, ...] | None) -> EpochOrder:
        return EpochOrder(examples=21, batch_size=4, seed=seed, labels=labels)

    orders = [(order(seed, labels if balance else None), epoch) for seed in (3, 4) for epoch in (0, 1)]
    first = orders[0][0].permutation(0)
    torch.manual_seed(0)
    assert torch.equal(first, orders[0][0].permutation(0))
    assert len({tuple(order.permutation(epoch).tolist()) for order, epoch in orders}) == 4
    assert len({order.digest(epoch) for order, epoch in orders}) == 4
    assert len({order(3, other).digest(0) for other in (None, labels, labels[::-1])}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("order", [
    *(EpochOrder(examples=count, batch_size=4, seed=3) for count in (1, 11, 12)), balanced_order("rare", batch_size=5),
])  # fmt: skip
def test_local_batches_of_the_ranks_are_the_global_batch(order: EpochOrder, world_size: int) -> None:
    epochs = 2
    ranks = [
        list(DistributedBatchSampler(order, epochs=epochs, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {order.steps_per_epoch * epochs}
    for number, batches in enumerate(zip(*ranks, strict=True)):
        epoch, step = divmod(number, order.steps_per_epoch)
        keys = [key for batch in batches for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        assert sorted(key.example for key in keys) == sorted(order.batch(epoch, step))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
    for epoch in range(epochs):
        keys = [key for rank in ranks for batch in rank for key in batch if key.epoch == epoch]
        assert len(set(keys)) == order.examples, "no key occurs twice"
        for example, times in Counter(key.example for key in keys).items():
            repeats = sorted(key.repeat for key in keys if key.example == example)
            assert repeats == list(range(times))
    for rank, whole in enumerate(ranks):
        for start in range(len(whole) + 1):
            rest = DistributedBatchSampler(order, epochs=epochs, start_step=start, rank=rank, world_size=world_size)
            assert list(rest) == whole[start:]
            assert len(rest) == len(whole) - start


@pytest.mark.parametrize("start_step", [0, 7])
@pytest.mark.parametrize("world_size", [1, 3])
def test_epochs_take_fixed_views_in_turn(start_step: int, world_size: int) -> None:
    order = balanced_order("rare")
    options = {"epochs": 5, "start_step": start_step, "world_size": world_size}
    for rank in range(world_size):
        drawn, fixed = (
            DistributedBatchSampler(order, rank=rank, views=views, **options) for views in (None, 2)
        )  # fmt: skip
        for batch, of_views in zip(drawn, fixed, strict=True):
            assert of_views == [(key.epoch % 2, key.example, 0) for key in batch]


@pytest.mark.parametrize(("count", "world_size"), [(1, 3), (11, 1), (11, 2), (12, 5)])
def test_evaluation_has_every_example_once(count: int, world_size: int) -> None:
    ranks = [EvalBatchSampler(count, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    keys = [key for rank in ranks for batch in rank for key in batch]
    assert sorted(key.example for key in keys) == list(range(count))
    assert {key.epoch for key in keys} == {0}
    for rank in ranks:
        assert len(list(rank)) == len(rank)
        assert all(1 <= len(batch) <= 2 for batch in rank)


# Balanced sampling


@pytest.mark.parametrize("name", COUNTS)
def test_balanced_epoch_has_equal_counts_of_classes_and_of_examples_within_a_class(name: str) -> None:
    order, labels = balanced_order(name), labels_of(name)
    for epoch in range(5):
        counts = Counter(order.permutation(epoch).tolist())
        assert counts.total() == len(labels) == sum(order.batch_sizes)
        by_class = [[counts[i] for i, other in enumerate(labels) if other == label] for label in COUNTS[name]]
        totals = [sum(of_class) for of_class in by_class]
        assert max(totals) - min(totals) <= 1
        assert all(max(of_class) - min(of_class) <= 1 for of_class in by_class)


def test_balanced_epochs_differ_in_the_examples_that_they_leave_out() -> None:
    order, labels = balanced_order("rare"), labels_of("rare")  # 21 examples: 7 of each class
    left_out = [set(range(21)) - set(order.permutation(epoch).tolist()) for epoch in range(20)]
    assert all(len(out) == 6 and {labels[example] for example in out} == {0} for out in left_out)
    assert not set.intersection(*left_out), "every example is trained on in some epoch"
    uneven = torch.tensor([0] * 5 + [1] * 2)  # 7 samples of 2 classes: 4 and 3
    generator = torch.Generator().manual_seed(0)
    larger = {int(torch.bincount(uneven[balanced(uneven, generator)]).argmax()) for _ in range(20)}
    assert larger == {0, 1}


def test_repeats_are_counted_in_order() -> None:
    assert repeated(torch.tensor([4, 1, 4, 4, 0, 1, 2])).tolist() == [0, 0, 1, 2, 0, 1, 0]
    assert repeated(torch.tensor([], dtype=torch.int64)).tolist() == []

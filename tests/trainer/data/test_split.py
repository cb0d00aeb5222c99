import random

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from trainer.data.split import _shuffle, grouped_split, split_counts, stratified_split


def images(counts: dict[str, int]) -> dict[str, list[str]]:
    return {name: [f"root/{name}/{i:04}.jpg" for i in range(count)] for name, count in counts.items()}


def test_every_image_is_in_exactly_one_split() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        counts = {f"c{c}": rng.choice([1, 2, 3, 10, 57]) for c in range(rng.randint(1, 30))}
        fraction = rng.choice([0.01, 0.1, 0.2, 1 / 3, 0.5, 0.99])
        given = images(counts)
        left, cut = stratified_split(given, fraction, seed=rng.randrange(2**63), purpose="test")
        for name, paths in given.items():
            assert sorted(left[name] + cut[name]) == paths
            assert left[name], (name, counts)
            assert left[name] == sorted(left[name])
            assert cut[name] == sorted(cut[name])
            # differs from the exact quota by at most one image
            assert abs(len(cut[name]) - fraction * counts[name]) <= 1


@pytest.mark.parametrize(
    ("counts", "fraction", "cut"),
    [
        ({"a": 10, "b": 40}, 0.2, 10),
        ({f"c{i}": 7 for i in range(1000)}, 0.2, 1400),  # 1.4 each: rounding each class would give 1000
        ({f"c{i}": 4 for i in range(5)}, 0.2, 5),  # 0.8 each: every class holds out one
        ({"a": 4, "b": 4}, 0.01, 1),  # at least one image
        ({"a": 1, "b": 1}, 0.5, 0),  # except the last image of a class
    ],
)
def test_total_is_the_fraction_of_all_images(counts: dict[str, int], fraction: float, cut: int) -> None:
    assert sum(split_counts(counts, fraction, seed=0).values()) == cut


def test_split_depends_on_seed_class_and_purpose_but_not_on_other_classes() -> None:
    given = images({"a": 50, "b": 50})

    def cut(name: str = "a", *, classes: str = "ab", **changed: object) -> list[str]:
        arguments: dict = {"seed": 0, "purpose": "test", **changed}
        _, held_out = stratified_split({name: given[name] for name in classes}, 0.2, **arguments)
        return [path[-8:] for path in held_out[name]]

    assert cut() == cut() == cut(classes="a")
    assert cut() not in (cut(seed=1), cut(purpose="val"), cut("b"))
    # Ties between classes are broken by the seed, and not by the order of the classes.
    counts = {f"c{i}": 3 for i in range(20)}
    held_out = [split_counts(counts, 0.1, seed=seed) for seed in range(3)]
    assert held_out[0] != held_out[1] != held_out[2]
    assert split_counts(dict(reversed(counts.items())), 0.1, seed=0) == held_out[0]


def test_split_does_not_change_between_versions() -> None:
    """A resumed run needs the same split."""
    _, cut = stratified_split(images({"a": 20}), 0.2, seed=3, purpose="test")
    assert [path[-8:-4] for path in cut["a"]] == ["0000", "0003", "0004", "0017"]


def test_groups_are_divided_as_evenly_as_by_scikit_learn() -> None:
    ours, theirs = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        members = rng.choice([1, 2, 5, 10, 20], 60)
        group = np.repeat(np.arange(60), members)
        label = rng.integers(0, 4, 60)[group] if seed % 2 else rng.integers(0, 4, len(group))
        given = {f"c{c}": [f"c{c}/{i}" for i in np.flatnonzero(label == c)] for c in range(4)}
        groups = {path: f"g{group[int(path[3:])]}" for paths in given.values() for path in paths}
        left, cut = grouped_split(given, groups, 0.2, seed=seed, purpose="test")
        assert {groups[p] for paths in left.values() for p in paths}.isdisjoint(
            groups[p] for paths in cut.values() for p in paths
        )
        assert all(sorted(left[name] + cut[name]) == sorted(paths) and left[name] for name, paths in given.items())
        ours.append(max(abs(len(cut[name]) / len(paths) - 0.2) for name, paths in given.items()))
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(label, label, group)
        _, held_out = next(folds)
        theirs.append(max(abs((label[held_out] == c).sum() / (label == c).sum() - 0.2) for c in range(4)))
    assert np.mean(ours) <= np.mean(theirs)


def test_groups_of_one_image_are_held_out_in_the_requested_fraction() -> None:
    given = images({"a": 50, "b": 10})
    _, cut = grouped_split(given, {given["a"][0]: "x", given["b"][0]: "x"}, 0.2, seed=0, purpose="val")
    assert (len(cut["a"]), len(cut["b"])) == (10, 2)


@pytest.mark.parametrize(
    ("groups", "held_out"),
    [
        ({"a": ["x"] * 6, "b": ["y"] * 6}, 0),  # a class keeps its last group
        ({"a": ["x"] * 6 + ["y"] * 6, "b": ["z", "w"] * 6}, 2),  # each class holds out one, although half is much
    ],
)
def test_large_groups(groups: dict[str, list[str]], held_out: int) -> None:
    given = images({name: len(names) for name, names in groups.items()})
    of = {path: group for name, paths in given.items() for path, group in zip(paths, groups[name], strict=True)}
    left, cut = grouped_split(given, of, 0.2, seed=0, purpose="test")
    assert all(left.values())
    assert len({of[path] for paths in cut.values() for path in paths}) == held_out


def test_shuffle_is_that_of_the_standard_library() -> None:
    for count in (0, 1, 2, 3, 17, 1000):
        positions, expected = [*range(count)], [*range(count)]
        _shuffle(positions, count)
        random.Random(count).shuffle(expected)
        assert positions == expected

import random

import pytest

from trainer.data.split import shares, stratified_split


def images(counts: dict[str, int]) -> dict[str, list[str]]:
    return {name: [f"root/{name}/{i:04}.jpg" for i in range(count)] for name, count in counts.items()}


def test_every_image_is_in_one_part_whatever_the_counts() -> None:
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
            # within one image of the class's own share, or kept back as its last
            assert abs(len(cut[name]) - fraction * counts[name]) <= 1


@pytest.mark.parametrize(
    ("counts", "fraction", "cut"),
    [
        ({"a": 10, "b": 40}, 0.2, 10),
        ({f"c{i}": 7 for i in range(1000)}, 0.2, 1400),  # 1.4 each: rounded by class it would be 1000
        ({f"c{i}": 3 for i in range(1000)}, 0.1, 300),
        ({f"c{i}": 4 for i in range(5)}, 0.2, 5),  # 0.8 each: every class gives one
        ({"a": 100}, 0.29, 29),
        ({"a": 4, "b": 4}, 0.01, 1),  # never none at all
        ({"a": 1, "b": 1}, 0.5, 0),  # but for the last image of a class
    ],
)
def test_the_parts_add_up_to_the_fraction(counts: dict[str, int], fraction: float, cut: int) -> None:
    assert sum(shares(counts, fraction, seed=0).values()) == cut


def test_the_classes_that_give_one_more_depend_on_the_seed() -> None:
    counts = {f"c{i}": 3 for i in range(20)}
    given = [shares(counts, 0.1, seed=seed) for seed in range(3)]
    assert given[0] != given[1] != given[2]
    assert shares(dict(reversed(counts.items())), 0.1, seed=0) == given[0]


def test_a_split_depends_on_seed_class_and_purpose_and_not_on_other_classes() -> None:
    given = images({"a": 50, "b": 50})

    def cut(**arguments: object) -> list[str]:
        return stratified_split(given, 0.2, **{"seed": 0, "purpose": "test", **arguments})[1]["a"]  # type: ignore[arg-type]

    assert cut() == cut()
    assert cut() != cut(seed=1)
    assert cut() != cut(purpose="val")
    assert cut() == stratified_split(images({"a": 50}), 0.2, seed=0, purpose="test")[1]["a"]
    numbers = [path[-8:] for path in stratified_split(given, 0.2, seed=0, purpose="test")[1]["b"]]
    assert numbers != [path[-8:] for path in cut()]


def test_a_split_is_the_same_next_year() -> None:
    """Pinned: a run that is gone on with has to find its split again."""
    _, cut = stratified_split(images({"a": 20}), 0.2, seed=3, purpose="test")
    assert [path[-8:-4] for path in cut["a"]] == ["0000", "0003", "0004", "0017"]

import random

import pytest

from trainer.data.split import split_counts, stratified_split


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

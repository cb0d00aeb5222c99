import pytest
from torchvision.models import ResNet18_Weights

from trainer.model.class_names import match_classes, normalize_name, singular_forms

IMAGENET = ResNet18_Weights.DEFAULT.meta["categories"]


def match(target: str, sources: list[str], **aliases: str) -> tuple[str, str] | None:
    """Return (source class, kind of the match) of a target class."""
    matched = match_classes([target], sources, aliases).matched
    return (sources[matched[0].source], matched[0].kind) if matched else None


MATCHES = {
    "ant": ("ant", "name"),
    "ants": ("ant", "plural"),
    "Bees": ("bee", "plural"),
    "hot_dog": ("hotdog", "spelling"),
    "Hot Dogs": ("hotdog", "plural"),
    "puppies": ("puppy", "plural"),
    "vases": ("vase", "plural"),
    "fox": ("foxes", "plural"),  # the source's name may be the plural
    "school buses": ("school bus", "plural"),
}


@pytest.mark.parametrize("target", MATCHES)
def test_a_class_of_the_same_name_matches(target: str) -> None:
    assert match(target, ["something", MATCHES[target][0], "else"]) == MATCHES[target]


def test_a_part_of_a_name_does_not_match() -> None:
    pairs = {"not-hotdog": "hotdog", "cat": "tabby cat", "ant": "elephant", "princess": "princes", "": "x", "__": ""}
    for target, source in pairs.items():
        assert match(target, [source]) is None
        assert match(source, [target]) is None


def test_imagenet_classes_match_and_ambiguous_ones_do_not() -> None:
    matches = match_classes(["hotdog", "not-hotdog", "ants", "bees", "cranes"], [*IMAGENET, "Crane"])
    assert [(m.target, m.source) for m in matches.matched] == [(0, 934), (2, 310), (3, 309)]
    assert matches.ambiguous == ((4, (517, 1000)),)


def test_the_same_name_has_priority_over_an_alias_and_that_over_a_spelling() -> None:
    assert match("bug", ["bug", "ant"], bug="ant") == ("bug", "name")
    assert match("Bug", ["bug", "ant"], Bug="ant") == ("ant", "alias")
    assert match("Bug", ["bug", "ant"], Bug="nothing") == ("bug", "spelling")


def test_a_name_is_one_of_its_singular_forms() -> None:
    assert all(normalize_name(name) in singular_forms(name) for name in IMAGENET)

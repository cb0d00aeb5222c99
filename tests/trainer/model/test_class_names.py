import pytest
from torchvision.models import ResNet18_Weights

from trainer.model.class_names import match_labels, singular, torchvision_labels

IMAGENET = torchvision_labels(ResNet18_Weights.DEFAULT)


def matched(target: str, sources: list[str], **aliases: str) -> tuple[str, str] | None:
    found = match_labels([target], sources, aliases).found
    return (sources[found[0].source], found[0].how) if found else None


@pytest.mark.parametrize(
    ("target", "source", "how"),
    [
        ("ant", "ant", "name"),
        ("ants", "ant", "plural"),
        ("Bees", "bee", "plural"),
        ("hot_dog", "hotdog", "spelling"),
        ("Hot Dogs", "hotdog", "plural"),
        ("golden_retriever", "golden retriever", "spelling"),
        ("mice", "mouse", "plural"),
        ("puppies", "puppy", "plural"),
        ("cookies", "cookie", "plural"),
        ("buses", "bus", "plural"),
        ("vases", "vase", "plural"),
        ("fox", "foxes", "plural"),  # the source's may be the plural
        ("school buses", "school bus", "plural"),
    ],
)
def test_a_class_of_the_same_name_is_found(target: str, source: str, how: str) -> None:
    assert matched(target, ["something", source, "else"]) == (source, how)


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("not-hotdog", "hotdog"),
        ("hotdog stand", "hotdog"),
        ("cat", "tabby cat"),
        ("ant", "elephant"),
        ("glass", "glas"),
        ("bus", "bu"),
        ("", "x"),
        ("__", "x"),
    ],
)
def test_a_part_of_a_name_is_no_match(target: str, source: str) -> None:
    assert matched(target, [source]) is None
    assert matched(source, [target]) is None


def test_imagenets_rows_are_found_and_a_name_that_two_have_left_alone() -> None:
    matches = match_labels(["hotdog", "not-hotdog", "ants", "bees", "cranes"], [*IMAGENET, "Crane"])
    assert [(m.target, m.source) for m in matches.found] == [(0, 934), (2, 310), (3, 309)]
    ((target, sources),) = matches.ambiguous
    assert target == 4
    assert sources == (517, 1000)


def test_the_same_name_goes_before_an_alias_and_that_before_a_spelling() -> None:
    assert matched("bug", ["bug", "ant"], bug="ant") == ("bug", "name")
    assert matched("Bug", ["bug", "ant"], Bug="ant") == ("ant", "alias")
    assert matched("Bug", ["bug", "ant"], Bug="nothing") == ("bug", "spelling")


def test_a_name_is_among_its_singulars() -> None:
    for name in IMAGENET:
        assert name.casefold().replace(" ", "").replace("-", "") in singular(name)

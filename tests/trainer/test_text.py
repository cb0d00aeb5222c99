import os

from trainer.text import escape_unprintable, join_truncated


def test_invalid_utf8_line_ends_and_control_characters_are_escaped_and_nothing_else() -> None:
    for name in ("a b.jpg", "猫/照片.jpg", "café"):
        assert escape_unprintable(name) == name
    assert escape_unprintable(os.fsdecode(b"caf\xe9\xff.jpg")) == r"caf\xe9\xff.jpg"
    assert escape_unprintable("a\nb\t\x1b[31mred\u202e") == r"a\nb\t\x1b[31mred\u202e"
    escape_unprintable(os.fsdecode(bytes(range(1, 256)))).encode("utf-8")


def test_a_long_list_is_truncated_and_the_rest_counted() -> None:
    assert join_truncated(["a", "b"]) == "a, b"
    assert join_truncated((str(i) for i in range(12)), limit=3) == "0, 1, 2 and 9 more"
    assert join_truncated([]) == ""

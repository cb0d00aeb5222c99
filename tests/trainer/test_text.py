import os

from trainer.text import escape_unprintable, first_line, join_truncated, list_lines, shorten


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
    assert list_lines(["a", "b"]) == "\n  a\n  b"
    assert list_lines(["a", "b", "c"], limit=1) == "\n  a\n  and 2 more"
    assert shorten("a\nb") == r"a\nb"
    assert shorten("x" * 300, limit=4) == "xxx…"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\x1b \ntwo")) == r"one\x1b "
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 9999))) == 300

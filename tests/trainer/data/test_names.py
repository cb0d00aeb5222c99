import os

from trainer.data.names import listed, printable


def test_printable_text_is_unchanged() -> None:
    for name in ("a b.jpg", "猫/照片.jpg", "café"):
        assert printable(name) == name


def test_bytes_line_ends_and_control_characters_are_escaped() -> None:
    assert printable(os.fsdecode(b"caf\xe9\xff.jpg")) == r"caf\xe9\xff.jpg"
    assert printable("a\nb\t\x1b[31mred\u202e") == r"a\nb\t\x1b[31mred\u202e"
    printable(os.fsdecode(bytes(range(1, 256)))).encode("utf-8")


def test_long_list_is_truncated_and_counted() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed((str(i) for i in range(12)), limit=3) == "0, 1, 2 and 9 more"
    assert listed([]) == ""

"""Find class names that a person reads as equal: one class would silently become two."""

import re
import unicodedata
from collections.abc import Iterable

# Cyrillic and Greek letters, hyphens and quotes, and the characters that look the same.
_SAME_GLYPHS = str.maketrans(
    "аеорсухіјѕАВЕКМНОРСТХІЈЅοΑΒΕΖΗΙΚΜΝΟΡΤΥΧ\u2010\u2011\u2212\u2018\u2019",
    "aeopcyxijsABEKMHOPCTXIJSoABEZHIKMNOPTYX---''",
)


_SEPARATORS = re.compile(r"(?<=[^\W_])[ _-]+(?=[^\W_])")
_WHOLE_NUMBER = re.compile(r"(?P<sign>-?)(?:0*(?P<digits>[1-9]\d*)|(?P<zero>0))(?:\.0+)?", re.ASCII)


def find_lookalikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two different names that look the same, or None.

    Names that differ only in upper and lower case count as equal, except those of a single letter: the classes of
    handwritten letters differ in case. So do `hot dog`, `hot_dog` and `hot-dog`, and the numbers `1`, `01` and `1.0`.
    """
    by_appearance: dict[str, str] = {}
    for name in sorted(names):
        other = by_appearance.setdefault(_appearance(name), name)
        if other != name:
            return other, name
    return None


def describe_difference(one: str, other: str) -> str:
    """Return what two names that look the same differ in, for a message; the names are shown with escapes."""
    if re.sub(" +", " ", one).strip() == re.sub(" +", " ", other).strip():
        reason = "spaces"
    elif unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        reason = "the Unicode encoding of accents (NFC or NFD)"
    elif one.lower() == other.lower():
        reason = "upper and lower case"
    elif _visible(one) == _visible(other):
        reason = "invisible characters"
    elif _WHOLE_NUMBER.fullmatch(one) and _WHOLE_NUMBER.fullmatch(other):
        reason = "how the number is written"
    elif _SEPARATORS.sub(" ", one) == _SEPARATORS.sub(" ", other):
        reason = "spaces, hyphens and underscores"
    else:
        reason = "spaces, case or characters that look the same"
    return f"{one!a} and {other!a} differ only in {reason}"


def _appearance(name: str) -> str:
    shown = "".join(map(_plain, _visible(name))).translate(_SAME_GLYPHS)
    if number := _WHOLE_NUMBER.fullmatch(shown):
        return number["sign"] + (number["digits"] or "0")
    return shown if len(shown) == 1 else unicodedata.normalize("NFC", _SEPARATORS.sub(" ", shown.lower()))


def _plain(character: str) -> str:
    """Return the plain letters or digit for a full-width one or a ligature."""
    is_letter = unicodedata.category(character) in {"Ll", "Lu", "Lo", "Nd"}
    return unicodedata.normalize("NFKC", character) if is_letter and not character.isascii() else character


def _visible(name: str) -> str:
    """Return the name in NFC without invisible characters, and with one plain space for each run of spaces."""
    composed = unicodedata.normalize("NFC", name)
    shown = (c for c in composed if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return re.sub(r"\s+", " ", "".join(shown)).strip()

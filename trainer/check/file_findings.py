"""Findings about the files of a dataset: unreadable, wrongly named, of one color, of other formats by class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from trainer.check.findings import Finding, LabeledImage
from trainer.check.images import ImageFacts, ImageTable
from trainer.text import escape_unprintable

_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc"),
    "TGA": (".tga",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
"""Format by Pillow's name -> usual file extensions."""
_MIN_IMAGES, _MIN_SHARE = 10, 0.9
"""Number of training images of a class, and share of its main format, from which on formats are compared."""


def describe_files(images: Sequence[LabeledImage], table: ImageTable) -> Iterator[Finding]:
    """Yield findings about files: unreadable, with a wrong extension, of one color, or in other formats by class."""
    named = [(image.path, facts) for image, facts in zip(images, table.facts, strict=True)]
    unreadable = [(path, facts.reason) for path, facts in named if facts.reason is not None]
    if unreadable:
        shown = "".join(f"\n  {escape_unprintable(path)}: {reason}" for path, reason in unreadable[:3])
        more = f"\n  and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        yield Finding(
            kind="unreadable",
            severity="error",
            message=f"{len(unreadable)} of {len(images)} images cannot be read:{shown}{more}",
            remedy="Repair, replace or remove them, or train without them:",
            options=("--data.on_unreadable skip",),
            count=len(unreadable),
            paths=tuple(path for path, _ in unreadable),
        )
    wrong = [(path, facts.format) for path, facts in named if _has_wrong_extension(path, facts.format)]
    if wrong:
        shown = " and ".join(f"{escape_unprintable(path)} ({name})" for path, name in wrong[:2])
        yield Finding(
            kind="wrong-extension",
            severity="warning",
            message=f"files with the extension of another format: {len(wrong)}, such as {shown}. regraft reads them by "
            "their content, other programs may not.",
            remedy="Rename them.",
            count=len(wrong),
            paths=tuple(path for path, _ in wrong),
        )
    blank = (table.thumbnails == table.thumbnails[:, :1, :1]).all(axis=(1, 2, 3))
    one_color = [path for (path, facts), is_blank in zip(named, blank, strict=True) if is_blank and not facts.reason]
    if one_color:
        yield Finding(
            kind="one-color",
            severity="warning",
            message=f"images of one color only: {len(one_color)}, such as {escape_unprintable(one_color[0])}.",
            remedy="Remove them, unless the color is the class.",
            count=len(one_color),
            paths=tuple(one_color),
        )
    yield from _describe_formats_by_class(images, table.facts)


def _describe_formats_by_class(images: Sequence[LabeledImage], facts: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Yield a finding if two classes have different formats: a model may learn the traces of compression."""
    formats: dict[str, Counter[str]] = {}
    for image, each in zip(images, facts, strict=True):
        if image.split == "train" and each.format:
            formats.setdefault(image.label, Counter())[each.format] += 1
    main: dict[str, str] = {}
    for label, counts in formats.items():
        name, number = counts.most_common(1)[0]
        if number >= _MIN_SHARE * counts.total() and counts.total() >= _MIN_IMAGES:
            main.setdefault(name, label)
    if len(main) > 1:
        shown = ", ".join(f"{escape_unprintable(label)} is {name}" for name, label in list(main.items())[:2])
        yield Finding(
            kind="format-by-class",
            severity="warning",
            message=f"classes have different file formats ({shown}): a model may learn the traces of compression "
            "instead of the class.",
            remedy="Convert all images to one format, from the originals.",
            count=len(main),
        )


def _has_wrong_extension(path: str, name: str) -> bool:
    """Return whether a file has the usual extension of another format."""
    extension = os.path.splitext(path)[1].lower()  # noqa: PTH122 (faster than a Path for each)
    return name in _EXTENSIONS and extension in _ALL_EXTENSIONS and extension not in _EXTENSIONS[name]


_ALL_EXTENSIONS = frozenset(extension for extensions in _EXTENSIONS.values() for extension in extensions)

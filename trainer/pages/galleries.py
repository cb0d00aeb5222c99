"""The pictures of a report: the most wrong, the least sure and the surest predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.pages.run_files import PredictedImage
from trainer.pages.split_result import Confusion
from trainer.pages.thumbnails import PictureBudget

PICTURE_SIZE = 176
_WRONG, _UNSURE, _SURE, _PER_PAIR = 12, 6, 6, 4


@dataclass(frozen=True)
class Overlay:
    """What the model sees of an image, and where it looks (Grad-CAM), as data URIs."""

    picture: str
    heatmap: str


@dataclass(frozen=True)
class Picture:
    """An image of a gallery."""

    image: PredictedImage
    uri: str | None
    """None if the image cannot be read, or was left out."""
    heatmap: str | None = None
    is_left_out: bool = False
    """Whether the time or the size of the pictures was used up before."""

    @property
    def name(self) -> str:
        """Return the name of the file."""
        return Path(self.image.path).name


@dataclass(frozen=True)
class Gallery:
    """Images with a heading."""

    heading: str
    lead: str
    pictures: Sequence[Picture]


Explain = Callable[[Sequence[PredictedImage]], Mapping[str, Overlay]]
"""Returns path -> overlay of the images that can be read."""


def choose_images(predictions: Sequence[PredictedImage], split: str) -> dict[str, list[PredictedImage]]:
    """Return the images of a split to show: `wrong`, `unsure` and `sure`. An image is in one of them."""
    images = [entry for entry in predictions if entry.split == split]
    wrong = sorted((entry for entry in images if not entry.is_correct), key=lambda entry: entry.label_probability)[
        :_WRONG
    ]
    shown = {entry.path for entry in wrong}
    unsure = sorted((entry for entry in images if entry.path not in shown), key=lambda entry: entry.probability)[
        :_UNSURE
    ]
    shown |= {entry.path for entry in unsure}
    right = [entry for entry in images if entry.is_correct and entry.path not in shown]
    return {"wrong": wrong, "unsure": unsure, "sure": _surest_of_classes(right)}


def _surest_of_classes(images: Sequence[PredictedImage]) -> list[PredictedImage]:
    """Return the surest images, of different classes as far as possible."""
    ordered = sorted(images, key=lambda entry: -entry.probability)
    rank: dict[str, int] = {}
    ranked = []
    for entry in ordered:
        rank[entry.label] = rank.get(entry.label, -1) + 1
        ranked.append((rank[entry.label], entry))
    return [entry for _, entry in sorted(ranked, key=lambda pair: (pair[0], -pair[1].probability))[:_SURE]]


def make_galleries(
    predictions: Sequence[PredictedImage],
    split: str,
    *,
    budget: PictureBudget,
    root: Path | None,
    explain: Explain | None,
) -> list[Gallery]:
    """Return the galleries that have images.

    Args:
        predictions: of all splits.
        split: whose images are shown.
        budget: makes the thumbnails.
        root: folder that relative paths are relative to; None: the working folder.
        explain: makes the overlays; None: the pictures are shown alone.

    """
    chosen = choose_images(predictions, split)
    images = [entry for entries in chosen.values() for entry in entries]
    overlays = explain(images) if explain is not None and images else {}

    def show(entry: PredictedImage) -> Picture:
        overlay = overlays.get(entry.path)
        if overlay is not None:
            return Picture(entry, overlay.picture, overlay.heatmap)
        is_left_out = budget.is_used_up
        return Picture(entry, budget.thumbnail(locate(entry.path, root), PICTURE_SIZE), is_left_out=is_left_out)

    headings = {
        "wrong": (
            "Most wrong",
            "Wrong predictions with the lowest probability of the label. Check these labels first.",
        ),
        "unsure": ("Least sure", "The lowest probability of the predicted class among all others."),
        "sure": ("Surest", "Correct, with the highest probability: what the model takes as typical of a class."),
    }
    return [
        Gallery(*headings[name], [show(entry) for entry in entries]) for name, entries in chosen.items() if entries
    ]  # fmt: skip


def describe_missing(galleries: Sequence[Gallery], root: Path | None) -> str:
    """Return a sentence if no picture can be read because the dataset has moved; empty otherwise."""
    pictures = [picture for gallery in galleries for picture in gallery.pictures]
    if not pictures or any(picture.uri is not None for picture in pictures):
        return ""
    first = locate(pictures[0].image.path, root)
    if first.exists():
        return ""
    return f"None of the pictures is there: {first} is missing. If the dataset has moved, put a link in its old place."


def pair_thumbnails(
    predictions: Sequence[PredictedImage], split: str, pair: Confusion, *, budget: PictureBudget, root: Path | None
) -> list[Picture]:
    """Return a few small pictures of a confused pair, the surest mistakes first."""
    entries = [
        entry
        for entry in predictions
        if (entry.split, entry.label, entry.prediction) == (split, pair.label, pair.predicted)
    ]
    entries = sorted(entries, key=lambda entry: -entry.probability)[:_PER_PAIR]
    made = [Picture(entry, budget.thumbnail(locate(entry.path, root), 96)) for entry in entries]
    return [picture for picture in made if picture.uri is not None]


def locate(path: str, root: Path | None) -> Path:
    """Return where an image is; `root` is the working folder of the run."""
    return Path(path) if root is None or Path(path).is_absolute() else root / path

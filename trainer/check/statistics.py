"""Statistics of the images of a dataset, and findings about sizes, classes and splits."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.check.findings import Finding, LabeledImage
from trainer.check.images import ImageFacts, ImageTable
from trainer.config.sections.data import DataConfig
from trainer.text import escape_unprintable, join_truncated

SHORTER_SIDES = (0, 32, 64, 128, 224, 384, 512, 768, 1024, 2048, 4096)
"""Lower bounds of the histogram of the shorter side [pixels]."""
ASPECT_RATIOS = (1.0, 1.2, 1.4, 1.6, 2.0, 3.0)
"""Lower bounds of the histogram of the longer side divided by the shorter one."""
_IMAGE_SIZE, _RESIZE_SIZE = 224, 256  # of most pretrained weights
_MAX_ASPECT_RATIO = 2.0
_MAX_IMBALANCE = 10
_MIN_TRAINING_IMAGES = 10
_MAX_HALF_WIDTH = 0.05
_LARGE_PIXELS = 2_000_000


def count_images(images: Sequence[LabeledImage]) -> dict[str, dict[str, int]]:
    """Return split -> class -> number of images, for the splits that have images."""
    counts: dict[str, dict[str, int]] = {}
    for image in images:
        classes = counts.setdefault(image.split, {})
        classes[image.label] = classes.get(image.label, 0) + 1
    return counts


def summarize(table: ImageTable) -> dict[str, Any]:
    """Return statistics of the readable images as JSON types."""
    facts = [each for each in table.facts if each.reason is None]
    width = np.array([each.width for each in facts], dtype=np.int64)
    height = np.array([each.height for each in facts], dtype=np.int64)
    shorter = np.minimum(width, height)
    ratios = np.maximum(width, height) / np.maximum(shorter, 1)
    return {
        "readable": len(facts),
        "bytes": sum(each.num_bytes for each in facts),
        "formats": _largest_first(Counter(each.format for each in facts)),
        "modes": _largest_first(Counter(each.mode for each in facts)),
        "width": _describe_values(width),
        "height": _describe_values(height),
        "megapixels": _describe_values(width * height / 1e6),
        "aspect_ratio": _describe_values(ratios),
        "shorter_side_histogram": _histogram(shorter, SHORTER_SIDES),
        "aspect_ratio_histogram": _histogram(ratios, ASPECT_RATIOS),
    }


def describe_sizes(images: Sequence[LabeledImage], facts: Sequence[ImageFacts], data: DataConfig) -> Iterator[Finding]:
    """Yield findings about images that are enlarged, cut badly by the central crop, or slow to decode."""
    sides = [
        (image.path, min(each.width, each.height), max(each.width, each.height))
        for image, each in zip(images, facts, strict=True)
        if each.reason is None
    ]
    size = data.image_size or _IMAGE_SIZE
    small = [path for path, shorter, _ in sides if shorter < size]
    if small:
        yield Finding(
            kind="small",
            severity="note",
            message=f"images with a side below {size} pixels, which are enlarged: {len(small)} of {len(sides)}.",
            remedy="If most are small, a smaller data.image_size trains faster.",
            count=len(small),
            paths=tuple(small),
        )
    long = [(path, longer / shorter) for path, shorter, longer in sides if longer >= _MAX_ASPECT_RATIO * shorter]
    if long:
        long.sort(key=lambda item: -item[1])
        yield _describe_crop(long, len(sides), data)
    large = [path for path, shorter, longer in sides if shorter * longer > _LARGE_PIXELS]
    if 2 * len(large) > len(sides):
        yield Finding(
            kind="large",
            severity="note",
            message=f"images of more than {_LARGE_PIXELS // 1_000_000} megapixels: {len(large)} of {len(sides)}, so "
            "most of an epoch is decoding.",
            remedy="Smaller files make it faster, or a cache of reduced images:",
            options=(f"--data.cache_resize {2 * size}",),
            count=len(large),
        )


def describe_classes(counts: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Yield findings about the number of images of classes and splits (split -> class -> images)."""
    train = counts.get("train", {})
    if train:
        largest, smallest = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        ratio = train[largest] / train[smallest]
        if ratio >= _MAX_IMBALANCE:
            yield Finding(
                kind="imbalance",
                severity="warning",
                message=f"the class {escape_unprintable(largest)} has {train[largest]} training images, "
                f"{escape_unprintable(smallest)} has {train[smallest]}: {ratio:.0f} times fewer.",
                remedy="Compare the metrics of each class, and show each class equally often:",
                options=("--data.sampling balanced",),
                count=sum(train[largest] >= _MAX_IMBALANCE * number for number in train.values()),
            )
        few = [name for name, number in train.items() if number < _MIN_TRAINING_IMAGES]
        if few:
            yield Finding(
                kind="few-images",
                severity="warning",
                message=f"{len(few)} of {len(train)} classes have fewer than {_MIN_TRAINING_IMAGES} training images: "
                f"{join_truncated(few, limit=5)}.",
                remedy="Collect more images of them, or merge them with similar classes.",
                count=len(few),
            )
    total = sum(counts.get("test", {}).values())
    if total and (half_width := 1.96 * math.sqrt(0.8 * 0.2 / total)) > _MAX_HALF_WIDTH:
        yield Finding(
            kind="small-test",
            severity="note",
            message=f"the test split has {total} images, so an accuracy of 80 % has a 95 % interval of "
            f"{100 * half_width:.0f} points up and down. Smaller differences between models mean nothing.",
            remedy="Collect more test images, or compare models over several seeds.",
            count=total,
        )


def _describe_crop(long: Sequence[tuple[str, float]], total: int, data: DataConfig) -> Finding:
    """Return the finding about elongated images (path, ratio of the sides), the longest first."""
    size = data.image_size or _IMAGE_SIZE
    resize = data.resize_size or round(size * _RESIZE_SIZE / _IMAGE_SIZE)
    visible = min(1.0, size / resize) ** 2 / _MAX_ASPECT_RATIO
    ratio = long[0][1]
    what = f"images with one side at least twice as long as the other: {len(long)} of {total}, up to {ratio:.1f} times"
    if data.resize == "shorter":
        effect = f"The central crop of data.resize shorter shows {100 * visible:.0f} % of their area or less"
    else:
        effect = (
            "data.resize squash squeezes them by this factor; the central crop of data.resize shorter would show "
            f"{100 * visible:.0f} % of their area or less"
        )
    return Finding(
        kind="central-crop",
        severity="warning" if len(long) >= 0.01 * total else "note",
        message=f"{what}. {effect}.",
        remedy="Crop them to the object before training.",
        count=len(long),
        paths=tuple(path for path, _ in long),
    )


def _largest_first(counts: Counter[str]) -> dict[str, int]:
    return {name or "unknown": number for name, number in counts.most_common()}


def _describe_values(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    low, middle, high = np.percentile(values, (0, 50, 100)).tolist()
    return {"min": low, "median": middle, "max": high}


def _histogram(values: np.ndarray, bounds: Sequence[float]) -> list[dict[str, float]]:
    """Return the number of values from each lower bound to the next one."""
    counts = np.histogram(values, [*bounds, np.inf])[0].tolist()
    return [{"from": bound, "count": count} for bound, count in zip(bounds, counts, strict=True)]

"""The HTML page of `regraft check`: findings, charts, and pictures of the duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regraft.contract import own_version
from trainer.check.findings import CheckResult, DuplicateGroup, Finding
from trainer.check.page_charts import MAX_CLASSES, SPLIT_TONES, charts, class_bars, describe_images
from trainer.check.terminal import describe_severities, relative_path
from trainer.data.decode import UnreadableImage, decode
from trainer.pages.render import render
from trainer.pages.thumbnails import PictureBudget

_MAX_PICTURE_BYTES, _MAX_ERROR_BYTES, _MAX_EVIDENCE_BYTES = 3_300_000, 800_000, 300_000
_MAX_GROUPS, _MAX_IMAGES, _MAX_ERRORS, _MAX_CUT, _MAX_PATHS, _MAX_EVIDENCE = 60, 6, 48, 12, 20, 4
_KINDS = {"exact": "Equal files", "near": "Near-duplicates"}
_DIMMED = 0.3
HEADINGS = {
    "layout": "Folders and splits",
    "class-names": "Class names that look the same",
    "class-folders": "Classes that differ between the splits",
    "leakage": "Leakage between the splits",
    "shared-evaluation": "Copies in validation and test",
    "conflicting-labels": "Copies with different classes",
    "repeated": "Repeated training images",
    "groups": "Groups of images",
    "label-errors": "Likely label errors",
    "unreadable": "Files that cannot be read",
    "wrong-extension": "Wrong file extensions",
    "one-color": "Images of one color",
    "imbalance": "Unequal numbers of images",
    "few-images": "Classes with few images",
    "format-by-class": "File formats that differ by class",
    "central-crop": "Elongated images",
    "small": "Small images",
    "large": "Large images",
    "small-test": "Few test images",
}
"""Kind of a finding -> heading."""
_SECTIONS = {
    "leakage": "duplicates",
    "shared-evaluation": "duplicates",
    "conflicting-labels": "duplicates",
    "repeated": "duplicates",
    "label-errors": "labels",
    "central-crop": "crop",
}
"""Kind of a finding -> section of the page that shows its pictures."""
_OF_DUPLICATES = frozenset(kind for kind, section in _SECTIONS.items() if section == "duplicates")


@dataclass(frozen=True)
class _Picture:
    uri: str | None
    path: str
    text: str = ""
    note: str = ""
    """What is wrong with this image, after its text."""
    tone: str = ""
    """Severity of the note."""


@dataclass(frozen=True)
class _Group:
    heading: str
    problems: Sequence[str]
    """What is wrong with the group, such as `train and test`."""
    pictures: Sequence[_Picture]
    more: int
    """Number of its other images."""


@dataclass(frozen=True)
class _Problem:
    """A finding as the page shows it."""

    finding: Finding
    heading: str
    section: str | None
    """Section that shows its pictures."""
    pictures: Sequence[_Picture]
    """A few of its images."""
    paths: Sequence[str]
    more: int
    """Number of its other images."""


def render_page(result: CheckResult) -> str:
    """Return the page of a result."""
    budget = PictureBudget(_MAX_PICTURE_BYTES)
    shown = result.duplicates[:_MAX_GROUPS]
    cut = next((finding for finding in result.findings if finding.kind == "central-crop"), None)
    label_errors = _label_errors(result)
    severities = describe_severities(result)
    level, verdict, advice = _verdict(result)
    return render(
        "check.html.jinja",
        result=result,
        name=Path(result.root).name or result.root,
        splits=[(split, _name_split(split, result)) for split in result.counts],
        level=level,
        verdict=verdict,
        advice=advice,
        severities=severities[:1].upper() + severities[1:],
        stats=_stats(result),
        problems=_problems(result),
        facts=describe_images(result.statistics),
        class_bars=class_bars(result),
        more_classes=max(0, len(result.classes) - MAX_CLASSES),
        legend=[(SPLIT_TONES[split], _name_split(split, result)) for split in result.counts],
        charts=[chart for chart in charts(result.statistics) if chart is not None],
        groups=[_describe_group(group, result.root, budget) for group in shown],
        more_groups=len(result.duplicates) - len(shown),
        label_errors=label_errors,
        more_label_errors=max(0, len(result.label_errors) - _MAX_ERRORS),
        cut=_cut_pictures(cut, result.root, budget) if cut else [],
        version=own_version(),
    )


def _verdict(result: CheckResult) -> tuple[str, str, str]:
    """Return the highest severity, whether the data can be trained on, and what to do first."""
    first = f"Begin with the first: {HEADINGS[result.findings[0].kind].lower()}." if result.findings else ""
    if result.has("error"):
        return "error", "Repair the data before you train on it", first
    if result.has("warning"):
        return "warning", "You can train, but look at the warnings first", first
    return "good", "The data is ready to train on", ""


def _stats(result: CheckResult) -> list[tuple[str, str, bool]]:
    """Return label, value and whether it is bad, of the numbers that matter most."""
    counts = {
        kind: sum(finding.count for finding in result.findings if finding.kind == kind)
        for kind in ("leakage", "unreadable", "label-errors")
    }
    copies = sum(len(group.images) - 1 for group in result.duplicates)
    has_model = any(finding.kind == "label-errors" for finding in result.findings)
    return [
        ("Images", f"{result.num_images:,}", False),
        ("Copies of other images", f"{copies:,}", False),
        ("Leaked into val or test", f"{counts['leakage']:,}", counts["leakage"] > 0),
        ("Cannot be read", f"{counts['unreadable']:,}", counts["unreadable"] > 0),
        ("Likely label errors", f"{counts['label-errors']:,}" if has_model else "needs --model", False),
    ]


def _problems(result: CheckResult) -> list[_Problem]:
    budget = PictureBudget(_MAX_EVIDENCE_BYTES)
    problems = []
    for finding in result.findings:
        paths = [relative_path(path, result.root) for path in finding.paths[:_MAX_PATHS]]
        pictures = [
            _Picture(uri, relative_path(path, result.root))
            for path in _evidence(finding, result.duplicates)
            if (uri := budget.thumbnail(path, 96)) is not None
        ]
        problems.append(
            _Problem(
                finding=finding,
                heading=HEADINGS[finding.kind],
                section=_SECTIONS.get(finding.kind) if finding.paths else None,
                pictures=pictures,
                paths=paths,
                more=len(finding.paths) - len(paths),
            )
        )
    return problems


def _evidence(finding: Finding, duplicates: Sequence[DuplicateGroup]) -> list[str]:
    """Return the paths of a few images that show a finding: of duplicates, an image beside its copy."""
    if finding.kind == "unreadable":
        return []
    if finding.kind not in _OF_DUPLICATES:
        return list(finding.paths[:_MAX_EVIDENCE])
    paths: list[str] = []
    for group in duplicates:
        copies = [image.path for image in group.images if image.path in finding.paths[:_MAX_PATHS]]
        if copies and len(paths) < _MAX_EVIDENCE:
            paths += [next(image.path for image in group.images if image.path != copies[-1]), copies[-1]]
    return paths


def _name_split(split: str, result: CheckResult) -> str:
    source = result.sources.get(split, "")
    total = sum(result.counts[split].values())
    return f"{split}{f' ({source})' if source and source != f'{split}/' else ''}: {total:,} images"


def _describe_group(group: DuplicateGroup, root: str, budget: PictureBudget) -> _Group:
    problems = []
    if len(group.splits) > 1:
        problems.append(f"in {' and '.join(split for split in SPLIT_TONES if split in group.splits)}")
    if len(group.labels) > 1:
        problems.append("with different classes")
    pictures = [
        _Picture(budget.thumbnail(image.path, 200), relative_path(image.path, root), f"{image.split}: {image.label}")
        for image in group.images[:_MAX_IMAGES]
    ]
    return _Group(_KINDS[group.kind], problems, pictures, len(group.images) - len(pictures))


def _label_errors(result: CheckResult) -> list[_Picture]:
    """Return pictures of the most likely label errors; their text is the label and the suggested class."""
    budget = PictureBudget(_MAX_ERROR_BYTES)
    return [
        _Picture(
            budget.thumbnail(error.image.path, 200),
            relative_path(error.image.path, result.root),
            f"{error.image.label} → {error.suggested}",
            "" if error.image.split == "train" else f"in {error.image.split}",
            "warning",
        )
        for error in result.label_errors[:_MAX_ERRORS]
    ]


def _cut_pictures(finding: Finding, root: str, budget: PictureBudget) -> list[_Picture]:
    """Return pictures whose parts outside of the central square are dimmed."""
    pictures = []
    for path in finding.paths[:_MAX_CUT]:
        try:
            original = decode(path)
        except UnreadableImage:  # changed since it was checked
            continue
        image = Image.fromarray(original)
        image.thumbnail((320, 320))
        pixels = np.asarray(image)
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        dimmed = (_DIMMED * pixels + (1 - _DIMMED) * 128).astype(np.uint8)
        dimmed[top : top + side, left : left + side] = pixels[top : top + side, left : left + side]
        text = f"{original.shape[1]} x {original.shape[0]} pixels"
        pictures.append(_Picture(budget.thumbnail(dimmed, 320), relative_path(path, root), text))
    return pictures

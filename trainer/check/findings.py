"""What `regraft check` finds in a dataset, and the result that is printed and written as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

FORMAT = 1
"""Increment it when a field of the JSON file changes its meaning."""
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""From the most to the least severe. An error stops training or makes its result wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem of a dataset, or one remark about it."""

    kind: str
    """Identifies the check in the JSON file, such as `unreadable` or `leakage`."""
    severity: Severity
    message: str
    """One or two sentences: what was found, and what follows from it."""
    remedy: str = ""
    """What to do; empty if `message` says it, or if there is nothing to do."""
    options: tuple[str, ...] = ()
    """Options or commands that do it, as typed."""
    count: int = 0
    """Number of images or classes that it is about; 0 for the dataset as a whole."""
    paths: tuple[str, ...] = ()
    """The images, as the dataset lists them."""


class LabeledImage(NamedTuple):
    """An image, its class and its split."""

    path: str
    label: str
    """Name of the class."""
    split: str
    """train, val or test."""


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Images that show the same: copies of one file, or a picture with its re-encoded, cropped or mirrored copies."""

    images: tuple[LabeledImage, ...]
    """Training images first, then those of val and test."""
    digests: tuple[str, ...]
    """SHA-256 of each file, in hexadecimal digits."""

    @property
    def kind(self) -> Literal["exact", "near"]:
        """Return `exact` if all files have the same content."""
        return "exact" if len({*self.digests}) == 1 else "near"

    @property
    def splits(self) -> frozenset[str]:
        """Return the splits that have an image of the group."""
        return frozenset(image.split for image in self.images)

    @property
    def labels(self) -> frozenset[str]:
        """Return the classes of the images."""
        return frozenset(image.label for image in self.images)


class LabelError(NamedTuple):
    """An image that is likely to be of another class than its label says."""

    image: LabeledImage
    suggested: str
    """The class that the model finds more probable."""
    margin: float
    """Probability of the label minus that of the suggested class: the lower, the more likely an error."""


@dataclass(frozen=True, kw_only=True)
class ModelFindings:
    """What a model finds in a dataset."""

    pairs: tuple[tuple[int, int], ...] = ()
    """Positions of two images that show the same."""
    label_errors: tuple[LabelError, ...] = ()
    """The most likely first."""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of `regraft check`."""

    root: str
    """Dataset folder or CSV, as the user named it."""
    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]
    """Split -> class -> number of images."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Split -> where its images come from, such as `val/` or `a split of 20 %`, if its name does not say it."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, formats, modes and aspect ratios of the readable images; see `statistics.summarize`."""
    findings: tuple[Finding, ...] = ()
    """The most severe first."""
    duplicates: tuple[DuplicateGroup, ...] = ()
    """Groups that several splits share first, then the largest."""
    label_errors: tuple[LabelError, ...] = ()
    """The most likely first; empty if the dataset was checked without a model."""

    @property
    def num_images(self) -> int:
        """Return the number of images of all splits, readable or not."""
        return sum(sum(classes.values()) for classes in self.counts.values())

    def has(self, severity: Severity) -> bool:
        """Return whether there is a finding of this severity or a higher one."""
        return any(SEVERITIES.index(each.severity) <= SEVERITIES.index(severity) for each in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON types. Paths that are not UTF-8 have surrogates, which `json.dumps` escapes."""
        return {
            "format": FORMAT,
            "root": self.root,
            "num_images": self.num_images,
            "classes": list(self.classes),
            "counts": {split: dict(classes) for split, classes in self.counts.items()},
            "statistics": dict(self.statistics),
            "findings": [asdict(finding) for finding in self.findings],
            "duplicates": [
                {
                    "kind": group.kind,
                    "images": [
                        image._asdict() | {"sha256": digest}
                        for image, digest in zip(group.images, group.digests, strict=True)
                    ],
                }
                for group in self.duplicates
            ],
            "label_errors": [
                error.image._asdict() | {"suggested": error.suggested, "margin": error.margin}
                for error in self.label_errors
            ],
        }


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings by severity; those of one severity keep their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))

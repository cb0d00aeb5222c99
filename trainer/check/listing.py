"""List the images of a dataset to check, also of one that training refuses."""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH118, PTH206

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.check.findings import Finding, LabeledImage
from trainer.config.sections.data import DataConfig
from trainer.data.class_names import describe_difference, find_lookalikes
from trainer.data.csv.table import TableFormat, read_table
from trainer.data.folders.scan import DirEntries, Scan, scan_dir
from trainer.data.folders.splits import find_split_folders
from trainer.data.index import DatasetIndex
from trainer.data.prepare import exclude_images, list_examples
from trainer.data.progress import NO_PROGRESS, ProgressHooks
from trainer.data.registry import cache_folder, resolve_root
from trainer.errors import UserError
from trainer.text import join_truncated

_ABSENT_CLASSES = " classes have no image to "


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of a dataset, with what is wrong with its folders or its CSV."""

    images: tuple[LabeledImage, ...]
    findings: tuple[Finding, ...]
    sources: Mapping[str, str]
    """Split -> where its images come from, such as `val/`; empty if training refuses the dataset."""
    root: Path
    """Folder that relative paths of `data.exclude` start from: the dataset folder, or that of the CSV's images."""
    index: DatasetIndex | None
    """What training would use; None if it refuses the dataset."""

    @property
    def groups(self) -> dict[int, str]:
        """Return position -> group, such as a patient, for the images that have one."""
        groups = {} if self.index is None else self.index.groups
        return {row: groups[image.path] for row, image in enumerate(self.images) if image.path in groups}

    @property
    def excluded(self) -> list[LabeledImage]:
        """Return the images that the option `data.exclude` leaves out."""
        if self.index is None:
            return []
        return [
            LabeledImage(path, self.index.classes[label], split)
            for split, examples in self.index.excluded.items()
            for path, label in examples
        ]

    @property
    def split_made(self) -> bool:
        """Return whether regraft divides the dataset itself."""
        return self.index is not None and self.index.split_made


def list_images(data: DataConfig, *, displays: ProgressHooks = NO_PROGRESS) -> ImageList:
    """Return the images of a dataset in the splits that training would use.

    If training refuses the dataset, the reason is a finding, and all images below class folders are listed.

    Args:
        data: the data section of the config; `root` must be set.
        displays: progress displays.

    Raises:
        UserError: there is no such dataset, or data.exclude does not fit it.

    """
    assert data.root is not None  # for mypy: the command has set it
    with displays.downloading(data.root) as on_progress:
        root = resolve_root(data.root, cache=cache_folder(data.cache), seed=data.seed, on_progress=on_progress)
    try:
        index = list_examples(replace(data, exclude=None))
    except UserError as error:
        found = [Finding(kind="layout", severity="error", message=f"training stops with this error: {error}")]
        images = tuple(_list_folder(str(root), data, found) if root.is_dir() else _list_table(root, data))
        findings = (*found, *_compare_classes(images, str(error)))
        folder = root if root.is_dir() else root.parent
        return ImageList(images=images, findings=findings, sources={}, root=folder, index=None)
    if data.exclude is not None:
        index = exclude_images(index, Path(data.exclude))
    images = tuple(
        LabeledImage(path, index.classes[label], split)
        for split, examples in (("train", index.train), ("val", index.val), ("test", index.test))
        for path, label in examples
    )
    notes = (
        Finding(kind="layout", severity="note", message=note)
        for note in index.notes
        if _ABSENT_CLASSES not in note  # a finding of _compare_classes
    )
    return ImageList(
        images=images,
        findings=(*notes, *_compare_classes(images)),
        sources={"test": index.reported},
        root=index.root,
        index=index,
    )


def _list_folder(root: str, data: DataConfig, findings: list[Finding]) -> Iterator[LabeledImage]:
    """Yield the images below class folders; add a finding for each folder that cannot be read."""

    def scan_readable(folder: str) -> DirEntries:
        try:
            return scan_dir(folder)
        except UserError as error:
            if not any(str(error) in finding.message for finding in findings):
                findings.append(Finding(kind="layout", severity="error", message=str(error), count=1, paths=(folder,)))
            return DirEntries([], [], 0, has_links=False)

    scan = Scan(tuple(extension.lower() for extension in data.extensions), scan_readable)
    given = {"train": data.train_dir, "val": data.val_dir, "test": data.test_dir}
    try:
        top = scan.scan_parent(root)
        folders = find_split_folders(root, top, scan.is_image, {key: path for key, path in given.items() if path})
        for split, folder in folders.items():
            path = root if folder == "." else os.path.join(root, folder)
            entries = top if folder == "." else scan.scan_parent(path)
            others = {other.split(os.sep)[0] for other in folders.values()} if folder == "." else {}
            for name in [name for name in entries.folders if name not in others]:
                for image in scan.find_images(os.path.join(path, name))[0]:
                    yield LabeledImage(image, name, split)
    except UserError:  # listed as the reason why training stops
        return


def _list_table(file: Path, data: DataConfig) -> Iterator[LabeledImage]:
    """Yield the images of a CSV, unless one of its rows is invalid."""
    try:
        rows, _ = read_table(file, TableFormat(columns=data.csv_columns, root=data.csv_root, suffix=data.csv_suffix))
    except UserError:  # listed as the reason why training stops
        return
    for row in rows:
        yield LabeledImage(row.path, row.label, row.split or "train")


def _compare_classes(images: Sequence[LabeledImage], error: str = "") -> Iterator[Finding]:
    """Yield findings about class names that look the same, and classes that differ between the splits.

    Args:
        images: all images.
        error: why training refuses the dataset; what it says is not repeated.

    """
    classes: dict[str, dict[str, int]] = {}
    for image in images:
        counts = classes.setdefault(image.split, {})
        counts[image.label] = counts.get(image.label, 0) + 1
    names = sorted({name for counts in classes.values() for name in counts})
    while lookalikes := find_lookalikes(names):
        names.remove(lookalikes[1])
        message = f"the classes {describe_difference(*lookalikes)}"
        if message not in error:
            yield Finding(
                kind="class-names",
                severity="error",
                message=f"{message}.",
                remedy="Rename or merge them.",
                count=len(lookalikes),
            )
    train = classes.pop("train", {})
    for split, counts in classes.items():
        extra, absent = sorted(set(counts) - set(train)), sorted(set(train) - set(counts))
        if extra and join_truncated(extra) not in error:
            yield Finding(
                kind="class-folders",
                severity="error",
                message=f"classes of {split} that are not training classes: {join_truncated(extra)}.",
                remedy="Add training images of them, or remove them.",
                count=len(extra),
            )
        if absent:
            yield Finding(
                kind="class-folders",
                severity="warning",
                message=f"{len(absent)} of {len(train)} classes have no image in {split}, so their accuracy is not "
                f"measured: {join_truncated(absent)}.",
                remedy=f"Add {split} images of them.",
                count=len(absent),
            )

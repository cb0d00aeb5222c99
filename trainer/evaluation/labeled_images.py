"""List labeled images to evaluate on: those of a run, a folder with one folder per class, a dataset, or a CSV file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.sections.data import DataConfig
from trainer.data.csv.table import TableFormat, read_table
from trainer.data.folders.layout import read_folder
from trainer.data.folders.scan import Scan
from trainer.data.folders.splits import find_split_folders
from trainer.data.prepare import list_examples
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_PREFERRED = ("test", "val", "train")
"""Split that is evaluated if none is named: the first of these that exists."""
_UNDIVIDED = "all"
Images = list[tuple[str, str]]
"""(path, class) of each image."""


@dataclass(frozen=True)
class LabeledImages:
    """Images and the names of their classes."""

    split: str
    """Name of the split; `all` if the data are not divided."""
    images: tuple[tuple[str, str], ...]
    """(path, class) of each image, sorted by class."""

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, sorted."""
        return sorted({name for _, name in self.images})


def list_run_images(data: DataConfig, split: str | None) -> LabeledImages:
    """Return the images of a split of a run's dataset; by default those that the run reports on.

    Raises:
        UserError: the dataset cannot be read, or has no such split.

    """
    index = list_examples(data)
    splits = {"train": index.train, **index.eval_splits}
    named = {name: [(path, index.classes[label]) for path, label in examples] for name, examples in splits.items()}
    return _choose_split(named, split, escape_unprintable(str(index.root)))


def list_labeled_images(data: Path, split: str | None, *, options: DataConfig) -> LabeledImages:
    """Return the images of a folder or a CSV file.

    Args:
        data: the folder or the file.
        split: train, val or test; None: test if there is one, else val. It must be None if the data are not divided.
        options: how to read a CSV, and the file extensions of images.

    Raises:
        UserError: an unknown layout, no such split, or no image.

    """
    where = escape_unprintable(str(data))
    try:
        if data.is_dir():
            splits = _read_folder(str(data), options.extensions)
        elif data.suffix.lower() in _lower(options.extensions):
            raise UserError(
                f"{where}: an image without a label; expected a folder with one folder per class, or a CSV of path and "
                "label. regraft predict predicts images without labels"
            )
        elif data.is_file():
            table = TableFormat(columns=options.csv_columns, root=options.csv_root, suffix=options.csv_suffix)
            splits = _read_csv(data, table)
        else:
            raise UserError(f"{where}: there is no such folder or CSV file")
    except UserError as error:  # the reader of training data names its option
        raise UserError(str(error).removeprefix("data.root ")) from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    return _choose_split(splits, split, where)


def list_images(folder: Path, *, options: DataConfig) -> list[str]:
    """Return the images in a folder and its subfolders, whose names do not count.

    Raises:
        UserError: there is no such folder, or it has no image.

    """
    where = escape_unprintable(str(folder))
    try:
        is_folder = folder.is_dir()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    if not is_folder:
        raise UserError(f"{where}: there is no such folder")
    paths, _ = Scan(_lower(options.extensions)).find_images(str(folder))
    if not paths:
        raise UserError(f"{where}: has no image; expected files with an extension of data.extensions")
    return paths


def _choose_split(splits: Mapping[str, Images], split: str | None, where: str) -> LabeledImages:
    chosen = split or next((name for name in _PREFERRED if splits.get(name)), _UNDIVIDED)
    if not splits.get(chosen):
        found = (
            "is not divided into splits" if _UNDIVIDED in splits else f"has the splits {join_truncated(sorted(splits))}"
        )
        raise UserError(f"{where}: has no image of the split {chosen}; it {found}")
    return LabeledImages(chosen, tuple(sorted(splits[chosen], key=lambda image: image[1])))


def _read_folder(root: str, extensions: Sequence[str]) -> dict[str, Images]:
    scan = Scan(_lower(extensions))
    top = scan.scan_parent(root)
    folders = find_split_folders(root, top, scan.is_image, {})
    listing = read_folder(root, top, scan, folders, check=False)
    splits = {
        split: [(path, name) for name, paths in images.items() for path in paths]
        for split, images in listing.splits.items()
    }
    return {_UNDIVIDED: splits["train"]} if folders == {"train": "."} else splits


def _read_csv(file: Path, table: TableFormat) -> dict[str, Images]:
    rows, _ = read_table(file, table)
    splits: dict[str, Images] = {}
    for row in rows:
        splits.setdefault(row.split or _UNDIVIDED, []).append((row.path, row.label))
    return splits


def _lower(extensions: Sequence[str]) -> tuple[str, ...]:
    return tuple(extension.lower() for extension in extensions)

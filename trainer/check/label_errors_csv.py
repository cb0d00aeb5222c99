"""Likely label errors as a CSV that the option `data.exclude` reads."""

import csv
import io
import os
from collections.abc import Iterable

from trainer.check.findings import LabelError

COLUMNS = ("path", "label", "suggested", "margin", "split")


def label_errors_csv(errors: Iterable[LabelError], root: str) -> str:
    """Return the CSV, in the order of the errors.

    Args:
        errors: the errors.
        root: folder of the dataset; paths inside of it are written relative to it; may be empty.

    """
    prefix = os.path.join(root, "")  # noqa: PTH118 (adds a trailing slash)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(COLUMNS)
    for image, suggested, margin in errors:
        writer.writerow((image.path.removeprefix(prefix), image.label, suggested, f"{margin:.4f}", image.split))
    return stream.getvalue()

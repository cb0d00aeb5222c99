"""The files that `regraft check` writes: JSON, a page, and CSV files that training reads."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.check.csv_files import write_excluded, write_groups
from trainer.check.findings import CheckResult, ModelFindings
from trainer.check.inspection import Inspection, find_groups
from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files to write, or None."""

    json: Path | None = None
    html: Path | None = None
    exclude_csv: Path | None = None
    groups_csv: Path | None = None

    def check(self, inputs: Mapping[str, str | None]) -> None:
        """Check before the long work that each file can be written and replaces no other one.

        Args:
            inputs: option -> a file that is read, or None.

        Raises:
            UserError: a file cannot be written.

        """
        taken = {Path(file).resolve(): option for option, file in inputs.items() if file}
        for name, file in asdict(self).items():
            option, extension = f"--{name.replace('_', '-')}", f".{name.rpartition('_')[2]}"
            if file is None:
                continue
            if not file.parent.is_dir():
                reason = "there is no such folder"
            elif file.exists() and not file.is_file():  # a device or a pipe is not replaced
                reason = "it is not a regular file"
            elif not os.access(file.parent, os.W_OK):
                reason = "its folder is not writable"
            elif file.suffix.lower() != extension:  # such as an image or a model file
                reason = f"expected a name that ends in {extension}"
            elif (other := taken.setdefault(file.resolve(), option)) != option:
                reason = f"it is the file of {other}; name another one"
            else:
                continue
            raise UserError(f"{option} {escape_unprintable(str(file))}: cannot be written: {reason}")

    def write(self, result: CheckResult, inspection: Inspection, model: ModelFindings | None) -> Iterator[str]:
        """Write the files; yield a line for each.

        Args:
            result: the result of the check.
            inspection: the images.
            model: what a model has found.

        Raises:
            UserError: a file cannot be written.

        """
        if self.json is not None:
            _write(self.json, json.dumps(result.to_json(), indent=1) + "\n")
            yield f"{self.json}: written"
        if self.html is not None:
            from trainer.check.page import render_page  # noqa: PLC0415 (Jinja2 is imported only for a page)

            _write(self.html, render_page(result))
            yield f"{self.html}: written"
        if self.exclude_csv is not None:
            count = write_excluded(self.exclude_csv, result, inspection.listing)
            command = shlex.join(("regraft", "train", result.root, "--data.exclude", str(self.exclude_csv)))
            yield f"{self.exclude_csv}: {count:,} images to leave out: {command}"
        if self.groups_csv is not None:
            count = write_groups(self.groups_csv, inspection.listing.images, find_groups(inspection, model))
            command = shlex.join(("regraft", "train", str(self.groups_csv)))
            yield f"{self.groups_csv}: {count:,} groups of images: {command}"


def _write(file: Path, text: str) -> None:
    try:
        write_atomically(file, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(file))}: cannot be written ({error.strerror})") from None

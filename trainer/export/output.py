"""Make an export appear complete or not at all: it is written beside its place and renamed at the end."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from regraft.contract import create_output_folder
from trainer.errors import UserError
from trainer.run.atomic import sync_folder
from trainer.text import escape_unprintable


def check_output(paths: list[Path]) -> None:
    """Check that the files or folders of an export do not exist, and create their parent folder.

    Raises:
        UserError: one exists, or the parent folder cannot be created.

    """
    for path in paths:
        if os.path.lexists(path):
            raise UserError(
                f"--output {_shown(path)} exists already: remove it, or choose another place by --output. Nothing was "
                "written"
            )
    try:
        create_output_folder(paths[0].parent)
    except OSError as error:
        raise UserError(f"--output {_shown(paths[0])}: its folder cannot be created ({error.strerror})") from None


@contextmanager
def staged(output: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield a path to write to; at the end of the block, rename it to `output`. After an error nothing is left.

    Args:
        output: an existing parent folder, and a name that does not exist.
        is_folder: whether the export is a folder; otherwise it is a file, with others of the same stem beside it.

    Raises:
        UserError: the disk is full, or cannot be written.

    """
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        yield temporary if is_folder else temporary / output.name
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if is_folder:
            temporary.rename(output)
        else:
            # The description before the model, so that a model never lacks it.
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == output.name):
                path.rename(output.with_name(path.name))
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {_shown(output)}: cannot be written ({reason}). Nothing was written") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shown(path: Path) -> str:
    return escape_unprintable(str(path))

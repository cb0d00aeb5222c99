"""Run PyTorch's exporters without their messages, and word their errors."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import UserError
from trainer.text import first_line


@contextmanager
def exporting(architecture: str, target: str) -> Iterator[None]:
    """Silence warnings within a block, and raise a UserError for what an exporter raises.

    An exporter warns about its own internals. What matters is whether the exported model agrees with the original.
    """
    previous = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except (UserError, MemoryError, OSError):
        raise
    except Exception as error:  # an exporter may raise anything
        message = f"{architecture} cannot be exported to {target}: {first_line(error)}. Nothing was written"
        raise UserError(message) from error
    finally:
        logging.disable(previous)

"""Run PyTorch's exporters without their messages, and word their errors."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.errors import UserError
from trainer.text import escape_unprintable


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
        reason = escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
        raise UserError(f"{architecture} cannot be exported to {target}: {reason}. Nothing was written") from error
    finally:
        logging.disable(previous)

"""The micro-batch size that a phase has found, or halved after an attempt ran out of memory: `micro-batch.json`.

It is not written into the config, which stays as the user gave it. The next attempts take the size, unless an option
has changed that it was found for.
"""

import json
from collections.abc import Mapping

from regraft.contract import latest_attempt_number
from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun

FILE = "micro-batch.json"


def load_micro_batch_size(run: OpenRun, options: Mapping[str, object]) -> int | None:
    """Return the saved size of the phase in progress; None if there is none for these options.

    Every process must call it; all get the same size.

    Args:
        run: the open run folder, at the start of the phase.
        options: option -> value of all options that the size depends on.

    Raises:
        UserError: the file is damaged.

    """
    path = run.folder / FILE

    def read() -> int | None:
        if not run.ctx.is_main_process:
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            size = saved["size"]
            if not (isinstance(size, int) and size >= 1):
                raise ValueError(f"size is {size}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({error}). Delete it, and the size is found anew") from None
        return size if saved.get("options") == dict(options) else None

    return run.ctx.broadcast(run.ctx.main_process_first(read))


def save_micro_batch_size(run: OpenRun, size: int, options: Mapping[str, object], *, reason: str) -> None:
    """Save a size for the next attempts. Any process of the latest attempt may call it: the last one wins.

    Raises:
        UserError: it cannot be written.

    """
    if latest_attempt_number(run.root) != run.attempt:
        return
    content = {"size": size, "reason": reason, "attempt": run.attempt, "options": dict(options)}
    path = run.folder / FILE
    with saving_to(path):
        write_text_atomically(path, json.dumps(content, indent=1) + "\n")

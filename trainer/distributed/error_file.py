"""What a process leaves for its launcher when it fails: torchrun's error file, in torchrun's format.

See ErrorHandler in torch.distributed.elastic; written here without importing torch, since a wrong option is
answered without it too.
"""

import json
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from trainer.errors import UserError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def write_error_file(error: BaseException, environment: Mapping[str, str] = os.environ) -> None:
    """Write down why this process fails, if a launcher has said where; a disk that is full must not hide the error."""
    path = environment.get(ERROR_FILE)
    if not path:
        return
    # The user's own errors need no traceback. torchrun reads whole seconds; which process was first takes more.
    name = "error" if isinstance(error, UserError) else type(error).__name__
    stack = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    now = time.time()
    extra = {
        "py_callstack": stack,
        "timestamp": str(int(now)),
        "time": now,
        "rank": environment.get("RANK", "0"),  # the folder is called after the rank on its machine
    }
    content = {"message": {"message": f"{name}: {error}", "extraInfo": extra}}
    # What was said first is the cause.
    with suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
        file.write(json.dumps(content))

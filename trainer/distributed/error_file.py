"""Write torchrun's error file: why this process fails.

The format is that of `ErrorHandler` in torch.distributed.elastic. The file is written without importing torch, because
a wrong option is reported without it too.
"""

import json
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from regraft.contract import ERROR_FILE
from trainer.errors import UserError


def write_error_file(error: BaseException, environment: Mapping[str, str] = os.environ) -> None:
    """Write the error to the file that torchrun has named, if any. A full disk does not hide the error."""
    path = environment.get(ERROR_FILE)
    if not path:
        return
    # A UserError needs no traceback. torchrun reads `timestamp` in whole seconds; `time` tells which rank failed first.
    name = "error" if isinstance(error, UserError) else type(error).__name__
    stack = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    now = time.time()
    extra = {
        "py_callstack": stack,
        "timestamp": str(int(now)),
        "time": now,
        "rank": environment.get("RANK", "0"),  # torchrun names the folder after the local rank
    }
    content = {"message": {"message": f"{name}: {error}", "extraInfo": extra}}
    # Mode "x": the first error is the cause, later ones do not replace it.
    with suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
        file.write(json.dumps(content))

"""Fine-tune a pretrained image classifier: `accelerate launch trainer/main.py [--config F] [--section.key V]`.

parse                      config.py
stages                     stages.py: a source model first, the comparison with scratch last
  data                     data/: index, checks, order, augmentation, batches
  model                    model/: build, find the head, graft, weights
  optimizer                optim.py
  fit, evaluate, save      loop.py, evaluate.py, checkpoint.py, model_file.py
  show                     report/
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if not __package__:
    # Run by path, Python puts this file's folder first on the search path: its modules must not pass for others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import UserError
from trainer.parse import parse

_SECONDS_FOR_RANK_0 = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        # torch takes seconds to import: a wrong option is answered without it.
        from trainer.stages import run  # noqa: PLC0415

        run(config)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        # A launcher may pass on what the terminal has sent already.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say(
            "interrupted: what the run folder holds is whole; the same command (without --run.resume never) goes on "
            "after its last whole epoch"
        )
        return 130
    return 0


def _say(text: str) -> None:
    """Print on standard error: rank 0 at once; another rank only if it lives on, so has failed alone."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(_SECONDS_FOR_RANK_0)
        text = f"[rank {rank}] {text}"
    print(text, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Exit; as one of a group, without Python's own clearing up.

    All is written and the group is left by then, but now and then gloo's threads abort a process that clears
    up (pytorch issue 190489 describes it), and a launcher would take a finished run for a failed one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())

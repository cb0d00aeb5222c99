"""Fine-tune a pretrained image classifier: `accelerate launch trainer/main.py [--config F] [--section.key V]`.

parse                      config.py
stages                     stages.py: a source model first, the comparison with scratch last
  data                     data/: index, checks, order, augmentation, batches
  model                    model/: build, find the head, graft, weights
  optimizer                optim.py
  fit, evaluate            loop.py, evaluate.py
  save, stop, go on        keeper.py, checkpoint/, resume.py, signals.py, attempts.py, model_file.py
  show                     report/
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

if not __package__:
    # Run by path, Python puts this file's folder first on the search path: its modules must not pass for others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.config.parse import parse
from trainer.distributed.error_file import write_error_file
from trainer.distributed.signals import STOPPING, Stopped, StopSignals, exit_with_parent, has_launcher
from trainer.errors import UserError

FAILED = 1
USER_ERROR = 2
STOPPED = 75
"""sysexits.h, EX_TEMPFAIL: not an error, to be started again."""
INTERRUPTED = 130
_SECONDS_FOR_RANK_0 = 5.0


_GOES_ON = "The same command (without --run.resume never) goes on from the run folder's newest checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0, 2 for what the user can mend, 75 for a stop, 130 for a second Ctrl-C."""

    def train(signals: StopSignals) -> None:
        config = parse(sys.argv[1:] if argv is None else argv)
        # torch takes seconds to import: a wrong option is answered without it.
        # An import that is broken off would leave half a module behind.
        with signals.deferred(), _without_collections():
            from trainer.pipeline import run  # noqa: PLC0415
        if signals.received:
            raise Stopped(signal.Signals(signals.received).name)

        run(config, signals)

    return run_cli(train)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Import without Python's collector of cycles, which goes through a million new objects again and again.

    That is a third of the time that imports take. Later collections leave out what was imported, which is never
    garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def run_cli(work: Callable[[StopSignals], object], *, goes_on: str = _GOES_ON) -> int:
    """Do the work of a verb under signals, say in one sentence why it ended, and return the exit code.

    `goes_on` tells whoever has stopped it what the same command will do.
    """
    with StopSignals() as signals:
        if has_launcher(os.environ):
            exit_with_parent()
        try:
            work(signals)
        except UserError as error:
            write_error_file(error)
            _say("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
            return USER_ERROR
        except Stopped as stop:
            if os.environ.get("RANK", "0") == "0":  # all have stopped together
                how = f"saved at {stop.saved}" if stop.saved else "there was nothing new to save"
                _say(f"stopped by {stop.reason}: {how}. {goes_on}")
            return stopped_exit_code(os.environ)
        except KeyboardInterrupt:
            _say(
                "interrupted before the state could be saved: what the run folder holds is whole. " + goes_on
            )
            return INTERRUPTED
    return 0


def stopped_exit_code(environment: Mapping[str, str]) -> int:
    """Return the exit code of a run that was asked to stop.

    torchrun knows success and failure alone, and starts again what has failed: there a stop is a success, and
    the run folder's last attempt says that it is one.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in environment else STOPPED


def _say(text: str) -> None:
    """Print on standard error: rank 0 at once; another rank only if it lives on, so has failed alone."""
    for number in STOPPING:  # to be told is not to be interrupted by a launcher's echo
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher's, for which rank 0 has spoken already
        time.sleep(_SECONDS_FOR_RANK_0)
        text = f"[rank {rank}] {text}"
    with suppress(OSError):  # a terminal that is gone
        print(text, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """Exit; as one of a group, or after an error that is none of the user's, without Python's own clearing up.

    All is written and the group is left by then, but now and then gloo's threads abort a process that clears
    up (pytorch issue 190489 describes it), and a launcher would take a finished run for a failed one. After a
    traceback, which holds on to the loaders, it would wait for ever: their workers are deaf to what it sends.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises at the end of a worker
    for worker in multiprocessing.active_children():
        worker.kill()
    if os.environ.get("WORLD_SIZE", "1") == "1" and code != FAILED:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_after(work: Callable[[], int]) -> NoReturn:
    """Exit with the code that the work returns; what it raises is told as Python tells it."""
    try:
        code = work()
    except SystemExit:  # of --help
        raise
    except BaseException as error:  # noqa: BLE001 (told below)
        write_error_file(error)
        sys.excepthook(*sys.exc_info())
        code = FAILED
    exit_process(code)


if __name__ == "__main__":
    exit_after(main)

"""What every command of the trainer shares: signals, error messages, exit codes, and a clean exit."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn

from regraft.contract import DONE, FAILED, INTERRUPTED, STOPPED, USER_ERROR
from trainer.distributed.error_file import write_error_file
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals, exit_with_parent, has_launcher
from trainer.errors import UserError

RESUMES = "The same command (without --run.resume never) resumes from the run folder's newest checkpoint"
_SECONDS_FOR_RANK_0 = 5.0


def run_cli(work: Callable[[StopSignals], object], *, on_restart: str = RESUMES) -> int:
    """Do a command's work with signals handled, print in one message why it ended, and return the exit code.

    Args:
        work: the command.
        on_restart: tells a user who has stopped the command what the same command will do.

    """
    with StopSignals() as signals:
        if has_launcher(os.environ):
            exit_with_parent()
        try:
            work(signals)
        except UserError as error:
            write_error_file(error)
            _print_error("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
            return USER_ERROR
        except Stopped as stop:
            if os.environ.get("RANK", "0") == "0":  # all ranks have stopped together
                how = f"saved at {stop.saved}" if stop.saved else "there was nothing new to save"
                _print_error(f"stopped by {stop.reason}: {how}. {on_restart}")
            return stopped_exit_code(os.environ)
        except KeyboardInterrupt:
            _print_error(
                f"interrupted before the state could be saved: the run folder is intact. {on_restart}"
            )
            return INTERRUPTED
    return DONE


def stopped_exit_code(environment: Mapping[str, str]) -> int:
    """Return the exit code of a run that was asked to stop.

    torchrun knows only success and failure, and restarts after a failure. Under it a stop counts as a success, and
    the run folder's last attempt says that it was a stop.
    """
    return DONE if "TORCHELASTIC_RUN_ID" in environment else STOPPED


@contextmanager
def without_gc() -> Iterator[None]:
    """Import modules without Python's cyclic garbage collector, which takes a third of the time that imports take.

    What was imported is never garbage, so later collections skip it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _print_error(text: str) -> None:
    """Print on standard error: rank 0 at once; another rank only if it stays alive, which means it failed alone."""
    for number in STOP_SIGNALS:  # the message must not be interrupted by a launcher's echo
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from the launcher, once rank 0 has printed the error
        time.sleep(_SECONDS_FOR_RANK_0)
        text = f"[rank {rank}] {text}"
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """Exit. In a process group, or after an unexpected error, skip Python's own clean-up.

    Everything is written and the group is left by then, but gloo's threads sometimes abort a process that cleans up
    (pytorch issue 190489), and a launcher would take a finished run for a failed one. After a traceback, which keeps
    the loaders alive, the clean-up would wait forever: loader workers ignore the signal that it sends.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker ends
    for worker in multiprocessing.active_children():
        worker.kill()
    if os.environ.get("WORLD_SIZE", "1") == "1" and code != FAILED:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_after(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that `main` returns; print the traceback of what it raises."""
    try:
        code = main()
    except SystemExit:  # of --help
        raise
    except BaseException as error:  # noqa: BLE001 (printed below)
        write_error_file(error)
        sys.excepthook(*sys.exc_info())
        code = FAILED
    exit_process(code)

"""Signals, error messages and exit codes of every trainer command."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

from regraft.contract import DONE, FAILED, INTERRUPTED, STOPPED, USER_ERROR
from regraft.startup_signals import STOP_SIGNALS, handled_by
from regraft.streams import discard_output, flush_output, has_reader, prepare_streams
from trainer.data.workers import full_shared_memory_as_user_error
from trainer.distributed.error_file import write_error_file
from trainer.distributed.signals import Stopped, StopSignals, exit_with_parent, has_launcher
from trainer.errors import OutOfMemory, UserError

RESUMES = "The same command (without --run.resume never) resumes from the run folder's newest checkpoint"
_SECONDS_FOR_RANK_0 = 5.0


def run_cli(work: Callable[[StopSignals], object], *, on_restart: str = RESUMES) -> int:
    """Run a command with signal handlers, print an error or a stop as one message, and return the exit code.

    Args:
        work: the command.
        on_restart: sentence for the message of a stop: what the same command does when it is started again.

    """
    prepare_streams()
    try:
        # Within `try`, since the handlers raise from their first moment on. After it, a signal changes nothing.
        with StopSignals() as signals, full_shared_memory_as_user_error():
            if has_launcher(os.environ):
                exit_with_parent()
            work(signals)
        flush_output()
    except UserError as error:
        write_error_file(error)
        _print_error("\n".join([f"error: {error}", *getattr(error, "__notes__", []), *_launcher_note()]))
        return USER_ERROR
    except OutOfMemory as error:
        write_error_file(error)
        _print_error(f"failed: {error}")
        return FAILED
    except Stopped as stop:
        if _rank() == 0:  # all ranks stop together
            saved = f"saved at {stop.saved}" if stop.saved else "there was nothing new to save"
            _print_error(f"stopped by {stop.reason}: {saved}. {on_restart}")
        return stopped_exit_code(os.environ)
    except KeyboardInterrupt:
        _print_error(f"interrupted by a second Ctrl-C: what was saved earlier is intact. {on_restart}")
        return INTERRUPTED
    except BrokenPipeError:
        if has_reader():  # another pipe
            raise
        discard_output()
        return FAILED
    return DONE


def _launcher_note() -> list[str]:
    """Return a line about the traceback that `accelerate launch` prints for every exit code except 0."""
    if "TORCHELASTIC_RUN_ID" in os.environ or not has_launcher(os.environ):
        return []
    return ["(a traceback of `accelerate launch` itself may follow: it reports the exit code. --quiet leaves it out)"]


def stopped_exit_code(environment: Mapping[str, str]) -> int:
    """Return the exit code of a run that was asked to stop.

    torchrun restarts its processes after any exit code but 0, so under torchrun a stop exits with 0. The record of the
    attempt in the run folder says that the run was stopped.
    """
    return DONE if "TORCHELASTIC_RUN_ID" in environment else STOPPED


def _rank() -> int:
    """Return the rank of this process; 0 if its variable is malformed, which `init_distributed` reports."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def _print_error(text: str) -> None:
    """Print to standard error: rank 0 at once; other ranks only if the launcher does not end them within 5 seconds."""
    with handled_by(signal.SIG_IGN):  # a repeated signal must not interrupt the message
        rank = _rank()
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher sends it after rank 0 has failed
            time.sleep(_SECONDS_FOR_RANK_0)
            text = f"[rank {rank}] {text}"
        with suppress(OSError):  # the terminal may be closed
            print(text, file=sys.stderr, flush=True)


def exit_process(code: int) -> NoReturn:
    """Exit; a stop signal ends a clean-up that hangs. In a group, or after an unexpected error, skip Python's clean-up.

    All files are written by then. But gloo's threads sometimes abort a process during clean-up (pytorch issue 190489),
    and the launcher would report a finished run as failed. After an unexpected error the traceback keeps the data
    loaders alive, and clean-up would wait forever for their workers, which ignore its signal.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker ends
    for worker in multiprocessing.active_children():
        worker.kill()
    if os.environ.get("WORLD_SIZE", "1") == "1" and code != FAILED:
        # Python waits for threads, and one may hang in a file system that does not answer.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: os._exit(code))
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def exit_after(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that `main` returns; print the traceback of what it raises."""
    try:
        code = main()
    except SystemExit:  # --help
        raise
    except BaseException as error:  # noqa: BLE001 (printed below)
        write_error_file(error)
        sys.excepthook(*sys.exc_info())
        code = FAILED
    exit_process(code)

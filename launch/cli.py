"""The command line of `regraft`: its own verbs, and those that are programs of the trainer."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[1])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
import difflib
import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from launch import machine
from launch.errors import LaunchError
from launch.interrupts import exec_python, interruptible
from launch.options import nonnegative_int, process_count, split_options
from launch.text import escape_lines
from launch.trainer_options import choose_run_folder, new_logs, trainer_folder
from regraft.contract import COMMAND, DEFAULT_RUN_DIR, DONE, FAILED, STOPPED, USER_ERROR, own_version
from regraft.streams import discard_output, flush_output, prepare_streams

_HELP = """\
usage: regraft COMMAND [FOLDER] [options] [--config FILE] [--SECTION.KEY VALUE]
       regraft --version

Fine-tune image classifiers on one machine or on a Slurm cluster.

on this machine:
  train       train through torchrun, one process per GPU, or resume a run
  debug       train in one process, for use with a debugger
  doctor      check whether this machine, or several nodes, can run a training

data:
  check       find duplicates, leakage between splits and unreadable files
  preview     draw training images and their augmentations to one PNG

on a Slurm cluster:
  submit      check a run and submit it as a job
  render      print the batch script that submit would use

runs:
  status      show the progress of a run, from its folder
  report      write the HTML report of a run, or compare several runs

using a model:
  predict     predict the classes of images with a trained model
  evaluate    evaluate a trained model on labeled images
  export      export a model to ONNX, torch.export, transformers or timm

experiments:
  lr-find     find a learning rate by a range test
  compare     train several strategies with several seeds, and compare them

shell:
  completion  print a script that completes commands and options in bash or zsh

`regraft COMMAND --help` lists the options of a command. All other options go to
the trainer: see `regraft train --help`, or `regraft train --help SECTION` for
one section. FOLDER is short for --data.root FOLDER.
"""

_AFTER_STOP = {
    "train": "training had not started, and there was nothing to save. Run the same command again",
    "submit": "nothing was submitted. Run the same command again",
    "doctor": "all its processes and files are removed. Run the same command again",
    "status": "this ends the display, not the run",
}
"""What the message of a stop says; otherwise, to run the same command again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb on the command line, and return the exit code."""
    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    try:
        with interruptible():
            code = _run_verb(words)
    except KeyboardInterrupt as interrupt:
        after_stop = getattr(interrupt, "__notes__", [_AFTER_STOP.get(verb, "run the same command again")])[-1]
        with suppress(OSError):  # the terminal may be closed
            print(f"stopped by {interrupt}: {after_stop}", file=sys.stderr, flush=True)
        return STOPPED
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:  # not of standard output
            raise
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        discard_output()
        return FAILED
    return code if flush_output() else FAILED


def _run_verb(words: Sequence[str]) -> int:
    verb, rest = (words[0], [*words[1:]]) if words else ("--help", [])
    try:
        if verb in ("-h", "--help", "help"):
            verb, rest = (rest[0], ["--help"]) if rest[:1] and rest[0] in VERBS else (verb, [])
        if verb in ("-h", "--help", "help"):
            print(_HELP, end="")
            return 0
        if verb in ("-V", "-v", "--version", "version"):
            print(f"regraft {own_version()}")
            return 0
        if verb not in VERBS:
            *others, last = VERBS
            close = difflib.get_close_matches(verb.lower().replace("_", "-"), VERBS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; expected {', '.join(others)} or {last}"
            raise LaunchError(f"there is no command {verb!r}{hint}")
        return VERBS[verb](rest)
    except LaunchError as error:
        print(f"error: {escape_lines(str(error))}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of a pipe has closed it, as `| head` does
        discard_output()
        return FAILED


def _train(argv: list[str]) -> int:
    own, options = split_options(argv, ("--nproc", "--max-restarts"))
    printing = ("-h", "--help", "--version", "--print_config")
    if any(word in printing or word.startswith("--print_config=") for word in options):
        if options[-1] in ("-h", "--help"):  # otherwise of one section of the trainer's options
            print(_train_parser().format_help())
        return _exec_trainer("train", "main.py", options)
    arguments = _train_parser().parse_args(own)
    # Imported here, so that --help and --print_config do not load it.
    from launch.local.run import run  # noqa: PLC0415
    from launch.local.torchrun import TorchrunConfig  # noqa: PLC0415

    gpus = machine.gpus(os.environ)
    processes, threads = machine.processes_and_threads(arguments.nproc, gpus=gpus, cores=machine.usable_cores(gpus))
    folder = choose_run_folder(options)
    if folder is None:
        return USER_ERROR
    config = TorchrunConfig(
        processes=processes,
        threads=threads,
        max_restarts=arguments.max_restarts,
        trainer=trainer_folder(),
        options=(*options, f"--run.dir={folder}"),
        logs=new_logs(folder),
    )
    return run(config, folder)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft train",
        usage="regraft train [FOLDER] [--nproc N] [--max-restarts K] [--config FILE]\n"
        "                     [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description="Train on this machine through torchrun. All other options go to the trainer; they follow below.",
    )
    parser.add_argument(
        "--nproc",
        type=process_count,
        default=None,
        metavar="N|auto",
        help="number of processes; auto: one per GPU, or one per 8 cores without GPUs (default: auto)",
    )
    parser.add_argument(
        "--max-restarts",
        type=nonnegative_int,
        default=0,
        metavar="K",
        help="how often failed processes are restarted from the newest checkpoint (default: 0)",
    )
    return parser


def _exec_trainer(verb: str, file: str, options: Sequence[str]) -> NoReturn:
    """Replace this process by a program of the trainer, which then has the terminal for its debugger and Ctrl-C."""
    os.environ[COMMAND] = f"regraft {verb}"
    program = str(trainer_folder() / file)
    sys.stdout.flush()
    exec_python([program, *options])


def _submit(argv: list[str]) -> int:
    from launch.slurm.submit import submit_job  # noqa: PLC0415

    return submit_job(argv)


def _render(argv: list[str]) -> int:
    from launch.slurm.submit import render_job  # noqa: PLC0415

    return render_job(argv)


def _status(argv: list[str]) -> int:
    from launch.status import show  # noqa: PLC0415

    arguments = _status_parser().parse_args(argv)
    return show(arguments.run, watch=arguments.watch)


def _status_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft status",
        allow_abbrev=False,
        description="Show the state of a run from its folder: attempt, step, accuracy, ETA and last failure. Of a "
        "folder with several runs, show each, and the options in which they differ.",
        epilog="Exit codes: 0: every run is done, or still runs or waits; 2: there is no run, or a wrong option; "
        "3: a run has ended before it was done; 75: stopped by a signal.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        default=None,
        type=Path,
        metavar="RUN",
        help=f"run folder, or a folder of runs (default: {DEFAULT_RUN_DIR}, or all runs beside it)",
    )
    parser.add_argument("--watch", action="store_true", help="update the display until the run ends")
    return parser


def _completion(argv: list[str]) -> int:
    from launch import completion  # noqa: PLC0415
    from launch.doctor.main import make_parser as doctor_parser  # noqa: PLC0415
    from launch.slurm.submit import make_parser as submit_parser  # noqa: PLC0415

    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(completion.__doc__)
        return DONE if argv else USER_ERROR
    if argv[0] == completion.MODELS:
        print(*completion.models())
        return DONE
    trainer, values = completion.trainer_options()
    parsers = {"train": _train_parser(), "doctor": doctor_parser()}
    parsers |= {verb: submit_parser(verb) for verb in ("submit", "render")}
    options = {verb: [*completion.parser_options(parser), *trainer] for verb, parser in parsers.items()}
    options |= {"debug": trainer, "preview": [*trainer, "--output"]}
    options |= {"check": [*completion.CHECK, *trainer]}
    options |= {"lr-find": ["--from", "--to", "--steps", *trainer]}
    options |= {"compare": ["--strategies", "--seeds", *trainer]}
    options |= {"predict": completion.PREDICT, "evaluate": completion.EVALUATE, "export": completion.EXPORT}
    options |= {"report": ["--output", "--no-grad-cam"]}
    options |= {"status": completion.parser_options(_status_parser()), "completion": []}
    print(completion.render_script(argv[0], options, values), end="")
    return DONE


def _doctor(argv: list[str]) -> int:
    from launch.doctor.main import main as doctor  # noqa: PLC0415

    return doctor(argv)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "debug": lambda argv: _exec_trainer("debug", "main.py", [*argv, "--debug"]),
    "submit": _submit,
    "render": _render,
    "status": _status,
    "doctor": _doctor,
    "check": lambda argv: _exec_trainer("check", "commands/check.py", argv),
    "preview": lambda argv: _exec_trainer("preview", "commands/preview.py", argv),
    "lr-find": lambda argv: _exec_trainer("lr-find", "commands/lr_find.py", argv),
    "compare": lambda argv: _exec_trainer("compare", "commands/compare.py", argv),
    "predict": lambda argv: _exec_trainer("predict", "commands/predict.py", argv),
    "evaluate": lambda argv: _exec_trainer("evaluate", "commands/evaluate.py", argv),
    "export": lambda argv: _exec_trainer("export", "commands/export.py", argv),
    "report": lambda argv: _exec_trainer("report", "commands/report.py", argv),
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())

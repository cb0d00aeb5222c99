"""`regraft`: its verbs, and those of the trainer that it passes on."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import contract, machine
from launch.errors import LaunchError
from launch.local.command import Local, processes_and_threads, split_options

_DESCRIPTION = """\
Start training anywhere, and keep it going.

  regraft train [--nproc N] [--max-restarts K] [--config FILE] [--section.key VALUE ...]
  regraft debug [--config FILE] [--section.key VALUE ...]
  regraft submit [--nodes N] [--gpus-per-node G] [--time T] ... [--config FILE] [--section.key VALUE ...]
  regraft render [as submit]
  regraft status [RUN] [--watch]
  regraft doctor [--nodes N] [--nproc N] [--json] [--config FILE] [--section.key VALUE ...]
  regraft preview [--config FILE] [--section.key VALUE ...]
  regraft lr-find [--from LR] [--to LR] [--steps N] [--config FILE] [--section.key VALUE ...]
  regraft compare --strategies NAME,... [--seeds N] [--config FILE] [--section.key VALUE ...]
  regraft completion bash|zsh

What a verb does not know goes to the trainer, which checks it: `regraft train --help` lists its options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    try:
        if verb in ("-h", "--help"):
            print(_DESCRIPTION, end="")
            return 0
        if verb not in _VERBS:
            *others, last = _VERBS
            raise LaunchError(f"there is no verb {verb!r}; expected {', '.join(others)} or {last}")
        return _VERBS[verb](rest)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return contract.USER_ERROR
    except KeyboardInterrupt:
        return contract.INTERRUPTED
    except BrokenPipeError:  # as `| head` does: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return contract.FAILED


def _train(words: list[str]) -> int:
    own, options = split_options(words, ("--nproc", "--max-restarts"))
    if any(
        word in ("-h", "--help", "--print_config") or word.startswith("--print_config=") for word in options
    ):
        if "-h" in options or "--help" in options:
            print(_train_parser().format_help())
        return _trainer("main.py", options)
    parser = _train_parser()
    arguments = parser.parse_args(own)
    from launch.local.run import run  # noqa: PLC0415 (help needs none of it)

    gpus = machine.gpus(os.environ)
    processes, threads = processes_and_threads(arguments.nproc, gpus=gpus, cores=machine.cores())
    folder = contract.run_folder(options)
    local = Local(
        processes=processes,
        threads=threads,
        max_restarts=arguments.max_restarts,
        trainer=contract.trainer_folder(),
        options=tuple(options),
        logs=contract.new_logs(folder),
    )
    return run(local, folder)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft train",
        allow_abbrev=False,
        description="Train on this machine through torchrun. All other options are the trainer's; they follow below.",
    )
    parser.add_argument(
        "--nproc",
        type=_processes,
        default=None,
        metavar="N|auto",
        help="processes; auto: one for each GPU, or for every 8 cores where there is none (default)",
    )
    parser.add_argument(
        "--max-restarts",
        type=_count,
        default=0,
        metavar="K",
        help="how often failed processes are started again, from the newest checkpoint (default: 0)",
    )
    return parser


def _processes(text: str) -> int | None:
    if text == "auto":
        return None
    number = _count(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more, or auto")
    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def _trainer(file: str, options: Sequence[str]) -> int:
    """Become the trainer: its debugger and Ctrl-C are then this terminal's."""
    program = str(contract.trainer_folder() / file)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, program, *options])


def _submit(words: list[str]) -> int:
    from launch.slurm.submit import submit_job  # noqa: PLC0415

    return submit_job(words)


def _render(words: list[str]) -> int:
    from launch.slurm.submit import render_job  # noqa: PLC0415

    return render_job(words)


def _status(words: list[str]) -> int:
    from launch.status import show  # noqa: PLC0415

    arguments = _status_parser().parse_args(words)
    return show(arguments.run, watch=arguments.watch)


def _status_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regraft status",
        allow_abbrev=False,
        description="What a run is doing, from its folder alone: attempt, step, accuracy so far, ETA, last failure.",
    )
    parser.add_argument("run", nargs="?", default=contract.DEFAULT_RUN_DIR, type=Path, help="run folder")
    parser.add_argument("--watch", action="store_true", help="keep it on the screen until the run ends")
    return parser


def _completion(words: list[str]) -> int:
    from launch import completion  # noqa: PLC0415
    from launch.doctor.main import doctor_parser  # noqa: PLC0415
    from launch.slurm.submit import parser_of  # noqa: PLC0415

    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(completion.__doc__)
        return contract.DONE if words else contract.USER_ERROR
    trainers = completion.trainer_options()
    own = {"train": _train_parser(), "doctor": doctor_parser()}
    own |= {verb: parser_of(verb) for verb in ("submit", "render")}
    options = {verb: [*completion.options_of(own[verb]), *trainers] for verb in own}
    options |= {"debug": trainers, "preview": [*trainers, "--output"]}
    options |= {"lr-find": ["--from", "--to", "--steps", *trainers]}
    options |= {"compare": ["--strategies", "--seeds", *trainers]}
    options |= {"status": completion.options_of(_status_parser()), "completion": []}
    print(completion.script(words[0], options), end="")
    return contract.DONE


def _doctor(words: list[str]) -> int:
    from launch.doctor.main import main as examine  # noqa: PLC0415

    return examine(words)


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "debug": lambda words: _trainer("main.py", [*words, "--debug"]),
    "submit": _submit,
    "render": _render,
    "status": _status,
    "doctor": _doctor,
    "preview": lambda words: _trainer("preview.py", words),
    "lr-find": lambda words: _trainer("lr_find.py", words),
    "compare": lambda words: _trainer("compare.py", words),
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())

"""Check a dataset before training: `regraft check DATA [--model MODEL] [--html FILE] [--exclude-csv FILE]`.

Counts and describes its images, and looks for files that cannot be read, duplicates and leakage between its splits.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
from collections.abc import Sequence

from rich.console import Console

from regraft.command_line import is_dataset, join_values
from regraft.contract import DONE, FAILED, available_cores
from trainer.check.findings import CheckResult
from trainer.check.inspection import inspect, make_result
from trainer.check.outputs import Outputs
from trainer.check.terminal import print_result
from trainer.cli import exit_after, run_cli
from trainer.config.parse import parse, split_command
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.report.progress import progress_hooks
from trainer.text import escape_unprintable


def check(argv: Sequence[str], signals: StopSignals) -> tuple[CheckResult, bool]:
    """Check a dataset, print the result and write its files.

    Returns:
        The result, and whether it has a finding of the severity given by --fail-on.

    Raises:
        UserError: there is no such dataset, a wrong option, or a file cannot be written.

    """
    own, options = split_command(parser(), argv)
    if not any(is_dataset(word) or word.startswith(("--config=", "--data.root=")) for word in join_values(options)):
        raise UserError("there is no dataset on the command line: regraft check DATA")
    data = parse(options).data
    if data.root is None:
        raise UserError("data.root is null in the config: name the dataset, as in regraft check DATA")
    outputs = Outputs(json=own.json, html=own.html, exclude_csv=own.exclude_csv, groups_csv=own.groups_csv)
    outputs.check({"data.root": data.root, "data.exclude": data.exclude})
    progress = Console(stderr=True, highlight=False, markup=False, emoji=False)
    check_with_model = None
    if own.model is not None:
        with signals.deferred():  # an interrupted import would leave half a module behind
            from trainer.commands.check_model import load_model  # noqa: PLC0415 (torch takes seconds to import)
        signals.raise_if_received()
        check_with_model = load_model(own, progress)
    inspection = inspect(
        data, workers=available_cores(), near=own.duplicates == "near", displays=progress_hooks(progress)
    )
    found = None if check_with_model is None else check_with_model(inspection, data)
    result = make_result(inspection, data, found)
    written: list[str] = []
    try:  # before anything is printed: the reader of a pipe may end early
        written.extend(outputs.write(result, inspection, found))
    finally:  # also if a file cannot be written
        _print(result, written)
    return result, own.fail_on != "never" and result.has(own.fail_on)


def _print(result: CheckResult, written: Sequence[str]) -> None:
    try:
        print_result(Console(highlight=False, markup=False, emoji=False), result)
        for line in written:
            print(escape_unprintable(line))
    except BrokenPipeError:  # of `| head`
        raise
    except OSError as error:
        raise UserError(f"standard output cannot be written ({error.strerror})") from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    own = argparse.ArgumentParser(
        prog="regraft check",
        usage="regraft check DATA [--model MODEL] [--html FILE] [--exclude-csv FILE]\n"
        "                     [--data.KEY VALUE ...]",
        allow_abbrev=False,
        description="Check a dataset before training: classes, sizes and formats, unreadable and wrongly named files, "
        "duplicates and near-duplicates, leakage between its splits, and with --model likely label errors.",
        epilog="DATA and all other options are those of regraft train: a folder, a CSV or a dataset name, --config "
        "FILE, --data.KEY VALUE. Exit codes: 0 if no finding has the "
        "severity of --fail-on, 1 if one has, 2 after an error that can be fixed, 75 after a stop signal.",
    )
    add = own.add_argument
    add("--json", type=Path, metavar="FILE", help="write all findings and groups of duplicates as JSON")
    add("--html", type=Path, metavar="FILE", help="write a page: what is wrong, what to do, pictures and charts")
    add(
        "--exclude-csv",
        type=Path,
        metavar="FILE",
        help="write the images to leave out as a CSV for --data.exclude: copies, and with --model label errors",
    )
    add(
        "--groups-csv",
        type=Path,
        metavar="FILE",
        help="write the dataset as a CSV whose groups keep near-duplicates in one split: regraft train FILE",
    )
    add(
        "--fail-on",
        choices=("error", "warning", "never"),
        default="error",
        help="exit with code 1 if there is such a finding, for CI (default: error)",
    )
    add(
        "--duplicates",
        choices=("near", "exact"),
        default="near",
        help="find re-encoded, resized, cropped and mirrored copies too, or only equal files (default: near)",
    )
    add(
        "--model",
        metavar="MODEL",
        help="find near-duplicates and label errors by its features: a model name such as resnet18 or timm/NAME, or a "
        "run folder",
    )
    add("--weights", default="DEFAULT", metavar="W", help="pretrained weights of a model name (default: DEFAULT)")
    add("--device", default="auto", metavar="NAME", help="device of the model: auto, cpu or cuda (default: auto)")
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    has_failed = False

    def run(signals: StopSignals) -> None:
        nonlocal has_failed
        _, has_failed = check(words, signals)

    code = run_cli(run, on_restart="The same command checks all images again")
    return FAILED if code == DONE and has_failed else code


if __name__ == "__main__":
    exit_after(main)

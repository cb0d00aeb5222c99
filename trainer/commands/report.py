"""Write the HTML report of a run, or of several runs beside each other: `regraft report RUN...`.

The page shows what the run folder holds: result, confusions, pictures, curves, calibration, time and environment.
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
from importlib.util import find_spec

from regraft.contract import MODEL, REPORT
from trainer.cli import exit_after, run_cli
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.pages.galleries import Explain
from trainer.pages.run_comparison import render_comparison
from trainer.pages.run_record import RunRecord, read_run
from trainer.pages.run_report import render_report, save_page
from trainer.text import escape_unprintable


def report(argv: Sequence[str], signals: StopSignals) -> None:
    """Write the page, and print its path.

    Raises:
        UserError: something that the user can fix.

    """
    arguments = parser().parse_args(argv)
    if len(arguments.run) > 1 and arguments.output is None:
        raise UserError("--output FILE is missing: several runs are written to one page; name its file")
    runs = [read_run(folder) for folder in arguments.run]
    for run in runs:
        for problem in run.problems:
            print(escape_unprintable(f"warning: {run.folder}: {problem}"), file=sys.stderr)
    output: Path = arguments.output or arguments.run[0] / REPORT
    if output.exists() and not output.is_file():  # a device would be replaced
        raise UserError(
            f"--output {output}: is {'a folder' if output.is_dir() else 'no regular file'}; expected a file"
        )
    if output.suffix.lower() != ".html":  # such as a model file, which would be replaced
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if len(runs) > 1:
        page = render_comparison(runs)
    else:
        with signals.deferred():  # an interrupted import would leave half a module behind
            explain = _explainer(runs[0]) if arguments.grad_cam else None
        signals.raise_if_received()
        page = render_report(runs[0], explain=explain)
    save_page(output, page)
    print(escape_unprintable(f"{output}: {len(page.encode(errors='replace')) / 1e6:.1f} MB"))


def _explainer(run: RunRecord) -> Explain | None:
    """Return what draws Grad-CAM; None, with a line that says why, if it cannot be drawn."""
    if not run.predictions or not (run.folder / MODEL).is_file():
        return None
    if find_spec("pytorch_grad_cam") is None:
        print("without Grad-CAM, which needs a package: pip install 'regraft[report]'", file=sys.stderr)
        return None
    from trainer.commands.grad_cam import Explainer  # noqa: PLC0415 (torch takes seconds)

    try:
        return Explainer(run.folder, run.working_folder)
    except UserError as error:
        print(escape_unprintable(f"without Grad-CAM: {error}"), file=sys.stderr)
        return None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    own = argparse.ArgumentParser(
        prog="regraft report",
        usage="regraft report RUN [RUN ...] [--output FILE] [--no-grad-cam]",
        allow_abbrev=False,
        description="Write the HTML report of a run, from its folder alone: result, confused classes, pictures with "
        "Grad-CAM, curves, calibration, time and environment. Of several runs, write one page that compares them.",
        epilog="The page is one file that loads nothing from the network. Exit codes: 0: done; 2: an error "
        "that can be fixed; 75: stopped by a signal.",
    )
    add = own.add_argument
    add("run", metavar="RUN", nargs="+", type=Path, help="run folder")
    add("--output", type=Path, metavar="FILE", help=f"file to write (default: RUN/{REPORT}; required for several runs)")
    add(
        "--no-grad-cam",
        dest="grad_cam",
        action="store_false",
        help="show the pictures without Grad-CAM, which is faster",
    )
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda signals: report(words, signals), on_restart="The same command writes the page")


if __name__ == "__main__":
    exit_after(main)

"""Download what runs need: `python -m trainer.commands.fetch OPTIONS [--next OPTIONS ...]`.

Checks the options as a run does, downloads or generates named datasets, lists the images and downloads the weights.
`regraft submit` runs this on the login node of a cluster, which has a network. One process does it for all runs of a
sweep, since torch takes seconds to import.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

from collections.abc import Iterator, Sequence
from itertools import groupby

from trainer.cli import exit_after, run_cli
from trainer.config.parse import parse
from trainer.distributed.signals import StopSignals

NEXT = "--next"
"""The word between the options of two runs."""


def fetch(argv: Sequence[str], signals: StopSignals) -> None:
    """Check the options of a run, download its dataset and weights, and print a summary.

    Raises:
        UserError: an error that would end the run before it trains. Unreadable images and errors that depend on the
            machine are not checked.

    """
    config = parse(argv)
    # torch takes seconds to import: a wrong option is reported without it. Signals are deferred, since an interrupted
    # import would leave half a module behind.
    with signals.deferred():
        from trainer.config.build_data import dataset_summary  # noqa: PLC0415
        from trainer.config.build_model import make_model  # noqa: PLC0415
        from trainer.config.preflight import preflight  # noqa: PLC0415
        from trainer.config.pretrained import check_pretrained_weights  # noqa: PLC0415
        from trainer.config.resolve import pretrain_config, resolve  # noqa: PLC0415
        from trainer.config.run_data import make_run_data  # noqa: PLC0415
        from trainer.data.prepare import prepare  # noqa: PLC0415
        from trainer.report.console import make_console  # noqa: PLC0415
        from trainer.report.progress import progress_hooks  # noqa: PLC0415
    signals.raise_if_received()

    console = make_console(enabled=True)
    config = resolve(config)
    check_pretrained_weights(config)
    phases = [config, pretrain_config(config)] if config.pretrain.root else [config]
    for phase in phases:
        prepared = prepare(phase.data, workers=1, displays=progress_hooks(console), check=False)
        console.print(dataset_summary(prepared))
        if phase is config:
            index = prepared.index
            preflight(config, make_run_data(config, prepared))
    if config.model.weights is not None:
        built = make_model(config, index.classes, config.model.weights, on_progress=console.print)
        console.print(f"weights: {built.source}")


def runs(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the options of each run; no words are one run without options."""
    if not words:
        yield []
    for is_next, options in groupby(words, key=NEXT.__eq__):
        if not is_next:
            yield list(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""

    def fetch_all(signals: StopSignals) -> None:
        for options in runs(sys.argv[1:] if argv is None else argv):
            fetch(options, signals)

    return run_cli(fetch_all, on_restart="The same command downloads what is missing")


if __name__ == "__main__":
    exit_after(main)

"""Fetch what runs will need, where there is a network: `python -m trainer.commands.fetch OPTIONS [--next OPTIONS ...]`.

Checks the options as a run does, downloads or draws data sets known by name, reads the index of the images, and
downloads the weights. On a cluster, a login node does this before the job is submitted (`regraft submit`), for all
runs of a sweep together: torch takes seconds to import.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

if not __package__:
    # As in main.py: this folder's modules must not pass for others.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from trainer.config.parse import parse
from trainer.errors import UserError

NEXT = "--next"
"""The word between two runs' options."""


def fetch(argv: Sequence[str]) -> None:
    """Check and fetch; what is found is printed.

    Raises:
        UserError: whatever a run would end with before it trains, but for images that cannot be read and for what
            depends on the machine, or on names of the source's classes.

    """
    config = parse(argv)
    # torch takes seconds to import: a wrong option is answered without it.
    from trainer.config.build_data import RunData, dataset_summary, make_epoch_order  # noqa: PLC0415
    from trainer.config.preflight import preflight  # noqa: PLC0415
    from trainer.config.resolve import pretrain_config, resolve  # noqa: PLC0415
    from trainer.data.prepare import prepare  # noqa: PLC0415
    from trainer.model.weights import read_weights  # noqa: PLC0415
    from trainer.report.console import make_console  # noqa: PLC0415
    from trainer.report.progress import progress_hooks  # noqa: PLC0415

    console = make_console(speaks=True)
    config = resolve(config)
    stages = [config, pretrain_config(config)] if config.pretrain.root else [config]
    for stage in stages:
        prepared = prepare(stage.data, workers=1, displays=progress_hooks(console), check=False)
        console.print(dataset_summary(prepared))
        if stage is config:
            preflight(config, RunData(prepared=prepared, order=make_epoch_order(config, prepared.index)))
    if config.model.weights is not None:
        _, source = read_weights(config.model.name, config.model.weights, on_progress=console.print)
        console.print(f"weights: {source}")


def runs(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield each run's options; without any word there is one run, without options."""
    if not words:
        yield []
    for is_next, options in groupby(words, key=NEXT.__eq__):
        if not is_next:
            yield list(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    try:
        for options in runs(sys.argv[1:] if argv is None else argv):
            fetch(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

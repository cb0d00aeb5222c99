"""What `regraft predict` does with its arguments."""

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from regraft.contract import available_cores
from trainer.config.sections.data import DataConfig
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.inference.answers import UNKNOWN, AnswerOptions, require_temperature, require_unknown_threshold
from trainer.inference.file_logits import BatchOptions
from trainer.inference.inputs import ImageLister
from trainer.inference.predictor import find_device
from trainer.inference.processes import Job, predict_files
from trainer.inference.results import PrintedResults, Results, SavedResults, consume, summary
from trainer.inference.rows import CsvColumns, check_format
from trainer.inference.sort_into import ImageSorter
from trainer.model.file import find_model_file, require_metadata
from trainer.report.console import format_duration, make_console
from trainer.report.progress import counting

_MAX_GPU_THREADS = 16
_AMBIGUOUS = (
    f"the model has a class {UNKNOWN}: --threshold gives this label to other images, too; label_1 has their class"
)


def predict_images(arguments: argparse.Namespace, signals: StopSignals) -> None:
    """Predict images, and print or write the results.

    Raises:
        UserError: something that the user can fix.
        Stopped: a stop signal was received; the output has the rows so far.

    """
    if arguments.output is not None:
        check_format(arguments.output)
    console = make_console(enabled=True, stream=sys.stderr)
    model = find_model_file(arguments.model)
    metadata = require_metadata(model)
    threshold = arguments.threshold
    options = AnswerOptions(
        topk=min(arguments.topk, len(metadata.classes)),
        temperature=require_temperature(metadata, model) if arguments.calibrated else 1.0,
        threshold=require_unknown_threshold(metadata, model) if isinstance(threshold, str) else threshold,
        tta=arguments.tta,
    )
    device = find_device(arguments.device)
    num_processes = arguments.nproc or (torch.cuda.device_count() if device == torch.device("cuda") else 1)
    threads = max(1, available_cores() // num_processes)
    if device.type != "cpu":
        threads = min(_MAX_GPU_THREADS, threads)
    batches = BatchOptions(batch_size=arguments.batch_size, threads=threads)
    job = Job(model=model, device=device, options=options, batches=batches)
    lister = ImageLister(DataConfig().extensions, arguments.column, excluded=arguments.sort_into)
    paths, notes = lister.find(arguments.paths, sys.stdin.buffer if sys.stdin is not None else None)
    is_ambiguous = UNKNOWN in metadata.classes and options.threshold is not None
    for note in notes + [_AMBIGUOUS] * is_ambiguous:
        console.print(note)
    with _results(arguments, options, paths, model) as results:
        if results.rows:
            console.print(f"{arguments.output}: going on after {len(results.rows)} images")
        sorter = None
        if arguments.sort_into is not None:
            sorter = ImageSorter(arguments.sort_into, metadata.classes, arguments.sort_mode)
        # A progress bar would break the lines of a CSV on the same terminal.
        progress = make_console(enabled=results.is_saved or not sys.stdout.isatty(), stream=sys.stderr)
        remaining = [path for path in paths if path not in results.rows]
        with (
            signals.deferred(),
            counting(progress, "predicting") as show,
            closing(predict_files(job, remaining, num_processes=num_processes)) as predicted,
        ):
            began = time.monotonic()  # the model is loaded
            for done in consume(predicted, results, sorter):
                if show is not None:
                    show(done, len(paths))
                if signals.received is not None:
                    break
            seconds = time.monotonic() - began
            results.finish()
    for line in summary([*results.rows.values()]):
        console.print(line)
    if remaining:
        count = len(remaining) - sum(path not in results.rows for path in paths)
        console.print(f"{count} images in {format_duration(seconds)}, {count / seconds:.1f} per second")
    missing = sum(path not in results.rows for path in paths)
    if missing and signals.received is not None:
        saved = f"image {len(paths) - missing} of {len(paths)}" if results.is_saved else None
        raise Stopped(signal.Signals(signals.received).name, saved=saved)
    if all(row.prediction is None for row in results.rows.values()):
        raise UserError(f"none of the {len(paths)} images can be read")


def _results(arguments: argparse.Namespace, options: AnswerOptions, paths: Sequence[str], model: Path) -> Results:
    has_ranks = options.topk > 1 or options.threshold is not None
    columns = CsvColumns(options.topk if has_ranks else 0)
    if arguments.output is None:
        return PrintedResults(paths, columns)
    words = {"paths": arguments.paths, "column": arguments.column}
    folder = working_folder(arguments.paths, arguments.output)
    return SavedResults(
        arguments.output, paths, columns, {"model": _digest(model), **asdict(options), **words, **folder}
    )


def working_folder(words: Sequence[str], output: Path) -> dict[str, str]:
    """Return the working folder relative to that of the output, if relative paths name other images in another one."""
    is_absolute = all(map(os.path.isabs, words))
    return {} if is_absolute else {"working folder": os.path.relpath(Path.cwd(), output.parent)}


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None

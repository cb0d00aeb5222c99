"""What `regraft check` does with its option --model."""

import argparse

from rich.console import Console

from trainer.check.embeddings import load_embedder
from trainer.check.findings import ModelFindings
from trainer.check.inspection import Inspection
from trainer.check.model_check import check_with_model
from trainer.config.schema import DataConfig
from trainer.data.registry import cache_folder
from trainer.report.progress import counting


def check_model(
    arguments: argparse.Namespace, inspection: Inspection, data: DataConfig, console: Console
) -> ModelFindings:
    """Load the model, and return what it finds.

    Args:
        arguments: of the command line.
        inspection: the images and their files.
        data: the data section of the config.
        console: shows the progress.

    Raises:
        UserError: there is no such model, or it does not fit; see `check_with_model`.

    """
    embedder = load_embedder(
        arguments.model, weights=arguments.weights, device=arguments.device, on_progress=console.print
    )
    with counting(console, "embedding") as show:
        return check_with_model(inspection, embedder, cache=cache_folder(data.cache), seed=data.seed, on_progress=show)

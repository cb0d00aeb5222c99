"""What `regraft check` does with its option --model."""

import argparse
from collections.abc import Callable

from rich.console import Console

from trainer.check.embeddings import load_embedder
from trainer.check.findings import ModelFindings
from trainer.check.inspection import Inspection
from trainer.check.model_check import check_with_model
from trainer.check.neighbors import require_scikit_learn
from trainer.config.sections.data import DataConfig
from trainer.data.registry import cache_folder
from trainer.report.progress import counting


def load_model(arguments: argparse.Namespace, console: Console) -> Callable[[Inspection, DataConfig], ModelFindings]:
    """Load the model; return the function that checks a dataset with it.

    Args:
        arguments: of the command line.
        console: shows the progress.

    Raises:
        UserError: scikit-learn is not installed, there is no such model, or its weights do not fit.

    """
    require_scikit_learn("--model")
    embedder = load_embedder(
        arguments.model, weights=arguments.weights, device=arguments.device, on_progress=console.print
    )

    def check(inspection: Inspection, data: DataConfig) -> ModelFindings:
        with counting(console, "embedding") as show:
            return check_with_model(
                inspection, embedder, cache=cache_folder(data.cache), seed=data.seed, on_progress=show
            )

    return check

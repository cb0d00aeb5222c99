"""Predict image files: the rows of each batch, in the order of the files."""

from collections.abc import Generator, Sequence

from trainer.inference.answers import AnswerOptions, make_predictions
from trainer.inference.file_logits import BatchLogits, FileLogits
from trainer.inference.rows import Row


class FilePredictor:
    """Predicts image files."""

    def __init__(self, logits: FileLogits, classes: Sequence[str], options: AnswerOptions) -> None:
        self._logits, self._classes, self._options = logits, classes, options

    def __call__(self, paths: Sequence[str]) -> Generator[list[Row], None, None]:
        """Yield the rows of each batch, in the order of the paths. Images that cannot be read have an error.

        Raises:
            UserError: see `FileLogits`.

        """
        for batch in self._logits(paths):
            yield self._rows(batch)

    def _rows(self, batch: BatchLogits) -> list[Row]:
        predictions = iter(make_predictions(batch.logits, self._classes, self._options))
        return [
            Row(path, next(predictions) if error is None else None, error)
            for path, error in zip(batch.paths, batch.errors, strict=True)
        ]

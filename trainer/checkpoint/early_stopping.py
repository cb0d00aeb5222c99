"""Early stopping: end a run when no epoch has been better than the best one for too long."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluate import SelectBy
from trainer.report.metrics import Row
from trainer.report.summary import best_row


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """End a run after `patience` epochs without a better one, as in Prechelt 1998, "Early Stopping - But When?".

    An epoch is better if its metric is better, or equal at a lower loss. The same rule selects the best epoch.
    """

    split: str | None
    """Split that the best epoch is selected on; None: there is no such split, and the run never stops early."""
    patience: int | None
    """Number of epochs, 1 or more; None turns early stopping off."""
    select_by: SelectBy = "accuracy"
    """Metric that epochs are compared by."""

    @property
    def selected_on(self) -> str:
        """Return the split that the best epoch is selected on; `test` if there is no other."""
        return self.split or "test"

    def best_row(self, epochs: Sequence[Row]) -> Row:
        """Return the row of the best epoch."""
        return best_row(epochs, self.split, self.select_by)

    def should_stop(self, epochs: Sequence[Row]) -> bool:
        """Return whether none of the last `patience` epochs was better than all before them.

        `epochs` are the rows of the run's epochs in metrics.jsonl, in order.
        """
        if self.patience is None or self.split is None or not epochs:
            return False
        return bool(epochs[-1]["epoch"] - self.best_row(epochs)["epoch"] >= self.patience)

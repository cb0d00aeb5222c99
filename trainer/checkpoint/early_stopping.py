"""Early stopping: whether a run is over before its last epoch; a pure function of its metrics."""

from collections.abc import Sequence

from trainer.report.metrics import Row
from trainer.report.summary import best_row


def should_stop_early(epochs: Sequence[Row], *, part: str, patience: int) -> bool:
    """Return whether none of the last `patience` epochs was better on `part` than all before them.

    Better is what selects the best epoch: a higher accuracy, or an equal one at a lower loss. Patience as in Prechelt
    1998, "Early Stopping - But When?" (criterion UP, counted from the best epoch).

    Args:
        epochs: the rows of the run's epochs (metrics.jsonl), in their order.
        part: of the data, to select on.
        patience: epochs, 1 or more.

    """
    if not epochs:
        return False
    return bool(epochs[-1]["epoch"] - best_row(epochs, part)["epoch"] >= patience)

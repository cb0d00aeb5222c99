"""Whether two runs differ beyond chance, by McNemar's test (1947)."""

import math
from dataclasses import dataclass

from trainer.pages.run_record import RunRecord

_MAX_EXACT = 2000
"""Up to this number of images on which two runs differ, the test is exact."""


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same images: on which of them one is right and the other is wrong (McNemar 1947)."""

    images: int
    only_first: int
    """Images that only the first run predicts correctly."""
    only_second: int

    @property
    def p_value(self) -> float:
        """Return the probability of a difference of at least this size, if both runs are equally good."""
        total, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if total == 0:
            return 1.0
        if total > _MAX_EXACT:
            return math.erfc((abs(self.only_first - self.only_second) - 1) / math.sqrt(2 * total))
        tail: int = sum(math.comb(total, count) for count in range(least + 1))
        return float(min(1.0, 2 * tail / 2**total))


def paired_test(first: RunRecord, second: RunRecord) -> PairedTest | None:
    """Return the comparison of two runs on the images that both have predicted; None if there are none."""
    outcomes = []
    for run in (first, second):
        split = run.reported.split if run.reported is not None else ""
        outcomes.append({entry.path: entry.is_correct for entry in run.predictions if entry.split == split})
    common = outcomes[0].keys() & outcomes[1].keys()
    if not common:
        return None
    pairs = [(outcomes[0][path], outcomes[1][path]) for path in common]
    return PairedTest(len(common), pairs.count((True, False)), pairs.count((False, True)))

"""Reject option: scores that tell images of the classes from images of none of them, and a threshold for them.

Sources: the maximum logit (Hendrycks et al. 2022, Scaling out-of-distribution detection for real-world settings) and
the energy (Liu et al. 2020, Energy-based out-of-distribution detection).
"""

from dataclasses import dataclass

from torch import Tensor

from trainer.evaluation.ranking import auroc
from trainer.model.metadata import UNKNOWN_SCORES, UnknownScore, UnknownThreshold, compute_score

KEPT = 0.95
"""Fraction of the images of the classes that the suggested threshold keeps."""


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """How well a score tells images of the classes (known) from images of none of them (unknown)."""

    score: UnknownScore
    auroc: float
    """Probability that a known image has a higher score than an unknown one."""
    threshold: float
    """Images with a lower score are rejected."""
    known_kept: float
    """Fraction of the known images that the threshold keeps."""
    unknown_rejected: float
    """Fraction of the unknown images that the threshold rejects."""

    def __str__(self) -> str:
        return (
            f"{self.score}: AUROC {self.auroc:.4f}; threshold {self.threshold:.4f} keeps {100 * self.known_kept:.1f} % "
            f"of the images of the classes, and rejects {100 * self.unknown_rejected:.1f} % of the unknown ones"
        )

    @property
    def suggestion(self) -> UnknownThreshold:
        """Return the threshold for the header of the model file."""
        return UnknownThreshold(score=self.score, threshold=self.threshold)


def rate_scores(known: Tensor, unknown: Tensor) -> tuple[ScoreReport, ...]:
    """Return a report for each score, the best one first.

    Args:
        known: logits of images of the classes, float32 [N, K].
        unknown: logits of images of none of them, float32 [M, K].

    """
    reports = []
    for score in UNKNOWN_SCORES:
        higher, lower = compute_score(known, score), compute_score(unknown, score)
        # The largest threshold that keeps enough of the known images: at most 5 % of them have a lower score.
        threshold = higher.sort().values[int((1 - KEPT) * len(higher))].item()
        reports.append(
            ScoreReport(
                score=score,
                auroc=auroc(higher, lower),
                threshold=threshold,
                known_kept=(higher >= threshold).double().mean().item(),
                unknown_rejected=(lower < threshold).double().mean().item(),
            )
        )
    # Of equal scores, the first one, which is simpler to compute elsewhere.
    return tuple(sorted(reports, key=lambda report: -report.auroc))

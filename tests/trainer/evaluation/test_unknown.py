import torch

from trainer.evaluation.unknown import compute_score, rate_scores
from trainer.model.metadata import UnknownThreshold


def test_the_score_that_separates_better_comes_first_and_its_threshold_keeps_95_percent() -> None:
    generator = torch.Generator().manual_seed(1)
    known = torch.randn(200, 4, generator=generator)
    known[:, 0] += 8
    others = torch.randn(100, 4, generator=generator) + 4  # as high on every class: a high energy, no high logit
    best, second = rate_scores(known, others)
    assert (best.score, second.score) == ("max_logit", "energy")
    assert best.auroc > second.auroc > 0.5
    scores = known.amax(1)
    assert best.known_kept == (scores >= best.threshold).double().mean().item() == 0.95
    assert best.unknown_rejected == (others.amax(1) < best.threshold).double().mean().item() > 0.5
    assert best.suggestion == UnknownThreshold(score="max_logit", threshold=best.threshold)
    assert torch.equal(compute_score(known, "energy"), known.logsumexp(1))


def test_one_image_gives_a_threshold() -> None:
    report, _ = rate_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    assert (report.auroc, report.known_kept, report.unknown_rejected) == (1, 1, 1)

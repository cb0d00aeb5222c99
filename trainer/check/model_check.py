"""What `regraft check` finds with a model: near-duplicates by embeddings, and likely label errors."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainer.check.duplicates import connect
from trainer.check.embeddings import Embedder, embed
from trainer.check.findings import Finding, LabelError, ModelFindings
from trainer.check.inspection import Inspection
from trainer.check.label_errors import LabelScores, score_labels
from trainer.check.near_duplicates import find_by_embeddings
from trainer.check.neighbors import require_faiss
from trainer.errors import UserError

_MIN_ACCURACY = 0.5
"""Accuracy of the probe below which its suggestions are more often wrong than right."""


def check_with_model(
    inspection: Inspection,
    embedder: Embedder,
    *,
    cache: Path,
    seed: int,
    on_progress: Callable[[int, int], object] | None = None,
) -> ModelFindings:
    """Return near-duplicates and likely label errors of the readable images.

    Args:
        inspection: the images and their files.
        embedder: computes the embeddings.
        cache: folder that keeps them.
        seed: of the folds.
        on_progress: called with (images embedded, total images).

    Raises:
        UserError: fewer than two images can be read, a feature is not finite, or there are so many images that faiss
            is needed, and it is not installed.

    """
    images, facts = inspection.listing.images, inspection.table.facts
    rows = np.array([row for row, each in enumerate(facts) if each.reason is None], dtype=np.int64)
    if len(rows) < 2:
        raise UserError(f"--model: {len(rows)} of {len(images)} images can be read; expected two or more")
    require_faiss("--model", len(rows))
    digests = [facts[row].digest for row in rows]
    paths = [images[row].path for row in rows]
    features = embed(embedder, paths, digests, cache=cache, on_progress=on_progress)
    # Of equal files, the first one stands for all: they are neighbors of distance 0 already.
    _, first = np.unique(digests, return_index=True)
    pairs = tuple(
        (int(rows[first[one]]), int(rows[first[other]]))
        for one, other in find_by_embeddings(features[first], inspection.table.thumbnails[rows[first]])
    )
    groups = connect(len(images), [*inspection.pairs, *pairs], inspection.listing.groups)
    classes = sorted({image.label for image in images})
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[images[row].label] for row in rows]
    if len({*labels}) < 2:
        return ModelFindings(pairs=pairs)
    scores = score_labels(features, labels, [groups[row] for row in rows], seed=seed)
    errors = tuple(
        LabelError(images[rows[number]], classes[scores.suggested[number]], float(scores.margin[number]))
        for number in scores.errors
    )
    return ModelFindings(pairs=pairs, label_errors=errors, findings=(_describe(errors, scores, embedder),))


def _describe(errors: Sequence[LabelError], scores: LabelScores, embedder: Embedder) -> Finding:
    is_reliable = scores.accuracy >= _MIN_ACCURACY
    message = (
        f"{len(errors)} of {len(scores.margin)} labels are likely to be wrong: a linear probe on the features of "
        f"{embedder.metadata.architecture} agrees with {100 * scores.accuracy:.1f} % of the labels."
    )
    remedy = ""
    if errors:
        remedy = (
            "Look at these images (--html), and move those that are wrong to their class. --exclude-csv lists those of "
            "the training split, to train without them."
        )
    if not is_reliable:
        message += " It hardly knows these classes."
        remedy = "Check with a fine-tuned or a larger model (--model), which suggests better."
    return Finding(
        kind="label-errors",
        severity="warning" if errors and is_reliable else "note",
        message=message,
        remedy=remedy,
        count=len(errors),
        paths=tuple(image.path for image, _, _ in errors),
    )

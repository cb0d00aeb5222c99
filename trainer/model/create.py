"""The target model: the source's design and weights, all but a new output layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trainer.model.batch_norm import guard_single_values
from trainer.model.blocks import Structure, examine
from trainer.model.build import build
from trainer.model.dropout import set_dropout, set_stochastic_depth
from trainer.model.freeze import Stage
from trainer.model.head import find_heads, graft
from trainer.model.source_classes import Labels, copy_rows
from trainer.model.weights import load_weights, read_weights


@dataclass(frozen=True)
class Created:
    """A model ready to train."""

    model: nn.Module
    heads: tuple[str, ...]
    """Dotted names of the new output layers, auxiliary ones included."""
    source: str
    """Where the other layers' weights came from."""
    lines: tuple[str, ...]
    """What was done, for a reader."""
    structure: Structure
    stages: tuple[Stage, ...] = ()
    """What trains when; the model is in the first of them. Without one, all of it trains."""


def create(
    name: str,
    *,
    image_size: int,
    num_classes: int,
    weights: str | None,
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"],
    labels: Labels | None = None,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Created:
    """Build a model with a new head, drawn from torch's generator, and copy the source weights into the rest.

    `labels` are asked for by head_init source-labels alone; a linear probe begins with a drawn head, and is made
    elsewhere, since it sees images. `dropout` and `stochastic_depth` are probabilities, None: the model's own.
    `on_progress` hears one line before a download begins.

    Raises:
        UserError: an unknown name, weights that do not fit, a head that is not found, too small an image, or what
            `source_labels.copy_rows` and `drop` refuse.

    """
    model = build(name, image_size=image_size)
    heads = find_heads(model, image_size)
    graft(model, heads, num_classes, "torch" if head_init == "torch" else "xavier")
    lines = [f"{name}: new output layer{'s' * (len(heads) > 1)} {', '.join(head.name for head in heads)}"]
    if removed := [activation for head in heads for activation in head.activations]:
        lines.append(f"taken out, so that logits have no bound: {', '.join(removed)}")
    source = "from scratch"
    if weights is not None:
        state, source = read_weights(name, weights, on_progress=on_progress)
        report = load_weights(model, heads, state, name=name, image_size=image_size, source=source)
        lines += report.lines()
        if head_init == "source-labels" and labels is not None:
            lines += copy_rows(model, heads[0], state, labels, name=name, weights=weights)
    if dropout is not None:
        lines.append(set_dropout(model, name, dropout))
    if stochastic_depth is not None:
        lines.append(set_stochastic_depth(model, name, stochastic_depth))
    guard_single_values(model)
    return Created(
        model, tuple(head.name for head in heads), source, tuple(lines), examine(model, image_size)
    )

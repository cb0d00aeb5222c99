"""The target model: the source's design and weights, all but a new output layer."""

from collections.abc import Callable
from typing import Literal

from trainer.model.batch_norm import allow_single_value_batches
from trainer.model.blocks import analyze_blocks
from trainer.model.build import build
from trainer.model.built import BuiltModel
from trainer.model.dropout import set_dropout, set_stochastic_depth
from trainer.model.head import find_heads, replace_head
from trainer.model.source_classes import ClassMapping, init_head_from_source_classes
from trainer.model.weights import load_weights, read_weights


def build_model(
    name: str,
    *,
    image_size: int,
    num_classes: int,
    weights: str | None,
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"],
    labels: ClassMapping | None = None,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> BuiltModel:
    """Build a model with a new head, drawn from torch's generator, and copy the source weights into the rest.

    `labels` are asked for by head_init source-labels alone; a linear probe begins with a drawn head, and is made
    elsewhere, since it sees images. `dropout` and `stochastic_depth` are probabilities, None: the model's own.
    `on_progress` hears one line before a download begins.

    Raises:
        UserError: an unknown name, weights that do not fit, a head that is not found, too small an image, or what
            `source_labels.init_head_from_source_classes` and `drop` refuse.

    """
    model = build(name, image_size=image_size)
    heads = find_heads(model, image_size)
    replace_head(model, heads, num_classes, "torch" if head_init == "torch" else "xavier")
    lines = [f"{name}: new output layer{'s' * (len(heads) > 1)} {', '.join(head.name for head in heads)}"]
    if removed := [activation for head in heads for activation in head.activations]:
        lines.append(f"taken out, so that logits have no bound: {', '.join(removed)}")
    source = "from scratch"
    if weights is not None:
        state, source = read_weights(name, weights, on_progress=on_progress)
        report = load_weights(model, heads, state, name=name, image_size=image_size, source=source)
        lines += report.lines()
        if head_init == "source-labels" and labels is not None:
            lines += init_head_from_source_classes(model, heads[0], state, labels, name=name, weights=weights)
    if dropout is not None:
        lines.append(set_dropout(model, name, dropout))
    if stochastic_depth is not None:
        lines.append(set_stochastic_depth(model, name, stochastic_depth))
    allow_single_value_batches(model)
    return BuiltModel(
        model, tuple(head.name for head in heads), source, tuple(lines), analyze_blocks(model, image_size)
    )

"""Build the target model: the source's architecture and weights, with a new output layer."""

from collections.abc import Callable
from typing import Literal

from trainer.errors import UserError
from trainer.model.architectures import is_timm
from trainer.model.batch_norm import allow_single_value_batches
from trainer.model.blocks import analyze_blocks
from trainer.model.build import build
from trainer.model.built import BuiltModel
from trainer.model.dropout import set_dropout, set_stochastic_depth
from trainer.model.gradient_checkpointing import enable_gradient_checkpointing
from trainer.model.head import find_heads, replace_head
from trainer.model.load_weights import load_weights, match_weights
from trainer.model.source_classes import ClassMapping, init_head_from_source_classes
from trainer.model.timm_weights import peek_timm_weights, read_timm_weights
from trainer.model.weights import peek_weights, read_weights


def build_model(
    name: str,
    *,
    image_size: int,
    num_classes: int,
    weights: str | None,
    weights_key: str = "auto",
    allow_partial_weights: bool = False,
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"],
    class_mapping: ClassMapping | None = None,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
    gradient_checkpointing: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> BuiltModel:
    """Build a model with a new, random output layer, and copy the source weights into all other layers.

    Args:
        name: architecture.
        image_size: side of the square images in pixels.
        num_classes: outputs of the new output layer.
        weights: a name of torchvision's weights, DEFAULT for timm's, a file, or None for random weights.
        weights_key: key or prefix of the model in the file.
        allow_partial_weights: whether tensors of the backbone that the weights lack may stay random.
        head_init: initialization of the output layer. For linear-probe it is Xavier-uniform here; `fit_head` fits it.
        class_mapping: for head_init source-labels.
        dropout: probability; None keeps the model's own.
        stochastic_depth: probability; None keeps the model's own.
        gradient_checkpointing: whether the blocks recompute their activations in the backward pass.
        on_progress: called with one line before a download.

    Raises:
        UserError: the name is unknown, the image size is unsuitable, the weights do not fit, the output layer is not
            found, or an option does not apply to the model.

    """
    model = build(name, image_size=image_size, dropout=dropout, stochastic_depth=stochastic_depth)
    try:
        heads = find_heads(model, image_size)
    except UserError as error:  # which names the class of the model
        raise UserError(f"{name}: {error}") from None
    # The layers of a distilled model make its logits together; those of GoogLeNet and Inception are auxiliary ones.
    main_heads = heads if is_timm(name) else heads[:1]
    if head_init == "linear-probe" and len(main_heads) > 1:
        raise UserError(
            f"model.head_init is linear-probe, but the logits of {name} are made by {len(main_heads)} layers, "
            f"{', '.join(head.name for head in main_heads)}: choose xavier or source-labels"
        )
    replace_head(model, heads, num_classes, "torch" if head_init == "torch" else "xavier")
    lines = [f"{name}: new output layer{'s' * (len(heads) > 1)} {', '.join(head.name for head in heads)}"]
    if activations := [activation for head in heads for activation in head.activations]:
        lines.append(f"removed, because it would clip the logits: {', '.join(activations)}")
    source = "from scratch"
    if weights is not None:
        if is_timm(name):
            read = read_timm_weights(name, weights, model, key=weights_key, on_progress=on_progress)
        else:
            read = read_weights(name, weights, list(model.state_dict()), key=weights_key, on_progress=on_progress)
        report = load_weights(model, heads, read, name=name, image_size=image_size, allow_partial=allow_partial_weights)
        source = read.source
        lines += [*report.lines(), *read.notes]
        if head_init == "source-labels" and class_mapping is not None:
            for head in main_heads:
                report_lines = init_head_from_source_classes(
                    model, head, read.tensors, class_mapping, name=name, weights=weights
                )
                lines += report_lines if head is main_heads[0] else []
    if dropout is not None:
        lines.append(set_dropout(model, name, dropout))
    if stochastic_depth is not None:
        lines.append(set_stochastic_depth(model, name, stochastic_depth))
    allow_single_value_batches(model)
    head_names, layer_order = tuple(head.name for head in heads), analyze_blocks(model, image_size)
    if gradient_checkpointing:
        names = enable_gradient_checkpointing(model, [block.name for block in layer_order.blocks], head_names)
        lines.append(f"gradient checkpointing of {len(names)} blocks, {names[0]} to {names[-1]}")
    return BuiltModel(model, head_names, source, tuple(lines), layer_order)


def check_weights(
    name: str, *, image_size: int, weights: str, weights_key: str = "auto", allow_partial_weights: bool = False
) -> None:
    """Raise the UserError that `build_model` would raise for the weights, without reading most of their values.

    Weights that have to be downloaded are not checked.

    Args:
        name: architecture.
        image_size: side of the square images in pixels.
        weights: a name of torchvision's weights, DEFAULT for timm's, or a file.
        weights_key: key or prefix of the model in the file.
        allow_partial_weights: whether tensors of the backbone that the weights lack may stay random.

    Raises:
        UserError: the weights are missing, cannot be read, or do not fit.

    """
    model = build(name, image_size=image_size, empty=True)
    if is_timm(name):
        read = peek_timm_weights(name, weights, model, key=weights_key)
    else:
        read = peek_weights(name, weights, list(model.state_dict()), key=weights_key)
    if read is not None:
        heads = find_heads(model, image_size)
        match_weights(model, heads, read, name=name, image_size=image_size, allow_partial=allow_partial_weights)

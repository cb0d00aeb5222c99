"""Split a model where it begins to train: the frozen layers before, and the rest (Python graph of torch.fx).

The output of the frozen layers, the features of an image, depends on nothing that changes during a stage: on no
trainable parameter, on no BatchNorm statistics that are still updated, on no dropout mask, and on no other image.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from trainer.model.batch_norm import is_frozen

_PROBABILITIES = ("p", "dropout", "attention_dropout")
"""Names of the probabilities of random functions, such as `dropout` and torchvision's `stochastic_depth`."""
_RANDOM_NAMES = ("dropout", "rand", "bernoulli", "multinomial", "normal_", "uniform_")


@dataclass(frozen=True)
class FrozenSplit:
    """A model in two parts that share its modules and parameters: `rest(prefix(images))` is `model(images)`."""

    prefix: fx.GraphModule
    """Input of the model [B, 3, H, W] -> features, one tensor."""
    rest: fx.GraphModule
    """Features -> outputs of the model."""
    node: str
    """Name of the features in the model's graph."""
    layer: str
    """Name of the first layer of the rest, whose input the features are."""


def split_frozen(model: nn.Module, *, training: bool) -> FrozenSplit | None:
    """Split a model at the last tensor that is frozen and that all later layers depend on.

    Parameters are frozen if they require no gradient, and BatchNorm statistics as `freeze_batch_norm` marks them.

    Args:
        model: torch.fx can trace all of torchvision's classification models, and most of timm's.
        training: split the forward pass of training, with active dropout, or that of evaluation.

    Returns:
        The split, or None if no layer with parameters comes before the first one that changes, or if torch.fx cannot
        trace the model.

    """
    try:
        graph = _trace(model, training=training)
    except Exception:  # noqa: BLE001 (a model's code may raise anything for a placeholder of a tensor)
        return None
    node = _last_frozen(graph, model, training=training)
    if node is None:
        return None
    split = _split(model, graph, node)
    return split if any(True for _ in split.prefix.parameters()) else None


def split_at(model: nn.Module, node: str, *, training: bool) -> FrozenSplit:
    """Split a copy of a model at the same node as the model."""
    graph = _trace(model, training=training)
    return _split(model, graph, next(other for other in graph.nodes if other.name == node))


class _Tracer(fx.Tracer):
    """Traces a model down to its layers of torch.nn, and to trainable blocks whose `forward` was replaced.

    Gradient checkpointing replaces it; without gradients, such a block computes what its layers compute. A BatchNorm
    layer of another class, such as timm's with an activation, is one layer too: its mode is its own.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_replaced = "forward" in vars(m) and any(parameter.requires_grad for parameter in m.parameters())
        return is_replaced or isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, *, training: bool) -> fx.Graph:
    """Return the graph of a forward pass."""
    with _in_mode(model, training=training), torch.no_grad():
        return _Tracer().trace(model)


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the mode of all modules, frozen BatchNorm layers included, within a block."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _last_frozen(graph: fx.Graph, model: nn.Module, *, training: bool) -> fx.Node | None:
    """Return the last frozen node that alone passes on what later nodes receive of the images."""
    of_images = _of_images(graph)
    frozen: set[fx.Node] = set()
    visited: set[fx.Node] = set()
    in_use: list[fx.Node] = []
    last = None
    for node in graph.nodes:
        visited.add(node)
        if all(arg in frozen for arg in node.all_input_nodes) and _is_frozen(node, model, training=training):
            frozen.add(node)
        elif node in of_images:
            break
        if node in of_images:
            in_use = [other for other in (*in_use, node) if not visited.issuperset(other.users)]
            if in_use == [node]:
                last = node
    return last


def _of_images(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the model's input."""
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not nodes.isdisjoint(node.all_input_nodes):
            nodes.add(node)
    return nodes


def _is_frozen(node: fx.Node, model: nn.Module, *, training: bool) -> bool:
    """Return whether a node's value is always the same for the same arguments."""
    if node.op == "call_module":
        return all(_is_frozen_layer(m, training=training) for m in model.get_submodule(str(node.target)).modules())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return not getattr(model.get_submodule(owner), name).requires_grad
    if node.op in ("call_function", "call_method"):
        return not _is_random(node)
    return node.op == "placeholder"


def _is_frozen_layer(layer: nn.Module, *, training: bool) -> bool:
    if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
        return False
    if isinstance(layer, _BatchNorm):  # without running statistics, an output depends on the other images
        return layer.running_mean is not None and is_frozen(layer)
    if isinstance(layer, _NormBase):  # InstanceNorm
        return not layer.track_running_stats
    if isinstance(layer, _DropoutNd):
        return not (training and layer.p)
    if isinstance(layer, nn.MultiheadAttention):
        return not (training and layer.dropout)
    return not (training and isinstance(layer, nn.RReLU))


def _is_random(node: fx.Node) -> bool:
    """Return whether a function or method of a graph draws random numbers."""
    if node.kwargs.get("dropout_p"):  # of scaled_dot_product_attention
        return True
    if node.op == "call_function":
        try:
            bound = inspect.signature(cast("type", node.target)).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # a function in C has no signature
            pass
        else:
            bound.apply_defaults()
            if "training" in bound.arguments:
                probabilities = [bound.arguments[name] for name in _PROBABILITIES if name in bound.arguments]
                return bool(bound.arguments["training"]) and not (probabilities and all(p == 0 for p in probabilities))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(word in name for word in _RANDOM_NAMES)


def _split(model: nn.Module, graph: fx.Graph, node: fx.Node) -> FrozenSplit:
    """Return the graph up to and including a node, and the graph after it."""
    nodes, of_images = list(graph.nodes), _of_images(graph)
    end = nodes.index(node) + 1
    prefix, rest = fx.Graph(), fx.Graph()
    copies = _copy(nodes[:end], of_images, prefix, {})
    prefix.output(copies[node])
    _copy(nodes[end:], of_images, rest, {node: rest.placeholder("features")}, constants=nodes[:end])
    first = next((other for other in rest.nodes if other.op in ("call_module", "get_attr")), node)
    return FrozenSplit(
        prefix=fx.GraphModule(model, prefix, "FrozenPrefix"),
        rest=fx.GraphModule(model, rest, "TrainablePart"),
        node=node.name,
        layer=str(first.target) if first.op == "call_module" else str(first.target).rpartition(".")[0],
    )


def _copy(
    nodes: Sequence[fx.Node],
    of_images: set[fx.Node],
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    constants: Sequence[fx.Node] = (),
) -> dict[fx.Node, fx.Node]:
    """Copy nodes that depend on the images to another graph, with the parameters and constants that they use."""
    used = of_images.intersection(nodes)
    candidates = (*constants, *nodes)
    for node in reversed(candidates):
        if node in used:
            used.update(arg for arg in node.all_input_nodes if arg not in of_images)
    for node in candidates:
        if node in used:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies

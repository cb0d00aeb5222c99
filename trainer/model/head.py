"""The output layer: found by walking back from the logits, then replaced by one for other classes.

Order: `build` -> `find_heads` -> `replace_head` -> `weights.load_weights`. The search runs the model on the meta
device: it takes no memory, and leaves parameters, buffers, modes and random numbers as they were.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from trainer.errors import UserError

# Weights of the auxiliary losses: Szegedy et al. 2014, section 5 (GoogLeNet); Inception v3 as torchvision's
# and PyTorch's transfer-learning tutorial trains it.
GOOGLENET_AUXILIARY = 0.3
INCEPTION_AUXILIARY = 0.4

# A parameter may reach its layer through these: `x @ w.T` has a transpose between.
_VIEWS = (
    "AliasBackward", "CloneBackward", "ExpandBackward", "PermuteBackward", "ReshapeAliasBackward",
    "SqueezeBackward", "TBackward", "ToCopyBackward", "TransposeBackward", "UnsafeViewBackward",
    "UnsqueezeBackward", "ViewBackward",
)  # fmt: skip
# These bend what comes out of the layer, mostly by a bound, so that it would not be logits. (Logarithms of
# probabilities are: cross-entropy takes the logarithm of their softmax, which changes nothing.)
_NONLINEAR = (
    "Celu", "Clamp", "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish",
    "Relu", "Sigmoid", "Silu", "Softmax", "Softplus", "Tanh", "Threshold",
)  # fmt: skip

_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Head:
    """An output layer."""

    name: str
    """Dotted path, as in `model.named_modules()`."""
    auxiliary: bool
    """It feeds a loss in training only."""
    in_features: int
    out_features: int
    activations: tuple[str, ...] = ()
    """Modules between it and the output that bend its values, as SqueezeNet's last ReLU does."""


@dataclass(frozen=True)
class _Trial:
    """One training forward of 2 examples on the meta device."""

    outputs: Any
    parameters: dict[int, list[str]] = field(repr=False)
    """id of a leaf of the graph -> the parameter's names; several where it is shared."""
    calls: dict[str, list[Node | None]] = field(repr=False)
    """Module -> the graph's node of each of its outputs, in order."""
    leaves: list[Tensor] = field(repr=False)
    """Keeps the leaves alive, so that their ids stay theirs."""


def trial_forward(
    model: nn.Module, image_size: int, *, other: Mapping[str, tuple[int, ...]] | None = None
) -> _Trial:
    """Run a training forward on float [2, 3, image_size, image_size] without memory or side effects.

    `other` gives parameters another shape for this run.

    Raises:
        UserError: the model cannot take such images.

    """
    names: defaultdict[int, list[str]] = defaultdict(list)
    stand_ins: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if id(tensor) not in stand_ins:
            shape = (other or {}).get(name, tuple(tensor.shape))
            leaf = torch.empty(shape, dtype=tensor.dtype, device="meta")
            stand_ins[id(tensor)] = leaf.requires_grad_(
                isinstance(tensor, nn.Parameter) and leaf.is_floating_point()
            )
        tensors[name] = stand_ins[id(tensor)]
        names[id(tensors[name])].append(name)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    calls: defaultdict[str, list[Node | None]] = defaultdict(list)
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        # A factory called within forward makes meta tensors too.
        for context in (torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("meta")):
            stack.enter_context(context)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(_recorder(calls[name])).remove)
        try:
            for module in modes:
                module.training = True
            images = torch.empty(2, 3, image_size, image_size, dtype=dtype, device="meta")
            outputs = functional_call(model, tensors, (images,), tie_weights=False)
        except Exception as error:  # whatever a model's code may raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{type(model).__name__} cannot take images of {image_size} x {image_size} px: {reason}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
    return _Trial(outputs, dict(names), dict(calls), list(stand_ins.values()))


def _recorder(calls: list[Node | None]) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(output.grad_fn if isinstance(output, Tensor) else None)

    return record


def split_outputs(outputs: Any) -> tuple[Tensor, tuple[tuple[float, Tensor], ...]]:
    """Return (logits [B, K], ((weight of its loss, auxiliary logits [B, K]), ...)) of a model's outputs.

    Raises:
        UserError: outputs that are neither a tensor nor GoogLeNet's or Inception's.

    """
    if isinstance(outputs, Tensor):
        return outputs, ()
    if isinstance(outputs, GoogLeNetOutputs):
        both = ((GOOGLENET_AUXILIARY, outputs.aux_logits1), (GOOGLENET_AUXILIARY, outputs.aux_logits2))
        return outputs.logits, tuple((weight, logits) for weight, logits in both if logits is not None)
    if isinstance(outputs, InceptionOutputs):
        auxiliary = outputs.aux_logits
        return outputs.logits, () if auxiliary is None else ((INCEPTION_AUXILIARY, auxiliary),)
    raise UserError(
        f"the model returns {type(outputs).__name__}; expected logits [B, classes], or the outputs of "
        "torchvision's GoogLeNet or Inception: classification models only"
    )


def find_heads(model: nn.Module, image_size: int) -> tuple[Head, ...]:
    """Return the main output layer, then the auxiliary ones, in the order of the outputs.

    An output layer is the last Linear or Conv on the way to the logits. That each of them decides alone how
    many logits come out is tried, by a second forward with twice as many.

    Raises:
        UserError: an output does not come from one Linear or Conv of its own, or `image_size` does not fit.

    """
    trial = trial_forward(model, image_size)
    main, auxiliary = split_outputs(trial.outputs)
    outputs = [main, *(logits for _, logits in auxiliary)]
    uses = _count_uses(outputs)
    heads = tuple(_find(model, trial, uses, output, is_auxiliary=i > 0) for i, output in enumerate(outputs))
    doubled = {
        f"{head.name}.{name}": (2 * p.shape[0], *p.shape[1:])
        for head in heads
        for name, p in model.get_submodule(head.name).named_parameters(recurse=False)
    }
    try:
        again, others = split_outputs(trial_forward(model, image_size, other=doubled).outputs)
    except UserError as error:
        raise UserError(
            f"{_names(heads)} cannot be replaced by a layer of another size: the model needs "
            f"{heads[0].out_features} outputs of it ({error})"
        ) from error
    for head, output in zip(heads, [again, *(logits for _, logits in others)], strict=True):
        if tuple(output.shape) != (2, 2 * head.out_features):
            raise UserError(
                f"the number of logits does not follow from {head.name} alone: with {2 * head.out_features} "
                f"outputs the model gives {list(output.shape)} for 2 images; a new head cannot be grafted"
            )
    return heads


def _names(heads: Sequence[Head]) -> str:
    return ", ".join(head.name for head in heads)


def _find(
    model: nn.Module, trial: _Trial, uses: Mapping[int, int], output: Tensor, *, is_auxiliary: bool
) -> Head:
    """Return the head that `output` comes from."""
    found, path = _walk_back(trial, output)
    what = "an auxiliary output" if is_auxiliary else "the model's output"
    owners = {name.rpartition(".")[0] for names in found.values() for name in names}
    if not owners:
        raise UserError(
            f"{what} does not depend on any parameter; expected the logits of a Linear or Conv layer"
        )
    described = " and ".join(sorted(_describe(model, owner) for owner in owners))
    layer = model.get_submodule(next(iter(owners)))
    if len(owners) > 1 or not isinstance(layer, _Layer):
        raise UserError(
            f"{what} comes from {described}; expected one Linear or Conv layer, followed by nothing with "
            "parameters, and sharing its own with no other"
        )
    name = next(iter(owners))
    weight = next((i for i, names in found.items() if f"{name}.weight" in names), None)
    if weight is None or not name:
        raise UserError(
            f"{what} comes from {described}, which is not a layer of its own that could be replaced"
        )
    if uses[weight] > 1 or len(trial.calls[name]) > 1:
        raise UserError(
            f"{what} comes from {described}, which the model also uses elsewhere: it cannot be replaced by a "
            "layer with another number of outputs; give the model an output layer of its own"
        )
    rows, columns = layer.weight.shape[0], layer.weight.shape[1]
    if tuple(output.shape) != (2, rows):
        raise UserError(
            f"{what} is {list(output.shape)} for 2 images although {described} has {rows} outputs; "
            f"expected logits {[2, rows]}"
        )
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    if groups > 1:
        raise UserError(
            f"{what} comes from {described} with {groups} groups; a head of another size needs groups=1"
        )
    return Head(name, is_auxiliary, columns, rows, tuple(_activations(model, trial, path, what)))


def _describe(model: nn.Module, name: str) -> str:
    return f"{type(model.get_submodule(name)).__name__} {name or '(the whole model)'}"


def _walk_back(trial: _Trial, output: Tensor) -> tuple[dict[int, list[str]], list[Node]]:
    """Return the parameters met first (id of the leaf -> names), and the nodes that lie between."""
    found: dict[int, list[str]] = {}
    path: list[Node] = []
    seen: set[Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [n for n, _ in node.next_functions]
        leaves = {id(leaf): trial.parameters[id(leaf)] for n in following if (leaf := _leaf(n)) is not None}
        found |= leaves
        # A bias may be added by a node of its own, on the way to its weight.
        if all(name.rpartition(".")[2] == "bias" for names in leaves.values() for name in names):
            path.append(node)
            waiting += [n for n in following if _leaf(n) is None]
    return found, path


def _leaf(node: Node | None) -> Tensor | None:
    """Return the parameter that comes in here as it is or as a view of it."""
    while node is not None:
        if hasattr(node, "variable"):
            return cast(Tensor, node.variable)
        following = [n for n, _ in node.next_functions if n is not None]
        if len(following) != 1 or not node.name().startswith(_VIEWS):
            return None
        node = following[0]
    return None


def _count_uses(outputs: Sequence[Tensor]) -> defaultdict[int, int]:
    """Return id of a leaf -> how often anything in the graph uses it."""
    uses: defaultdict[int, int] = defaultdict(int)
    for node in _graph(outputs):
        for following, _ in node.next_functions:
            if hasattr(following, "variable"):
                uses[id(cast(Any, following).variable)] += 1
    return uses


def _graph(outputs: Sequence[Tensor]) -> Iterator[Node]:
    seen: set[Node] = set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [n for n, _ in node.next_functions]


def _activations(model: nn.Module, trial: _Trial, path: Sequence[Node], what: str) -> Iterator[str]:
    """Yield the modules on the path that bend the logits."""
    for node in path:
        if not node.name().startswith(_NONLINEAR):
            continue
        modules = [
            name
            for name, nodes in trial.calls.items()
            if any(n is node for n in nodes) and _is_activation(model.get_submodule(name))
        ]
        if len(modules) != 1 or len(trial.calls[modules[0]]) != 1:
            raise UserError(
                f"{what} passes through {node.name().partition('Backward')[0]} after its layer, which is not "
                "a module of its own that could be taken out: bounded outputs are no logits"
            )
        yield modules[0]


def _is_activation(module: nn.Module) -> bool:
    """Return whether a module may have made a node itself; containers and identities only pass it on."""
    return not isinstance(module, nn.Identity) and next(module.children(), None) is None


def replace_head(
    model: nn.Module, heads: Sequence[Head], num_classes: int, init: Literal["xavier", "torch"]
) -> None:
    """Replace each head, in place, by a new layer of the same kind with `num_classes` outputs.

    Activations between a head and the output become identities. `xavier` draws the weight Xavier-uniformly
    (Glorot & Bengio 2010, eq. 16) and leaves the bias to the layer's own default; `torch` leaves both to it.
    Draws from torch's current random numbers, head by head.

    Raises:
        UserError: `num_classes` is not positive.

    """
    if num_classes < 1:
        raise UserError(f"a head needs at least one output, not {num_classes}")
    for head in heads:
        old = cast(_Layer, model.get_submodule(head.name))
        new = _layer_like(old, num_classes)
        if init == "xavier":
            nn.init.xavier_uniform_(new.weight)
        model.set_submodule(head.name, new.train(old.training))
        for name in head.activations:
            model.set_submodule(name, nn.Identity())


def _layer_like(old: _Layer, num_classes: int) -> _Layer:
    place: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, num_classes, bias=old.bias is not None, **place)
    make = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, kind))
    settings: dict[str, Any] = {
        name: copy.copy(getattr(old, name))
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    return make(old.in_channels, num_classes, bias=old.bias is not None, **settings, **place)

"""The blocks of a model in the order of the forward pass, and the parameters that `transfer.trainable` selects.

The order is that of a forward pass, not of `named_modules`: early layers are more general, late layers more
specific to the data (Yosinski et al. 2014, How transferable are features in deep neural networks?).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from trainer.errors import UserError
from trainer.model.head import trial_forward
from trainer.model.patterns import match_names

_MIN_BLOCKS = 5
"""The largest block is split while there are fewer blocks."""
_MAX_SHARE = 0.8
"""The largest block is split while it holds a greater share of the parameters."""


@dataclass(frozen=True)
class Block:
    """A group of parameters that follow one another in the forward pass."""

    name: str
    """Name of the module, or of the parameter if that belongs directly to a split module."""
    parameters: tuple[str, ...]
    """Names of the parameters, in the order of their first use."""


@dataclass(frozen=True, kw_only=True)
class LayerOrder:
    """A model's parameters and blocks in the order of the forward pass."""

    order: Mapping[str, int]
    """Parameter name -> position in the forward pass."""
    blocks: tuple[Block, ...]

    @property
    def depth(self) -> dict[str, int]:
        """Return parameter name -> number of blocks after its own."""
        return {name: after for after, block in enumerate(reversed(self.blocks)) for name in block.parameters}


def analyze_blocks(model: nn.Module, image_size: int) -> LayerOrder:
    """Return the layer order of a model for images of `image_size` x `image_size` px.

    Raises:
        UserError: the model cannot take such images.

    """
    order = execution_order(model, image_size)
    return LayerOrder(order=order, blocks=split_into_blocks(model, order))


def execution_order(model: nn.Module, image_size: int) -> dict[str, int]:
    """Return parameter name -> position in the forward pass.

    The position is that of the first call of the innermost module that holds the parameter and is called.

    Raises:
        UserError: the model cannot take such images.

    """
    first_call: dict[str, int] = {}

    def record(name: str) -> None:
        first_call.setdefault(name, len(first_call))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda module, args, name=name: record(name))
            stack.callback(hook.remove)
        trial_forward(model, image_size)
    return {
        name: next(first_call[parent] for parent in _parents(name) if parent in first_call)
        for name, _ in model.named_parameters()
    }


def _parents(name: str) -> Iterator[str]:
    """Yield the modules that hold a parameter or module, from the innermost to the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def split_into_blocks(model: nn.Module, order: Mapping[str, int]) -> tuple[Block, ...]:
    """Return the model's blocks in the order of `execution_order`.

    Blocks are the model's children. If there are only a few of them (`features` and `classifier`), or one of them holds
    nearly all parameters, the largest one is split into its own children. A child without a layer of its own (a
    norm, a position embedding) belongs to the block before it.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def size(block: Block) -> int:
        return sum(sizes[name] for name in block.parameters)

    blocks = _child_blocks(model, "", order)
    while True:
        largest = max((block for block in blocks if _can_split(model, block)), key=size, default=None)
        if largest is None or (len(blocks) >= _MIN_BLOCKS and size(largest) <= _MAX_SHARE * sum(sizes.values())):
            break
        blocks = [block for block in blocks if block is not largest]
        blocks += _child_blocks(model, largest.name, order)
    return tuple(_merge_norms(model, sorted(blocks, key=lambda block: order[block.parameters[0]])))


def _child_blocks(model: nn.Module, name: str, order: Mapping[str, int]) -> list[Block]:
    """Return one block for each child of a module, and for each parameter that belongs to it directly."""
    prefix = f"{name}." if name else ""
    children: dict[str, list[str]] = {}
    for parameter in sorted((p for p in order if p.startswith(prefix)), key=order.__getitem__):
        child = prefix + parameter.removeprefix(prefix).split(".")[0]
        children.setdefault(child, []).append(parameter)
    return [Block(child, tuple(parameters)) for child, parameters in children.items()]


def _can_split(model: nn.Module, block: Block) -> bool:
    if block.name in block.parameters:
        return False
    children = list(model.get_submodule(block.name).children())
    return len(children) > 1 or any(True for child in children for _ in child.parameters())


def _merge_norms(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks, with those that hold no layer merged into the block before (the first ones: after) them."""
    merged: list[Block] = []
    leading: tuple[str, ...] = ()
    for block in blocks:
        has_layer = block.name not in block.parameters and any(
            model.get_parameter(name).ndim > 1 for name in block.parameters
        )
        if has_layer:
            merged.append(Block(block.name, leading + block.parameters))
            leading = ()
        elif merged:
            merged[-1] = Block(merged[-1].name, merged[-1].parameters + block.parameters)
        else:
            leading += block.parameters
    return merged


def trainable_parameters(
    selection: str, model: nn.Module, heads: Sequence[str], layer_order: LayerOrder
) -> frozenset[str]:
    """Return the names of the parameters to train. Those of the new output layers are always among them.

    Args:
        selection: `all`; `head`; `from:MODULE`, that module and everything after it in the forward pass; `last:N`, the
            last N blocks, including the output layer's; or modules and patterns of parameter names, as in `layer4,
            *.bias`.
        model: with its new output layers.
        heads: names of the output layers.
        layer_order: of the model.

    Raises:
        UserError: the selection has another form, or matches nothing in this model.

    """
    order = layer_order.order
    in_heads = {name for name in order if any(name.startswith(f"{head}.") for head in heads)}
    kind, colon, argument = selection.partition(":")
    argument = argument.strip()
    if selection == "all":
        selected = set(order)
    elif selection == "head":
        selected = set()
    elif kind == "from" and colon:
        start = _first_position(argument, model, order)
        selected = {name for name, position in order.items() if position >= start}
    elif kind == "last" and colon:
        selected = {name for block in _last_blocks(argument, layer_order.blocks) for name in block.parameters}
    else:
        selected = _match_patterns(selection, order)
    return frozenset(selected | in_heads)


def _first_position(module: str, model: nn.Module, order: Mapping[str, int]) -> int:
    positions = [position for name, position in order.items() if name.startswith(f"{module}.")]
    if not positions:
        names = [name for name, m in model.named_modules() if name and any(True for _ in m.parameters())]
        close = difflib.get_close_matches(module, names, n=3)
        suggestion = f"Did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"transfer.trainable is 'from:{module}', but this model has no module {module!r} with parameters. "
            f"{suggestion}Its modules are {', '.join(name for name in names if '.' not in name)}"
        )
    return min(positions)


def _last_blocks(count: str, blocks: Sequence[Block]) -> Sequence[Block]:
    if not (count.isascii() and count.isdigit() and 1 <= int(count) <= len(blocks)):
        raise UserError(
            f"transfer.trainable is 'last:{count}': expected last:1 to last:{len(blocks)}; the blocks of this model "
            f"are {', '.join(block.name for block in blocks)}"
        )
    return blocks[-int(count) :]


def _match_patterns(selection: str, order: Mapping[str, int]) -> set[str]:
    selected: set[str] = set()
    for pattern in (text.strip() for text in selection.split(",")):
        names = match_names(pattern, order)
        if not names:
            raise UserError(
                f"transfer.trainable is {selection!r}: expected all, head, from:MODULE, last:N, or modules and "
                f"patterns of parameter names; {pattern!r} matches no parameter of this model, such as "
                f"{', '.join(list(order)[:3])}"
            )
        selected |= names
    return selected

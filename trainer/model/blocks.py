"""A model as a row of blocks, in the order in which a picture passes through them; and what of it trains.

The order is that of a forward pass, not of `named_modules`: what comes first is more general, what comes last more
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

_ENOUGH = 5
"""Blocks; with fewer, the largest one is taken apart."""
_NEARLY_ALL = 0.8
"""Share of the parameters with which a block is taken apart."""


@dataclass(frozen=True)
class Block:
    """A stretch of the model."""

    name: str
    """Of its module; of a parameter that lies directly in a taken-apart one, the parameter's."""
    parameters: tuple[str, ...]
    """Names, in the order of their first use."""


@dataclass(frozen=True, kw_only=True)
class LayerOrder:
    """A model in the order in which a picture passes through it."""

    order: Mapping[str, int]
    """Parameter name -> when the forward pass comes to it."""
    blocks: tuple[Block, ...]

    @property
    def depth(self) -> dict[str, int]:
        """Return parameter name -> how many blocks come after its own."""
        return {name: after for after, block in enumerate(reversed(self.blocks)) for name in block.parameters}


def analyze_blocks(model: nn.Module, image_size: int) -> LayerOrder:
    """Return the structure of a model on images of `image_size` x `image_size` px.

    Raises:
        UserError: the model cannot take such images.

    """
    order = execution_order(model, image_size)
    return LayerOrder(order=order, blocks=blocks(model, order))


def execution_order(model: nn.Module, image_size: int) -> dict[str, int]:
    """Return parameter name -> when the forward pass comes to it.

    A parameter's time is that at which the innermost module that holds it and is called is first entered.

    Raises:
        UserError: the model cannot take such images.

    """
    entered: dict[str, int] = {}

    def note(name: str) -> None:
        entered.setdefault(name, len(entered))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_pre_hook(lambda module, args, name=name: note(name))
            stack.callback(hook.remove)
        trial_forward(model, image_size)
    return {
        name: next(entered[owner] for owner in _owners(name) if owner in entered)
        for name, _ in model.named_parameters()
    }


def _owners(name: str) -> Iterator[str]:
    """Yield the modules that hold a parameter or module, from the innermost to the whole model."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def blocks(model: nn.Module, order: Mapping[str, int]) -> tuple[Block, ...]:
    """Return the model's blocks, in the order of `execution_order`.

    They are its children. While these are few (`features` and `classifier`), or nearly all of the model is one of them,
    the largest that is a row of modules is taken apart. What holds no layer of its own (a norm, a position
    embedding) belongs to the block before it.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def size(block: Block) -> int:
        return sum(sizes[name] for name in block.parameters)

    found = _parts(model, "", order)
    while True:
        rows = [block for block in found if _can_part(model, block)]
        largest = max(rows, key=size, default=None)
        if largest is None or (len(found) >= _ENOUGH and size(largest) <= _NEARLY_ALL * sum(sizes.values())):
            break
        found = [block for block in found if block is not largest] + _parts(model, largest.name, order)
    return tuple(_joined(model, sorted(found, key=lambda block: order[block.parameters[0]])))


def _joined(model: nn.Module, found: Sequence[Block]) -> list[Block]:
    """Return the blocks with those that hold no layer of their own joined to a neighbour."""
    joined: list[Block] = []
    waiting: tuple[str, ...] = ()
    for block in found:
        has_layer = block.name not in block.parameters and any(
            model.get_parameter(name).ndim > 1 for name in block.parameters
        )
        if has_layer:
            joined.append(Block(block.name, waiting + block.parameters))
            waiting = ()
        elif joined:
            joined[-1] = Block(joined[-1].name, joined[-1].parameters + block.parameters)
        else:
            waiting += block.parameters
    return joined


def _can_part(model: nn.Module, block: Block) -> bool:
    if block.name in block.parameters:
        return False
    return len(list(model.get_submodule(block.name).children())) > 1 or _inner(model, block.name) is not None


def _inner(model: nn.Module, name: str) -> str | None:
    """Return the only child with parameters, where there is just one."""
    children = [c for c, m in model.get_submodule(name).named_children() if any(True for _ in m.parameters())]
    return f"{name}.{children[0]}".lstrip(".") if len(children) == 1 else None


def _parts(model: nn.Module, name: str, order: Mapping[str, int]) -> list[Block]:
    prefix = f"{name}." if name else ""
    held: dict[str, list[str]] = {}
    for parameter in sorted((p for p in order if p.startswith(prefix)), key=order.__getitem__):
        child = prefix + parameter.removeprefix(prefix).split(".")[0]
        held.setdefault(child, []).append(parameter)
    return [Block(child, tuple(parameters)) for child, parameters in held.items()]


def trainable_parameters(
    what: str, model: nn.Module, heads: Sequence[str], structure: LayerOrder
) -> frozenset[str]:
    """Return the names of the parameters that train; those of the new output layers always do.

    Args:
        what: `all`; `head`; `from:MODULE`, that module and all that the forward pass comes to after it; `last:N`, the
            last N blocks, the output layer's among them; or modules and patterns of parameter names, as in `layer4,
            *.bias`.
        model: with its new output layers.
        heads: their names.
        structure: of the model.

    Raises:
        UserError: none of these, or one that means nothing in this model.

    """
    order = structure.order
    in_heads = {name for name in order if any(name.startswith(f"{head}.") for head in heads)}
    kind, colon, rest = what.partition(":")
    rest = rest.strip()
    if what == "all":
        chosen = set(order)
    elif what == "head":
        chosen = set()
    elif kind == "from" and colon:
        start = _start_of(rest, model, order)
        chosen = {name for name, when in order.items() if when >= start}
    elif kind == "last" and colon:
        chosen = {name for block in _last(rest, structure.blocks) for name in block.parameters}
    else:
        chosen = _matching(what, order)
    return frozenset(chosen | in_heads)


def _start_of(module: str, model: nn.Module, order: Mapping[str, int]) -> int:
    held = [when for name, when in order.items() if name.startswith(f"{module}.")]
    if not held:
        names = [
            name for name, part in model.named_modules() if name and any(True for _ in part.parameters())
        ]
        close = difflib.get_close_matches(module, names, n=3)
        top = [name for name in names if "." not in name]
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"transfer.trainable is 'from:{module}', and this model has no module {module!r} with parameters. "
            f"{meant}Its parts are {', '.join(top)}"
        )
    return min(held)


def _last(text: str, found: Sequence[Block]) -> Sequence[Block]:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= len(found)):
        raise UserError(
            f"transfer.trainable is 'last:{text}': expected last:1 to last:{len(found)}, by the blocks of this model, "
            f"{', '.join(block.name for block in found)}"
        )
    return found[-int(text) :]


def _matching(text: str, order: Mapping[str, int]) -> set[str]:
    chosen: set[str] = set()
    for pattern in (part.strip() for part in text.split(",")):
        found = match_names(pattern, order)
        if not found:
            raise UserError(
                f"transfer.trainable is {text!r}: expected all, head, from:MODULE, last:N, or modules and patterns of "
                f"parameter names; {pattern!r} matches none of this model's, such as {', '.join(list(order)[:3])}"
            )
        chosen |= found
    return chosen

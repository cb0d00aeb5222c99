"""Initialize the output layer with the source model's rows, for classes that both have (`head_init: source-labels`).

The last step of the D2L recipe's exercises; what the source model has learned about a class need not be learned again
(Raghu et al. 2019, Transfusion).
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.model.architectures import is_timm
from trainer.model.class_names import Matches, match_classes, normalize_name
from trainer.model.head import Head
from trainer.model.metadata import read_weights_metadata
from trainer.model.timm_models import class_names
from trainer.model.torchvision_weights import find_enum, is_file
from trainer.text import escape_unprintable


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """Names of the target classes, and where the names of the source classes come from."""

    targets: tuple[str, ...]
    """Names of the target classes, in the order of the new output layer."""
    sources: str = "auto"
    """Text file with one source class per line, or `auto`: the classes of the weights."""
    in_weights_file: tuple[str, ...] | None = None
    """Classes in the header of a regraft model file; None for other weights."""
    aliases: Mapping[str, str]
    """Target name -> source name, where they differ."""

    @classmethod
    def from_weights(
        cls, weights: str, *, targets: tuple[str, ...], sources: str, aliases: Mapping[str, str]
    ) -> "ClassMapping":
        """Return the mapping with the classes that a file of weights holds, if it is a regraft model file."""
        metadata = read_weights_metadata(weights)
        in_weights_file = metadata.classes if metadata else None
        return cls(targets=targets, sources=sources, in_weights_file=in_weights_file, aliases=aliases)


def source_names(mapping: ClassMapping, *, name: str, weights: str, rows: int) -> tuple[tuple[str, ...], str]:
    """Return (names of the source classes in the order of the rows, where they come from).

    Args:
        mapping: as in `init_head_from_source_classes`.
        name: architecture.
        weights: as in `weights.read_weights`.
        rows: number of rows of the source's output layer.

    Raises:
        UserError: the names are unknown, or there is not one for each row.

    """
    if mapping.sources != "auto":
        names, origin = read_names(Path(mapping.sources)), f"file {escape_unprintable(mapping.sources)}"
    elif mapping.in_weights_file is not None:
        names, origin = mapping.in_weights_file, f"the header of file {escape_unprintable(weights)}"
    else:
        if is_timm(name):
            names, data_set = class_names(name, rows)
            origin = f"the classes of {data_set}"
        else:
            entry = find_enum(name, "DEFAULT" if is_file(weights) else weights)
            names, data_set = tuple(entry.meta["categories"]), repr(entry)
            origin = f"torchvision {data_set}"
        if is_file(weights):
            origin += (
                f", SINCE file {escape_unprintable(weights)} NAMES NO CLASSES and has as many rows; "
                "if its classes are others, set model.source_labels"
            )
            if len(names) != rows:
                raise UserError(
                    f"{weights}: names no classes, and its output layer has {rows} rows, not the {len(names)} of "
                    f"{data_set}: set model.source_labels to a text file with their names, one per line in the order "
                    "of the rows"
                )
    if len(names) != rows:
        raise UserError(
            f"there are {len(names)} source classes ({origin}), but the output layer of {weights} has {rows} rows: "
            "expected one name for each row, in their order"
        )
    return names, origin


def read_names(path: Path) -> tuple[str, ...]:
    """Return the names in a text file, one per line.

    Raises:
        UserError: the file is not readable UTF-8, holds no names, or has an empty line between names.

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"model.source_labels {path}: cannot be read ({reason}); expected a text file with one name "
            "per line, or auto"
        ) from None
    names = [line.strip() for line in text.rstrip().split("\n")]
    if names == [""]:
        raise UserError(f"model.source_labels {path}: is empty; expected one name per line")
    if "" in names:
        raise UserError(
            f"model.source_labels {path}: line {names.index('') + 1} is empty; expected a name in every line: "
            "line 1 belongs to the first row"
        )
    return tuple(names)


def check_targets(aliases: Mapping[str, str], targets: Sequence[str]) -> None:
    """Raise a UserError, with close matches, for an alias of a class that is not a target class."""
    for target in aliases:
        if target not in targets:
            raise UserError(
                f"model.aliases has {target!r}, which is not one of your classes. {_suggest(target, targets)}"
            )


def check_aliases(aliases: Mapping[str, str], targets: Sequence[str], sources: Sequence[str]) -> None:
    """Raise a UserError, with close matches, for an alias between classes that do not exist."""
    check_targets(aliases, targets)
    spellings = {normalize_name(name) for name in sources}
    for target, source in aliases.items():
        if normalize_name(source) not in spellings:
            raise UserError(
                f"model.aliases maps {target!r} to {source!r}, but the source has no class {source!r}. "
                f"{_suggest(source, sources)}"
            )


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.casefold(), [other.casefold() for other in names], n=3, cutoff=0.5)
    suggested = [other for other in names if other.casefold() in close][:3]
    listed = ", ".join(map(escape_unprintable, suggested or names[:5]))
    return f"Did you mean {listed}?" if suggested else f"Expected one of its {len(names)}, such as {listed}"


def init_head_from_source_classes(
    model: nn.Module, head: Head, state: Mapping[str, Tensor], mapping: ClassMapping, *, name: str, weights: str
) -> list[str]:
    """Initialize the new output layer with the source's rows, in place. Return lines for the console.

    A matched row is the source's row minus the mean of all source rows, and its bias likewise. That changes no softmax
    of the source, and makes the rows comparable with random ones, whose mean is 0. An unmatched row keeps its random
    direction, scaled to the mean norm of the matched rows; its bias makes it stand for an equal part of the unmatched
    source classes. If no class matches, the layer stays random.

    Args:
        model: with the new output layer.
        head: the main output layer.
        state: source weights.
        mapping: class names.
        name: architecture.
        weights: as in `weights.read_weights`.

    Raises:
        UserError: the source has no output layer of this shape, its class names are unknown, or an alias is wrong.

    """
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head.name))
    weight = _source_tensor(state, f"{head.name}.weight", tuple(layer.weight.shape[1:]), name, weights)
    names, origin = source_names(mapping, name=name, weights=weights, rows=len(weight))
    check_aliases(mapping.aliases, mapping.targets, names)
    matches = match_classes(mapping.targets, names, mapping.aliases)
    if matches.matched:
        targets = [match.target for match in matches.matched]
        sources = [match.source for match in matches.matched]
        with torch.no_grad():
            rows = weight[sources] - weight.mean(0, keepdim=True)
            norm = rows.flatten(1).norm(dim=1).mean()
            directions = layer.weight / layer.weight.flatten(1).norm(dim=1).clamp(min=1e-12).view(
                -1, *[1] * (layer.weight.ndim - 1)
            )
            layer.weight.copy_(directions * norm)
            layer.weight[targets] = rows
            if layer.bias is not None:
                bias = _source_tensor(state, f"{head.name}.bias", (), name, weights)
                layer.bias.fill_(_remainder_bias(len(weight) - len(set(sources)), len(mapping.targets) - len(targets)))
                layer.bias[targets] = bias[sources] - bias.mean()
    return _report(matches, mapping, names, origin, has_bias=layer.bias is not None)


def _remainder_bias(sources: int, targets: int) -> float:
    """Return the bias of each of `targets` unmatched classes, which together stand for `sources` source classes.

    It is the log of the sum of that many exponentials of 0, the mean logit. Without it, an image of an unmatched class
    would be assigned to whichever matched class it resembles a little more than the average class.
    """
    return math.log(max(1, sources) / targets) if targets else 0.0


def _source_tensor(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], name: str, weights: str) -> Tensor:
    """Return the source's tensor of shape [rows, *shape]."""
    advice = "set model.head_init to xavier, or model.weights to weights with their output layer"
    if key not in state:
        raise UserError(
            f"model.head_init is source-labels, but {weights} holds no {key}, the output layer of {name}: {advice}"
        )
    tensor = state[key]
    if tuple(tensor.shape[1:]) != shape or not len(tensor) or not tensor.is_floating_point():
        raise UserError(
            f"model.head_init is source-labels, but {key} of {weights} is {list(tensor.shape)}, expected "
            f"[rows{''.join(f', {n}' for n in shape)}]: {advice}"
        )
    return tensor


def _report(
    matches: Matches, mapping: ClassMapping, sources: Sequence[str], origin: str, *, has_bias: bool
) -> list[str]:
    shown, names = ([escape_unprintable(name) for name in mapping.targets], list(map(escape_unprintable, sources)))
    lines = [f"output layer from the source's own: {len(matches.matched)} of {len(shown)} classes ({origin})"]
    for match in matches.matched:
        lines.append(f"  {shown[match.target]} <- {names[match.source]}, row {match.source} ({match.kind})")
        alias = mapping.aliases.get(mapping.targets[match.target])
        if (
            alias is not None
            and match.kind == "name"
            and normalize_name(alias) != normalize_name(sources[match.source])
        ):
            lines.append(f"    (not {escape_unprintable(alias)}: a class of the same name has priority over an alias)")
    for target, rows in matches.ambiguous:
        candidates = ", ".join(f"{names[row]} (row {row})" for row in rows)
        lines.append(f"  {shown[target]}: AMBIGUOUS, left random: {candidates}; choose one in model.aliases")
    matched = {match.target for match in matches.matched} | {target for target, _ in matches.ambiguous}
    unmatched = [name for target, name in enumerate(shown) if target not in matched]
    if unmatched:
        lines.append(f"  left random, {len(unmatched)} that the source does not have: {', '.join(unmatched)}")
    if unmatched and matches.matched and not has_bias:
        lines.append("  the output layer has no bias to stand for the source's other classes: their logits start low")
    if not matches.matched:
        lines.append(
            "  NONE OF YOUR CLASSES IS ONE OF THE SOURCE'S: the whole output layer is random, as with xavier; map "
            "classes in model.aliases, or set model.head_init to linear-probe"
        )
    return lines

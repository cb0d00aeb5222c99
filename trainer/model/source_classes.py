"""A new output layer from the source's own: rows of classes that both know by name (the note's sixth step).

Raghu et al. 2019 (Transfusion) and the note: what the source has learnt of a class need not be learnt again.
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
from trainer.model.class_names import Matches, match_labels, normalize_name, torchvision_labels
from trainer.model.head import Head
from trainer.model.weights import find_enum, is_file


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """What classes are called, here and in the source."""

    targets: tuple[str, ...]
    """The new output layer's."""
    sources: str = "auto"
    """A text file with the source's names, one a line; auto: those of the weights."""
    described: tuple[str, ...] | None = None
    """What a model file of regraft says of itself."""
    aliases: Mapping[str, str]
    """Target's name -> source's, where they differ."""


def source_names(labels: ClassMapping, *, name: str, weights: str, rows: int) -> tuple[tuple[str, ...], str]:
    """Return (the names of the source's classes in the order of its rows, where they come from).

    Args:
        labels: what is known.
        name: the model.
        weights: as in `weights.read_weights`.
        rows: of the source's output layer.

    Raises:
        UserError: nobody knows their names, or there are more or fewer of them than rows.

    """
    if labels.sources != "auto":
        names, where = read_names(Path(labels.sources)), f"file {_shown(labels.sources)}"
    elif labels.described is not None:
        names, where = labels.described, f"what file {_shown(weights)} says of itself"
    elif not is_file(weights):
        entry = find_enum(name, weights)
        names, where = torchvision_labels(entry), f"torchvision {entry!r}"
    else:
        entry = find_enum(name, "DEFAULT")
        names = torchvision_labels(entry)
        where = (
            f"torchvision {entry!r}, SINCE file {_shown(weights)} NAMES NO CLASSES and has as many rows; if they are "
            "others, name them by model.source_labels"
        )
        if len(names) != rows:
            raise UserError(
                f"{weights}: names no classes, and its output layer has {rows} rows, not the {len(names)} of "
                f"{entry!r}: give their names, one a line in the order of the rows, as the file model.source_labels"
            )
    if len(names) != rows:
        raise UserError(
            f"the source's classes are {len(names)} by {where}, but the output layer of {weights} has {rows} rows: "
            "expected one name for each row, in their order"
        )
    return names, where


def read_names(path: Path) -> tuple[str, ...]:
    """Return the names in a text file, one a line.

    Raises:
        UserError: not a readable text in UTF-8, no names, or an empty line between them.

    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise UserError(
            f"model.source_labels {path}: cannot be read ({reason}); expected a text file with a name a line, or auto"
        ) from None
    names = [line.strip() for line in text.rstrip().split("\n")]
    if names == [""]:
        raise UserError(f"model.source_labels {path}: is empty; expected a name a line")
    if "" in names:
        raise UserError(
            f"model.source_labels {path}: line {names.index('') + 1} is empty; expected a name in each, since the "
            "first belongs to the first row"
        )
    return tuple(names)


def check_targets(aliases: Mapping[str, str], targets: Sequence[str]) -> None:
    """Raise a UserError for an alias of a class that is not there, with those that were probably meant."""
    for target in aliases:
        if target not in targets:
            raise UserError(
                f"model.aliases has {_shown(target)!r}, which is no class of yours. {_close(target, targets)}"
            )


def check_aliases(aliases: Mapping[str, str], targets: Sequence[str], sources: Sequence[str]) -> None:
    """Raise a UserError for an alias whose names do not exist, with those that were probably meant."""
    check_targets(aliases, targets)
    known = {normalize_name(name) for name in sources}
    for target, source in aliases.items():
        if normalize_name(source) not in known:
            raise UserError(
                f"model.aliases has {_shown(target)} -> {_shown(source)}, but the source has no class "
                f"{_shown(source)!r}. {_close(source, sources)}"
            )


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.casefold(), [other.casefold() for other in known], n=3, cutoff=0.5)
    meant = [other for other in known if other.casefold() in close][:3]
    some = ", ".join(map(_shown, meant or known[:5]))
    return f"Did you mean {some}?" if meant else f"Expected one of its {len(known)}, such as {some}"


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def init_head_from_source_classes(
    model: nn.Module,
    head: Head,
    state: Mapping[str, Tensor],
    labels: ClassMapping,
    *,
    name: str,
    weights: str,
) -> list[str]:
    """Start the grafted output layer from the source's rows, in place; returns what was done, for a person.

    A copied row is the source's less the mean of all the source's rows, its bias likewise: that changes no softmax of
    the source, and brings the row level with new ones, whose mean is 0. A row without a match keeps the direction
    that was drawn for it, in the mean length of the copied ones; its bias makes it stand for its part of the
    source's classes that were not matched. Without any match the layer stays as it was drawn.

    Raises:
        UserError: the source has no such layer, or one of another shape; its classes have no names; a wrong alias.

    """
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head.name))
    weight = _source_tensor(state, f"{head.name}.weight", tuple(layer.weight.shape[1:]), name, weights)
    names, where = source_names(labels, name=name, weights=weights, rows=len(weight))
    check_aliases(labels.aliases, labels.targets, names)
    matches = match_labels(labels.targets, names, labels.aliases)
    if matches.found:
        at = [match.target for match in matches.found]
        taken = [match.source for match in matches.found]
        with torch.no_grad():
            rows = weight[taken] - weight.mean(0, keepdim=True)
            length = rows.flatten(1).norm(dim=1).mean()
            drawn = layer.weight / layer.weight.flatten(1).norm(dim=1).clamp(min=1e-12).view(
                -1, *[1] * (layer.weight.ndim - 1)
            )
            layer.weight.copy_(drawn * length)
            layer.weight[at] = rows
            if layer.bias is not None:
                bias = _source_tensor(state, f"{head.name}.bias", (), name, weights)
                layer.bias.fill_(
                    _remainder_bias(len(weight) - len(set(taken)), len(labels.targets) - len(at))
                )
                layer.bias[at] = bias[taken] - bias.mean()
    return _report(matches, labels, names, where, has_bias=layer.bias is not None)


def _remainder_bias(sources: int, targets: int) -> float:
    """Return the bias of each of `targets` classes that share what speaks for `sources` classes of the source.

    Log of the sum of as many exponentials of 0, the mean logit: without it, a picture of nothing that was matched
    would be taken for the matched class that is a little more like it than the average class is.
    """
    return math.log(max(1, sources) / targets) if targets else 0.0


def _source_tensor(
    state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], name: str, weights: str
) -> Tensor:
    """Return the source's tensor of [rows, *shape]."""
    instead = "set model.head_init to xavier, or model.weights to weights with their output layer"
    if key not in state:
        raise UserError(
            f"model.head_init is source-labels, but {weights} holds no {key}, the output layer of {name}: {instead}"
        )
    tensor = state[key]
    if tuple(tensor.shape[1:]) != shape or not len(tensor) or not tensor.is_floating_point():
        raise UserError(
            f"model.head_init is source-labels, but {key} of {weights} is {list(tensor.shape)}, expected "
            f"[rows{''.join(f', {n}' for n in shape)}]: {instead}"
        )
    return tensor


def _report(
    matches: Matches, labels: ClassMapping, names: Sequence[str], where: str, *, has_bias: bool
) -> list[str]:
    targets = labels.targets
    lines = [f"output layer from the source's own: {len(matches.found)} of {len(targets)} classes ({where})"]
    for match in matches.found:
        row = f"  {_shown(targets[match.target])} <- {_shown(names[match.source])}, row {match.source}"
        lines.append(f"{row} ({match.how})")
        alias = labels.aliases.get(targets[match.target])
        if (
            alias is not None
            and match.how == "name"
            and normalize_name(alias) != normalize_name(names[match.source])
        ):
            lines.append(f"    (not {_shown(alias)}: a class of the very same name goes before an alias)")
    for target, sources in matches.ambiguous:
        several = ", ".join(f"{_shown(names[row])} (row {row})" for row in sources)
        lines.append(
            f"  {_shown(targets[target])}: AMBIGUOUS, left random: {several}; model.aliases may choose"
        )
    known = {match.target for match in matches.found} | {target for target, _ in matches.ambiguous}
    unknown = [_shown(name) for target, name in enumerate(targets) if target not in known]
    if unknown:
        lines.append(f"  left random, {len(unknown)} that the source does not know: {', '.join(unknown)}")
    if unknown and matches.found and not has_bias:
        lines.append(
            "  the output layer has no bias, by which these could stand for the source's other classes: they start low"
        )
    if not matches.found:
        lines.append(
            "  NO CLASS OF YOURS IS THE SOURCE'S: the whole output layer is random, as under xavier; name the same "
            "classes in model.aliases, or set model.head_init to linear-probe"
        )
    return lines

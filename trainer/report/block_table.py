"""The table of a model's blocks: what trains, at which rate, and whose statistics BatchNorm uses."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.model.batch_norm import is_frozen, named_batch_norms
from trainer.model.create import BuiltModel
from trainer.model.freeze import UnfreezeStage
from trainer.optim.param_groups import ParamGroup


def block_table(created: BuiltModel, groups: Sequence[ParamGroup]) -> Table:
    """Return a row for each block, in the order in which a picture passes through them, and one for each new head.

    BatchNorm is shown as it begins: a block that trains from a later epoch on keeps the source's statistics till then.
    """
    table = Table("block", "trains", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameters", "peak lr", "weight decay", "BatchNorm"):
        table.add_column(title, justify="right")
    parameters = dict(created.model.named_parameters())
    group_of = {id(parameter): group for group in groups for parameter in group.parameters}
    frozen = {name: is_frozen(layer) for name, layer in named_batch_norms(created.model)}
    for title, names in _rows(created):
        held = [group_of[id(parameters[name])] for name in names if id(parameters[name]) in group_of]
        owners = {name.rpartition(".")[0] for name in names}
        table.add_row(
            title,
            _when(names, created.unfreeze_stages),
            f"{sum(parameters[name].numel() for name in names):,}",
            _range(group.lr for group in held),
            _range(group.weight_decay for group in held),
            _modes([frozen[name] for name in frozen if name in owners]),
        )
    return table


def _rows(created: BuiltModel) -> list[tuple[str, list[str]]]:
    """Return (title, parameters) of each row."""
    heads: dict[str, list[str]] = {head: [] for head in created.heads}
    rows = []
    for block in created.layer_order.blocks:
        rest: list[str] = []
        for name in block.parameters:
            head = next((head for head in heads if name.startswith(f"{head}.")), None)
            (rest if head is None else heads[head]).append(name)
        if rest:
            rows.append((block.name, rest))
    return [*rows, *((f"{head} (new)", names) for head, names in heads.items())]


def _when(names: Iterable[str], stages: Sequence[UnfreezeStage]) -> str:
    """Return from when on these parameters train."""
    first = {next((stage.start_epoch for stage in stages if name in stage.trainable), None) for name in names}
    if not stages or first == {0}:
        return "yes"
    if len(first) > 1:
        return "in part"
    (begins,) = first
    return "frozen" if begins is None else f"from epoch {begins + 1}"


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    if not found:
        return "-"
    return f"{found[0]:.3g}" if len(found) == 1 else f"{found[0]:.3g} to {found[-1]:.3g}"


def _modes(frozen: Sequence[bool]) -> str:
    if not frozen:
        return "-"
    if all(frozen) or not any(frozen):
        return "frozen" if frozen[0] else "train"
    return f"{sum(frozen)} of {len(frozen)} frozen"

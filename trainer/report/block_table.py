"""Table of a model's blocks: trainable or frozen, parameter count, learning rate, weight decay, BatchNorm mode."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from regraft.contract import BLOCKS
from trainer.model.batch_norm import is_frozen, named_batch_norms
from trainer.model.built import BuiltModel, UnfreezeStage
from trainer.optim.param_groups import ParamGroup
from trainer.run.atomic import write_text_atomically


class BlockRow(NamedTuple):
    """What is trained of one block, as text."""

    block: str
    trains: str
    parameters: str
    peak_lr: str
    weight_decay: str
    batch_norm: str


def block_table(built: BuiltModel, groups: Sequence[ParamGroup]) -> Table:
    """Return the table of `block_rows`."""
    table = Table("block", "trains", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameters", "peak lr", "weight decay", "BatchNorm"):
        table.add_column(title, justify="right")
    for row in block_rows(built, groups):
        table.add_row(*row)
    return table


def block_rows(built: BuiltModel, groups: Sequence[ParamGroup]) -> list[BlockRow]:
    """Return one row per block, in forward order, then one row per new head.

    BatchNorm modes are those at the start: a block that is unfrozen later has frozen BatchNorm until then.
    """
    parameters = dict(built.model.named_parameters())
    group_of_parameter = {id(parameter): group for group in groups for parameter in group.parameters}
    frozen_batch_norms = {name: is_frozen(layer) for name, layer in named_batch_norms(built.model)}
    rows = []
    for title, names in _titles_and_parameters(built):
        ids = [id(parameters[name]) for name in names]
        row_groups = [group_of_parameter[key] for key in ids if key in group_of_parameter]
        modules = {name.rpartition(".")[0] for name in names}
        rows.append(
            BlockRow(
                title,
                _format_trainable(names, built.unfreeze_stages),
                f"{sum(parameters[name].numel() for name in names):,}",
                _format_range(group.lr for group in row_groups),
                _format_range(group.weight_decay for group in row_groups),
                _format_batch_norm([frozen for name, frozen in frozen_batch_norms.items() if name in modules]),
            )
        )
    return rows


def write_blocks(folder: Path, rows: Sequence[BlockRow], *, warn: Callable[[str], object]) -> None:
    """Write the rows for the report of a run; if this fails, call `warn` with a message."""
    try:
        write_text_atomically(folder / BLOCKS, json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    except OSError as error:  # the checkpoint manager stops a run that cannot save
        warn(f"warning: {BLOCKS} was not written ({error.strerror}); nothing else is affected")


def _titles_and_parameters(built: BuiltModel) -> list[tuple[str, list[str]]]:
    """Return (title, parameter names) of each row."""
    heads: dict[str, list[str]] = {head: [] for head in built.heads}
    rows = []
    for block in built.layer_order.blocks:
        backbone: list[str] = []
        for name in block.parameters:
            head = next((head for head in heads if name.startswith(f"{head}.")), None)
            (backbone if head is None else heads[head]).append(name)
        if backbone:
            rows.append((block.name, backbone))
    return [*rows, *((f"{head} (new)", names) for head, names in heads.items())]


def _format_trainable(names: Iterable[str], stages: Sequence[UnfreezeStage]) -> str:
    """Return when these parameters start to train: `yes`, `frozen`, `from epoch N`, or `in part` if they differ."""
    first_epochs = {next((stage.start_epoch for stage in stages if name in stage.trainable), None) for name in names}
    if not stages or first_epochs == {0}:
        return "yes"
    if len(first_epochs) > 1:
        return "in part"
    (first_epoch,) = first_epochs
    return "frozen" if first_epoch is None else f"from epoch {first_epoch + 1}"


def _format_range(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    if not distinct:
        return "-"
    return f"{distinct[0]:.3g}" if len(distinct) == 1 else f"{distinct[0]:.3g} to {distinct[-1]:.3g}"


def _format_batch_norm(frozen: Sequence[bool]) -> str:
    if not frozen:
        return "-"
    if all(frozen) or not any(frozen):
        return "frozen" if frozen[0] else "train"
    return f"{sum(frozen)} of {len(frozen)} frozen"

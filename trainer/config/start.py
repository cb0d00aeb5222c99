"""Start every command that trains: resolve the config, join the process group, open the console."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from trainer.config.default_folder import default_run_folder
from trainer.config.parse import dump
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.distributed.context import DistributedContext, init_distributed
from trainer.report.console import make_console
from trainer.run.folder import check_resumable, saved_precision


def start(config: Config) -> tuple[ResolvedConfig, DistributedContext, Console]:
    """Resolve the config, join the process group, and print the notes on the device.

    A resumed run keeps the precision that `train.precision auto` chose at its first start.

    Raises:
        UserError: see `resolve` and `init_distributed`.

    """
    resolved = resolve(config)
    folder, message = default_run_folder(config, resolved)
    resolved = replace(resolved, run=replace(resolved.run, dir=folder))
    may_resume = resolved.run.resume != "never" and not resolved.debug
    ctx = init_distributed(
        device=resolved.run.device,
        precision=resolved.train.precision,
        threads=resolved.run.threads,
        saved_precision=saved_precision(Path(resolved.run.dir)) if may_resume else None,
    )
    console = make_console(enabled=ctx.is_main_process)
    for note in (*ctx.notes, *([message] if message is not None else [])):
        console.print(note)
    # Every process has chosen the folder for itself; another command may have taken it meanwhile.
    resolved = replace(resolved, run=replace(resolved.run, dir=ctx.broadcast(folder)))
    return replace(resolved, train=replace(resolved.train, precision=ctx.precision)), ctx, console


def check_run_folder(config: ResolvedConfig, ctx: DistributedContext) -> None:
    """Raise a UserError if the run folder contains a run with other options, before any long work."""
    folder = Path(config.run.dir)
    precision = saved_precision(folder) or ctx.precision
    resumed = replace(config, train=replace(config.train, precision=precision))
    check_resumable(folder, dump(resumed), resume=config.run.resume)

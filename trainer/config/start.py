"""Start every command that trains: resolve the config, join the process group, open the console."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from regraft.contract import create_output_folder
from trainer.config.default_folder import default_run_folder
from trainer.config.pretrained import check_pretrained_weights
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.distributed.context import DistributedContext, init_distributed
from trainer.errors import UserError
from trainer.model.compile import check_compiler
from trainer.report.console import make_console
from trainer.report.tracker_services import check_installed


def start(config: Config) -> tuple[ResolvedConfig, DistributedContext, Console]:
    """Resolve the config, join the process group, print the notes on the device, and check the pretrained weights.

    `train.precision auto` is resolved later, by `choose_execution`.

    Raises:
        UserError: see `resolve`, `init_distributed`, `check_installed`, `check_pretrained_weights`, `check_compiler`.

    """
    resolved = resolve(config)
    folder, message = default_run_folder(config, resolved)
    resolved = replace(resolved, run=replace(resolved.run, dir=folder))
    ctx = init_distributed(device=resolved.run.device, precision=resolved.train.precision, threads=resolved.run.threads)
    console = make_console(enabled=ctx.is_main_process)
    for note in (*ctx.notes, *([message] if message is not None else [])):
        console.print(note)
    # Every process has chosen the folder for itself; another command may have taken it meanwhile.
    resolved = replace(resolved, run=replace(resolved.run, dir=ctx.broadcast(folder)))
    ctx.main_process_first(lambda: check_installed(resolved.run.trackers) if ctx.is_main_process else None)
    # Before images are decoded. One process of each machine reads its file.
    is_first = ctx.accelerator.is_local_main_process
    ctx.main_process_first(lambda: check_pretrained_weights(resolved) if is_first else None, local=True)
    if resolved.train.compile:
        ctx.main_process_first(lambda: check_compiler(ctx.device) if is_first else None, local=True)
    return resolved, ctx, console


def create_parent_folder(folder: Path, ctx: DistributedContext) -> None:
    """Create the folder of several runs, which is never read as data. Every process must call it.

    Raises:
        UserError: it cannot be written.

    """

    def create() -> None:
        try:
            create_output_folder(folder)
        except OSError as error:
            raise UserError(
                f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
            ) from None

    ctx.main_process_first(lambda: create() if ctx.is_main_process else None)

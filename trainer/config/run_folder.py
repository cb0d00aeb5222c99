"""From a config to its open run folder."""

from pathlib import Path

from rich.console import Console

from trainer.config.dump import dump, given_options
from trainer.config.resolve import ResolvedConfig
from trainer.config.schema import Config
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import StopSignals
from trainer.distributed.watchdog import EXTENDED_TIMEOUT
from trainer.run.environment import record_environment
from trainer.run.session import OpenRun, open_run


def open_run_folder(
    config: ResolvedConfig, given: Config, ctx: DistributedContext, console: Console, signals: StopSignals
) -> OpenRun:
    """Open the run folder for this start, and record its environment. Every process must call it.

    Args:
        config: config of the run.
        given: config of the command, before defaults that depend on the model were filled in.
        ctx: the processes.
        console: prints on rank 0.
        signals: the stop signals.

    Raises:
        UserError: see `open_run`.

    """
    timeout = config.run.hang_timeout
    if timeout == "auto" and config.train.compile:
        timeout = EXTENDED_TIMEOUT  # kernels are built within steps
    run = open_run(
        Path(config.run.dir),
        dump(config),
        resume=config.run.resume,
        ctx=ctx,
        console=console,
        signals=signals,
        hang_timeout=timeout,
        writes_report=config.run.report == "auto",
    )
    try:
        with signals.deferred():  # the first phase raises a Stopped for them
            message = record_environment(run.root, run.lock, ctx, given_options(given))
        if message is not None:
            console.print(message)
    except BaseException as error:
        run.end_with_error(error)
        raise
    return run

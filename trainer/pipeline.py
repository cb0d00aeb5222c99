"""The phases of a run: pretraining, fine-tuning, and a baseline from scratch. The first and the last are optional."""

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from regraft.contract import BASELINE, PRETRAIN
from trainer.commands.debug import debug
from trainer.config.build_data import load_run_data
from trainer.config.parse import dump
from trainer.config.preflight import preflight
from trainer.config.resolve import ResolvedConfig, baseline_config, pretrain_config, resolve
from trainer.config.schema import Config
from trainer.distributed.context import (
    DistributedContext,
    init_distributed,
    leave_process_group_env,
    shut_down,
)
from trainer.distributed.signals import StopSignals
from trainer.report.console import make_console
from trainer.report.summary import TrainResult, comparison, summary
from trainer.run.environment import record_environment
from trainer.run.folder import saved_precision
from trainer.run.session import OpenRun, open_run
from trainer.train_run import train_run


def run(config: Config, signals: StopSignals) -> TrainResult | None:
    """Run all phases that the config asks for; return the fine-tuning's result, or None in debug mode.

    Raises:
        UserError: something that the user can fix.
        Stopped: the run was asked to stop.

    """
    if config.debug and not leave_process_group_env(os.environ):
        return None
    resolved, ctx, console = start(config)
    if config.debug:
        debug(resolved, ctx, console)
        return None
    opened = open_run(
        Path(resolved.run.dir),
        dump(resolved),
        resume=resolved.run.resume,
        ctx=ctx,
        console=console,
        signals=signals,
        hang_timeout=resolved.run.hang_timeout,
    )
    try:
        with signals.deferred():  # the first phase asks for them
            message = record_environment(opened.root, opened.lock, ctx)
        if message is not None:
            console.print(message)
        result = _run_phases(resolved, opened)
    except BaseException as error:
        opened.end_with_error(error)
        raise
    opened.end("done")
    shut_down()
    return result


def start(config: Config) -> tuple[ResolvedConfig, DistributedContext, Console]:
    """Resolve the config, join the process group, and print what was chosen for this machine.

    A run that resumes keeps the precision that `train.precision auto` chose when it began.

    Raises:
        UserError: see `resolve` and `init_distributed`.

    """
    resolved = resolve(config)
    keeps = resolved.run.resume != "never" and not resolved.debug
    ctx = init_distributed(
        device=resolved.run.device,
        precision=resolved.train.precision,
        threads=resolved.run.threads,
        saved_precision=saved_precision(Path(resolved.run.dir)) if keeps else None,
    )
    console = make_console(speaks=ctx.is_main_process)
    for note in ctx.notes:
        console.print(note)
    return replace(resolved, train=replace(resolved.train, precision=ctx.precision)), ctx, console


def _run_phases(config: ResolvedConfig, run: OpenRun) -> TrainResult:
    console, weights = run.console, config.model.weights
    is_main = run.ctx.is_main_process

    def phase(name: str, config: ResolvedConfig, weights: str | None) -> TrainResult:
        return train_run(config, run.start_phase(name, epochs=config.train.epochs), weights=weights)

    if config.pretrain.root:
        preflight(config, load_run_data(config, run.ctx, console), run.ctx)
        console.rule("pretraining", align="left")
        pretrained = phase(PRETRAIN, pretrain_config(config), None)
        weights = str(pretrained.model_file)
    if config.pretrain.root or config.baseline.lr:
        console.rule("fine-tuning" if weights else "training", align="left")
    result = phase("", config, weights)
    if is_main:
        console.print(summary(result, alpha=result.alpha))
    if config.baseline.lr:
        console.rule("baseline from scratch", align="left")
        baseline = phase(BASELINE, baseline_config(config), None)
        if is_main:
            console.rule("fine-tuned and from scratch", align="left")
            console.print(comparison(result, baseline))
            console.print(f"run folder {result.folder}; baseline {baseline.folder}")
    return result

"""The phases of a run: optional pretraining, fine-tuning, and an optional baseline from scratch."""

from regraft.contract import BASELINE, PRETRAIN
from trainer.config.build_data import load_run_data
from trainer.config.preflight import preflight
from trainer.config.resolve import ResolvedConfig, baseline_config, pretrain_config
from trainer.config.run_folder import open_run_folder
from trainer.config.schema import Config
from trainer.config.start import start
from trainer.data.workers import full_shared_memory_as_user_error
from trainer.distributed.context import shut_down
from trainer.distributed.signals import StopSignals
from trainer.report.summary import TrainResult, comparison, summary
from trainer.run.session import OpenRun
from trainer.train_run import train_run


def run(config: Config, signals: StopSignals) -> TrainResult:
    """Run all phases of a config; return the result of the fine-tuning.

    Raises:
        UserError: something that the user can fix.
        Stopped: the run was asked to stop.

    """
    resolved, ctx, console = start(config)
    opened = open_run_folder(resolved, config, ctx, console, signals)
    try:
        with full_shared_memory_as_user_error():
            result = _run_phases(resolved, opened)
    except BaseException as error:
        opened.end_with_error(error)
        raise
    opened.end("done")
    shut_down()
    return result


def _run_phases(config: ResolvedConfig, run: OpenRun) -> TrainResult:
    console, weights = run.console, config.model.weights
    is_main = run.ctx.is_main_process

    def phase(name: str, config: ResolvedConfig, weights: str | None) -> TrainResult:
        opened = run.start_phase(name, epochs=config.train.epochs)
        result = train_run(config, opened, weights=weights)
        _write_report(opened)
        return result

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
        _write_report(run)  # which names the result of the baseline
        if is_main:
            console.rule("fine-tuned and from scratch", align="left")
            console.print(comparison(result, baseline))
            console.print(f"run folder {result.folder}; baseline {baseline.folder}")
    return result


def _write_report(run: OpenRun) -> None:
    """Write report.html of a finished phase. Every process must call it."""

    def write() -> None:
        if run.is_writer and run.writes_report:
            run.check_lock()
            # Imported here: no run needs jinja2 before its end.
            from trainer.pages.run_report import try_write_report  # noqa: PLC0415

            try_write_report(run.folder, pictures=True, warn=run.console.print)

    run.ctx.main_process_first(write)

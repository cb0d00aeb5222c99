"""One phase of a run: one model trained on one data set, from the examples to the model file."""

import time
from dataclasses import replace

from trainer.config.build_checkpoints import find_resume_point, make_checkpoint_manager, make_model_metadata
from trainer.config.build_data import check_images_unchanged, load_run_data, write_split_files
from trainer.config.build_features import (
    make_evaluator,
    make_frozen_layers,
    make_probe_loader,
    make_stage_features,
    make_train_batches,
)
from trainer.config.build_micro_batch import MicroBatches
from trainer.config.build_model import fit_linear_probe, make_l2_sp, make_model, make_optimizer, make_param_groups
from trainer.config.build_training import make_train_state, make_train_step, print_block_table
from trainer.config.execution import Workload, choose_execution
from trainer.config.preflight import check_run_data
from trainer.config.resolve import ResolvedConfig
from trainer.evaluation.final import FinalEvaluation
from trainer.loop import fit
from trainer.report.logger import complete_trackers, make_logger
from trainer.report.summary import TrainResult
from trainer.run.session import OpenRun
from trainer.transfer.wise_ft import WiseFT


def train_run(  # noqa: PLR0915 (one function that reads from top to bottom)
    config: ResolvedConfig, run: OpenRun, *, weights: str | None
) -> TrainResult:
    """Train, evaluate and save; or resume what the run folder holds; or report it, if it is finished.

    The state is initialized in the numbered order below, in every run. Every process must call this.

    Args:
        config: of this phase.
        run: the open run folder, at the start of this phase.
        weights: name or file of the pretrained weights; None trains from scratch.

    Raises:
        UserError: something that the user can fix.
        Stopped: the run was asked to stop, and its state is saved.

    """
    began = time.monotonic()
    ctx, console = run.ctx, run.console

    # 1. The examples, each of them checked, and the order of the updates.
    data = load_run_data(config, ctx, console)
    check_run_data(config, data, ctx)
    index, schedule = data.index, data.schedule

    # 2. Precision and memory layout, then the newest checkpoint, if there is one; every rank takes rank 0's.
    workload = Workload(
        config=config, examples=index.train, classes=index.classes, weights=weights, evaluated=index.num_evaluated
    )
    config, ctx = choose_execution(workload, ctx, console, saved=run.saved_execution)
    run = replace(run, ctx=ctx)
    resume_point = find_resume_point(config, data, run)
    checkpoint = resume_point.checkpoint
    if not resume_point.is_finished:
        check_images_unchanged(config, data, run, resumed=checkpoint is not None)
    write_split_files(data, run)
    micro_batches = MicroBatches(config, run)
    config = micro_batches.config
    wise_ft = WiseFT(run, index.val_split if config.transfer.wise_ft else None, config.checkpoint.select_by)
    final_evaluation = FinalEvaluation(run, index.eval_paths, index.classes, calibrate_on=index.val_split)
    frozen_layers = make_frozen_layers(config, ctx, console)
    result = TrainResult(
        folder=run.folder,
        examples=(len(index.train), len(index.test)),
        val_split=index.val_split,
        select_by=config.checkpoint.select_by,
    )
    if checkpoint is not None and resume_point.is_finished:
        rows = resume_point.finish()
        evaluator, channels_last = make_evaluator(config, data, frozen_layers, None), config.train.uses_channels_last
        alpha = wise_ft.select_alpha(
            lambda: wise_ft.load_for_eval(channels_last=channels_last), evaluator, step=checkpoint.state.step
        )
        final_evaluation.write(
            lambda: final_evaluation.load_for_eval(channels_last=channels_last), evaluator, step=checkpoint.state.step
        )
        options, step = config.run, checkpoint.state.step
        complete_trackers(run, options.trackers, options.tracker_project, metrics=checkpoint.metrics, step=step)
        return replace(result, rows=rows, alpha=alpha, seconds=time.monotonic() - began)

    # 3. The model with random weights from `run.seed`; its output layer replaced; pretrained weights copied in.
    built = ctx.main_process_first(
        lambda: make_model(config, index.classes, weights, world_size=ctx.world_size, on_progress=console.print),
        local=True,
    )
    console.print("\n".join(built.summary))

    # 4. Device, linear probe, parameter groups and optimizer. The optimizer's kernels depend on the parameters' device.
    built.model.to(ctx.device)
    l2_sp = make_l2_sp(built, config)  # towards the pretrained weights, not those of a checkpoint
    probe_seconds = 0.0
    if checkpoint is None and config.model.head_init == "linear-probe":
        loader, labels = make_probe_loader(config, data, ctx), [label for _, label in index.train]
        probe_seconds = fit_linear_probe(
            built, loader, labels, config, ctx, console, groups=data.train_groups, watchdog=run.watchdog
        )
        del loader  # ends its worker processes, and frees the images that it keeps on the device
    groups = make_param_groups(built, config)
    print_block_table(built, groups, console, folder=run.folder if run.is_writer and run.writes_report else None)
    optimizer = make_optimizer(groups, config)

    # 5. Precision and process group: accelerate wraps model and optimizer, or the layers after the frozen ones, whose
    #    output for each image is then computed once.
    features = make_stage_features(config, data, built.model, frozen_layers)
    evaluator = make_evaluator(config, data, frozen_layers, built.model)
    state, unfreezing = make_train_state(built, optimizer, config, ctx, console, features=features)

    # 6. Model, optimizer, loss scaling and position from the checkpoint.
    if checkpoint is not None:
        # It holds the moments of what had trained, and the BatchNorm statistics of what was not frozen.
        unfreezing.restore_stage(max(0, checkpoint.state.step - 1) // schedule.steps_per_epoch)
        resume_point.restore(state)
        console.print(resume_point.describe(batch_norm=config.transfer.batch_norm))
    model_metadata = make_model_metadata(config, data, run, built)
    wise_ft.save_initial_weights(state.model, model_metadata, resumed=checkpoint is not None)

    # 7. The loader, from that position on; micro-batches that fit in the memory that is left; logger and checkpoints.
    batches = make_train_batches(config, data, run, built.unfreeze_stages, features, start_step=state.step)
    train_step = micro_batches.limit(make_train_step(config, data.examples_per_class, ctx, l2_sp), state, unfreezing)
    train_step = replace(train_step, normalize=features.to_input)
    logger, progress_bar, trackers = make_logger(
        run,
        schedule,
        title=f"{index.root.name}: {config.model.name}, {built.source}",
        classes=index.classes,
        done_steps=state.step,
        metrics=checkpoint.metrics if checkpoint else "",
        services=config.run.trackers,
        project=config.run.tracker_project,
    )
    checkpoints = make_checkpoint_manager(config, data, run, state, model_metadata=model_metadata, logger=logger)
    checkpoints.repair_best_model()
    if checkpoint is None and config.model.head_init in ("source-labels", "linear-probe"):
        with run.watchdog() as heartbeat:
            logger.log_start(evaluator.evaluate_initial(state.model, heartbeat), probe_seconds)
    evaluate_epoch = final_evaluation.record_epochs(evaluator, state)
    try:
        with (
            trackers.ended_on_error(),
            run.signals.deferred(),
            progress_bar.show(),
            run.watchdog(checkpoints.heartbeat),
            checkpoints,
            micro_batches.halved_if_out_of_memory(train_step),
        ):
            fit(
                state,
                batches,
                schedule,
                train_step,
                start_epoch=unfreezing.start_epoch,
                evaluate=evaluate_epoch,
                checkpoints=checkpoints,
                logger=logger,
            )
    finally:
        logger.close()
    if logger.failure is not None:  # of the last curves; an earlier failure was raised
        console.print(str(logger.failure))
    rows = tuple(logger.epochs)
    if checkpoints.stopped_early:
        console.print(resume_point.describe_early_stop(rows))
    with trackers.ended_on_error():
        alpha = wise_ft.select_alpha(lambda: state.model, evaluator, step=state.step)
        final_evaluation.write(
            lambda: state.model,
            evaluator,
            step=state.step,
            is_of_epoch=alpha == 1,  # otherwise WiSE-FT has interpolated the weights
        )
    trackers.finish(state.step)
    ctx.accelerator.wait_for_everyone()
    ctx.accelerator.free_memory()
    return replace(result, rows=rows, alpha=alpha, seconds=time.monotonic() - began)

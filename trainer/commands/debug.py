"""Debug mode (`--debug`): run every step on a few batches in one process, and show shapes and times.

Nothing is written to the run folder. There are no worker processes, so that `breakpoint()` works anywhere. On a
terminal, an unexpected error opens the debugger where it was raised.
"""

import itertools
import os
import pdb
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from trainer.commands.overfit import OVERFIT_STEPS, describe_losses, overfit
from trainer.config.build_data import load_run_data
from trainer.config.build_loaders import Evaluator, make_batches
from trainer.config.build_model import make_l2_sp, make_model, make_optimizer, make_param_groups
from trainer.config.build_training import make_train_state, make_train_step
from trainer.config.preflight import check_run_data
from trainer.config.resolve import ResolvedConfig
from trainer.config.schema import Config
from trainer.config.start import start
from trainer.distributed.context import leave_process_group_env
from trainer.errors import UserError
from trainer.loop import NullCheckpoints, fit
from trainer.model.head import split_outputs
from trainer.report.block_table import block_table
from trainer.report.debug_console import ConsoleLogger, describe_tensor, print_layers

TRAIN_BATCHES = 3
EVAL_EXAMPLES = 32
STEPS_PER_LINE = 5
_MICRO_BATCH = 8


def debug(config: Config) -> None:
    """Run all steps of a run on a little of its data, and say whether the model can overfit one batch.

    Of several processes that a launcher has started, rank 0 alone does this.

    Raises:
        UserError: an error that the run itself would end with.

    """
    if not leave_process_group_env(os.environ):
        return
    try:
        with torch.autograd.set_detect_anomaly(True):
            _run_steps(replace(config, data=replace(config.data, num_workers=0, cache_images="off")))
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise
        traceback.print_exc()
        print("debugger opened at the error: p NAME prints a value, u goes up one frame, q quits")
        pdb.post_mortem(error.__traceback__)
        raise


def _run_steps(options: Config) -> None:
    config, ctx, console = start(options)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        console.rule(name, align="left")
        began = time.perf_counter()
        yield
        if ctx.device.type == "cuda":
            torch.cuda.synchronize(ctx.device)
        console.print(f"{name}: {1000 * (time.perf_counter() - began):,.1f} ms")

    with timed("data"):
        # Only a few images are read later. All are checked, as in a run, only if unreadable ones are skipped.
        data = load_run_data(config, ctx, console, check=config.data.on_unreadable == "skip")
        check_run_data(config, data, ctx)
    with timed("model"):
        for line in _skipped(config):
            console.print(line)
        config = _without_options(config)
        built = make_model(config, data.index.classes, config.model.weights, on_progress=console.print)
        console.print("\n".join(built.summary))
        built.model.to(ctx.device)
        groups = make_param_groups(built, config)
        console.print(block_table(built, groups))
        optimizer = make_optimizer(groups, config)
        state, unfreezing = make_train_state(built, optimizer, config, ctx, console)
    train_step = make_train_step(config, data.examples_per_class, ctx, make_l2_sp(built, config))
    schedule = replace(
        data.schedule, batch_sizes=data.schedule.batch_sizes[:TRAIN_BATCHES], epochs=1, logs_per_epoch=TRAIN_BATCHES
    )
    batches = make_batches(config, data.index, data.order, ctx, epochs=1)
    with timed("first batch: read, decode, augment"):
        first = next(batches)
        describe_tensor(console, "images", first.images)
        describe_tensor(console, "labels", first.labels)
    with timed("normalize"):
        describe_tensor(console, "input", train_step.normalize(first.images))
    with timed("forward, layer by layer"), print_layers(state.model, console, ctx.device), torch.no_grad():
        state.model.train()
        logits, _ = split_outputs(state.model(train_step.normalize(first.images)))
        describe_tensor(console, "logits", logits)
    with timed(f"train on {len(schedule.batch_sizes)} batches, then evaluate, with anomaly detection on"):
        fit(
            state,
            batches.through(partial(itertools.chain, [first])),
            schedule,
            train_step,
            start_epoch=unfreezing.start_epoch,
            evaluate=Evaluator(data.index.with_few_to_evaluate(EVAL_EXAMPLES), config, ctx),
            checkpoints=NullCheckpoints(),
            logger=ConsoleLogger(console),
        )
    with timed(f"overfit one batch, {OVERFIT_STEPS} updates at the peak learning rate"):
        losses: list[float] = []
        for loss in overfit(unfreezing.model, state, train_step.plain(), first):
            losses.append(loss)
            if len(losses) % STEPS_PER_LINE == 1:
                console.print(f"update {len(losses)}: loss {loss:.4f}")
        console.print(describe_losses(losses))


def _skipped(config: ResolvedConfig) -> Iterator[str]:
    """Yield a line for each step of the run that debug mode skips."""
    if config.pretrain.root:
        yield f"skipped: pretraining on {config.pretrain.root}; the weights are random instead"
    if config.regularization.ema or config.transfer.l2_sp:
        yield "skipped: regularization.ema and transfer.l2_sp"
    if isinstance(config.transfer.trainable, dict):
        yield "skipped: all stages of transfer.trainable but the first"
    if config.train.compile:
        yield "skipped: train.compile"
    if config.train.micro_batch_size == "auto":
        yield f"skipped: the search of train.micro_batch_size auto; micro-batches have {_MICRO_BATCH} images"
    if config.model.head_init == "linear-probe":
        yield "skipped: the linear probe; the output layer is random instead"


def _without_options(config: ResolvedConfig) -> ResolvedConfig:
    train = replace(config.train, compile=False)
    return replace(
        config,
        regularization=replace(config.regularization, ema=None),
        transfer=replace(config.transfer, l2_sp=0.0),
        train=replace(train, micro_batch_size=_MICRO_BATCH) if train.micro_batch_size == "auto" else train,
    )

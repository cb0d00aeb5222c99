"""From a config to the size of the micro-batches: given, found, or saved by an earlier attempt."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from trainer.config.resolve import ResolvedConfig
from trainer.errors import OutOfMemory, UserError
from trainer.optim.micro_batch import is_out_of_memory, largest_micro_batch
from trainer.optim.train_step import TrainStep
from trainer.run.micro_batch import load_micro_batch_size, save_micro_batch_size
from trainer.run.session import OpenRun
from trainer.state import TrainState
from trainer.transfer.gradual_unfreezing import GradualUnfreezing

_OPTIONS = {
    "data": ("image_size",),
    "model": ("name",),
    "transfer": ("trainable", "batch_norm"),
    "train": ("batch_size", "grad_accum_steps", "micro_batch_size", "precision", "gradient_checkpointing", "compile"),
}
"""What the memory of a micro-batch depends on, as far as a resumed run may change it or a restarted one does."""


class MicroBatches:
    """The micro-batches of a phase."""

    def __init__(self, config: ResolvedConfig, run: OpenRun) -> None:
        """Load the size that an earlier attempt has saved. Every process must call it."""
        self._run = run
        self._options = {"device": run.ctx.device.type} | {
            f"{section}.{name}": str(getattr(getattr(config, section), name))
            for section, names in _OPTIONS.items()
            for name in names
        }
        self._local = -(-config.train.batch_size // run.ctx.world_size)
        self.config = config
        """The config of the phase with the saved size."""
        if size := load_micro_batch_size(run, self._options):
            self.config = replace(config, train=replace(config.train, grad_accum_steps=1, micro_batch_size=size))
            run.console.print(f"micro-batch size {min(size, self._local)}, as in an earlier attempt")

    def limit(self, train_step: TrainStep, state: TrainState, unfreezing: GradualUnfreezing) -> TrainStep:
        """Return the update with the micro-batches of this phase. Every process must call it.

        With train.micro_batch_size auto, the size is found and saved, unless an earlier attempt has done so.

        Args:
            train_step: the update.
            state: before the next update.
            unfreezing: applies the last stage of the run meanwhile, which needs the most memory.

        """
        if self.config.train.micro_batch_size != "auto":
            return train_step
        run = self._run
        unfreezing.restore_stage(self.config.train.epochs - 1)
        train_step = with_largest_micro_batch(train_step, state.model, state.optimizer, self.config, run.console)
        unfreezing.restore_stage(state.epoch)

        def save() -> None:
            if run.is_writer and train_step.micro_batch_size is not None:
                reason = "found by train.micro_batch_size auto"
                save_micro_batch_size(run, train_step.micro_batch_size, self._options, reason=reason)

        run.ctx.main_process_first(save)
        return train_step

    @contextmanager
    def halved_if_out_of_memory(self, train_step: TrainStep) -> Iterator[None]:
        """Let the next attempt take micro-batches of half the size if the block runs out of memory on this process.

        Raises:
            OutOfMemory: it did.
            UserError: it did, and the micro-batches cannot be smaller.

        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = min(self._local, train_step.micro_batch_size or -(-self._local // train_step.grad_accum_steps))
            # What failed, and how much memory was asked for.
            reason = " ".join(re.split(r"(?<=\.)\s", str(error))[:2])[:200].rstrip(".") or type(error).__name__
            message = f"out of memory with micro-batches of {size} image{'s' * (size > 1)} ({reason})"
            is_whole = self.config.transfer.batch_norm == "sync"
            if size == 1 or is_whole:
                cause = "transfer.batch_norm sync does not split the batch" if is_whole else "they cannot be smaller"
                raise UserError(
                    f"{message}, and {cause}: use train.gradient_checkpointing true, train.precision bf16, a smaller "
                    "data.image_size, or a device with more memory"
                ) from error
            half = -(-size // 2)
            save_micro_batch_size(self._run, half, self._options, reason=message)
            raise OutOfMemory(
                f"{message}: the next attempt resumes from the newest checkpoint with micro-batches of {half}, which "
                "make the same updates"
            ) from error


def with_largest_micro_batch(
    train_step: TrainStep, model: nn.Module, optimizer: torch.optim.Optimizer, config: ResolvedConfig, console: Console
) -> TrainStep:
    """Return the update with the largest micro-batches that fit, and print their size; unless the size is given.

    Every process must call it. See `largest_micro_batch` for the arguments.
    """
    if config.train.micro_batch_size != "auto":
        return train_step
    local = -(-config.train.batch_size // train_step.ctx.world_size)
    with torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext():
        size, how = largest_micro_batch(train_step, model, optimizer, image_size=config.data.image_size, local=local)
    parts = -(-local // size)
    split = f"{parts} micro-batches per update" if parts > 1 else "one micro-batch per update"
    console.print(f"micro-batch size {size}, {how}: {split}")
    return replace(train_step, grad_accum_steps=1, micro_batch_size=size)

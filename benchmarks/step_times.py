"""Train by regraft's command line, and measure the parts of a step.

    python -m benchmarks.step_times RECORD OPTIONS...

The pieces of the real training loop are wrapped by clocks. The device is synchronized whenever a clock starts or stops,
so on a GPU the parts do not overlap as they do in a normal run.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakSet

import torch
from torch import nn

from trainer import train_run
from trainer.loop import fit
from trainer.main import main as train

OTHER = "logging and other"
BETWEEN_EPOCHS = "between epochs"
"""Evaluation, checkpoints and curves, which are no part of a step."""
PARTS = ("data wait", "host to device", "forward", "backward", "optimizer", OTHER)


class Clock:
    """Adds up the time of each part. Parts may be nested: the time of the inner one counts for it alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._part, self._began = OTHER, time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.steps = self.images = 0

    def reset(self) -> None:
        """Forget what was measured so far."""
        self.switch(self._part)
        self.seconds, self.steps, self.images = {}, 0, 0

    def switch(self, part: str) -> str:
        """Start a part; return the one that ends."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        ended, self._part = self._part, part
        self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._began
        self._began = now
        return ended

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Measure the body as a part."""
        outer = self.switch(part)
        try:
            yield
        finally:
            self.switch(outer)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, measured as a part."""

        @wraps(function, updated=())
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.measure(part):
                return function(*arguments, **options)

        return measured


class TimedLoader:
    """A loader whose batches are waited for under the clock."""

    def __init__(self, loader: Any, clock: Clock) -> None:
        self._loader, self._clock = loader, clock
        self.paths = loader.paths

    def __next__(self) -> Any:
        with self._clock.measure("data wait"):
            batch = next(self._loader)
        self._clock.steps += 1
        self._clock.images += len(batch[1])
        return batch


def measured_fit(record: Path, state: Any, loader: Any, schedule: Any, train_step: Any, **callbacks: Any) -> None:
    """Train by `fit`, and write the seconds of each part, without those of the first epoch."""
    accelerator, optimizer = train_step.ctx.accelerator, state.optimizer
    clock, hooked = Clock(accelerator.device), WeakSet[nn.Module]()
    start_epoch = callbacks["start_epoch"]
    outer: list[str] = []

    def start(epoch: int, interrupted: Callable[[], bool]) -> nn.Module:
        model: nn.Module = start_epoch(epoch, interrupted)
        if model not in hooked:
            hooked.add(model)
            model.register_forward_pre_hook(lambda *_: outer.append(clock.switch("forward")))
            model.register_forward_hook(lambda *_: clock.switch(outer.pop()) and None)
        if epoch == 1:
            clock.reset()
        return model

    for owner, name, part in (
        (accelerator, "backward", "backward"),
        *((optimizer, name, "optimizer") for name in ("step", "zero_grad")),
        *((callbacks["checkpoints"], name, BETWEEN_EPOCHS) for name in ("end_epoch", "save")),
        *((callbacks["logger"], name, BETWEEN_EPOCHS) for name in ("log_epoch", "draw_curves")),
    ):
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    callbacks["start_epoch"] = clock.timed(BETWEEN_EPOCHS, start)
    callbacks["evaluate"] = clock.timed(BETWEEN_EPOCHS, callbacks["evaluate"])
    forward = {name: clock.timed("forward", getattr(train_step, name)) for name in ("normalize", "criterion")}
    from accelerate import data_loader  # noqa: PLC0415

    with mock.patch.object(data_loader, "send_to_device", clock.timed("host to device", data_loader.send_to_device)):
        fit(state, TimedLoader(loader, clock), schedule, replace(train_step, **forward), **callbacks)
    clock.switch(OTHER)
    missing = [part for part in ("data wait", "forward", "backward", "optimizer") if not clock.seconds.get(part)]
    if missing:
        raise RuntimeError(f"nothing was measured of {', '.join(missing)}: the training loop has changed")
    seconds = {part: clock.seconds.get(part, 0.0) for part in PARTS}
    record.write_text(json.dumps({"seconds": seconds, "steps": clock.steps, "images": clock.images}))


def main(record: Path, options: list[str]) -> int:
    """Train with the trainer's options; return its exit code."""

    def replacement(*arguments: Any, **callbacks: Any) -> None:
        measured_fit(record, *arguments, **callbacks)

    with mock.patch.object(train_run, "fit", replacement):
        return train(options)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))

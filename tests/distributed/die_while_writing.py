"""Die before every call that writes a checkpoint: `python -m tests.distributed.die_while_writing FOLDER`.

A process resumes from two checkpoints, saves a third one with the best model, prunes the first one, and is killed right
before one of the system calls that change files, or after the last one. Then the run is resumed from what is left.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from regraft.contract import ATTEMPTS, CHECKPOINTS, MODEL
from tests.trainer.checkpoint.checkpoints import with_metadata
from tests.trainer.runs import MODEL_METADATA, make_run
from tests.trainer.training import same_tensors
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import CheckpointId
from trainer.checkpoint.store import LoadedCheckpoint
from trainer.evaluate import Evaluation
from trainer.metrics import BestEpoch
from trainer.model.metadata import read_metadata
from trainer.optim.ema import ModelEma
from trainer.optim.schedule import TrainSchedule
from trainer.run.atomic import remove_leftovers
from trainer.run.lock import RunLock
from trainer.state import TrainState

PIECE = 512
"""Number of bytes of each write; a process dies between any two of them."""
EPOCHS = 10
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")
SCHEDULE = TrainSchedule(batch_sizes=(4,), epochs=EPOCHS, logs_per_epoch=1, lr_multiplier=lambda step: 1.0)
EVERY_STEP = RetentionPolicy(every_steps=1, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)


# What is saved: all of it follows from the epoch, so that a test knows what has to be restored.


def make_state(epoch: int) -> TrainState:
    """Return the state after some epochs of one update each."""
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(epoch)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.randn(parameter.shape, generator=generator)}
    best = BestEpoch(epoch=epoch, step=epoch, value=epoch / EPOCHS, loss=1 / EPOCHS) if epoch else None
    return TrainState(model=model, optimizer=optimizer, ema=ModelEma(model, None), epoch=epoch, step=epoch, best=best)


def metrics(epoch: int) -> str:
    return "".join(json.dumps({"kind": "epoch", "epoch": n + 1, "step": n + 1}) + "\n" for n in range(epoch))


def save_epoch(folder: Path, lock: RunLock, epoch: int) -> None:
    """End an epoch that is the best so far: the model file and a checkpoint are written, an old one is pruned."""
    run = make_run(folder, SimpleNamespace(world_size=1, is_main_process=True, all_reduce_max=list), lock)
    saver = CheckpointSaver(
        run, retention=EVERY_STEP, metadata=with_metadata(steps_per_epoch=1), model_metadata=MODEL_METADATA,
        selected_on="test", order_digest=lambda epoch: f"order of epoch {epoch}",
    )  # fmt: skip
    earlier, state = make_state(epoch - 1), make_state(epoch)
    row = {"kind": "epoch", "epoch": epoch, "step": epoch}
    logger = SimpleNamespace(failure=None, epochs=[row], text=metrics(epoch))
    never = EarlyStopping(split=None, patience=None)
    manager = CheckpointManager(
        run, earlier, SCHEDULE, saver=saver, retention=EVERY_STEP, early_stopping=never, logger=logger
    )
    with manager:
        vars(earlier).update(vars(state) | {"best": earlier.best})  # the epoch's update
        manager.end_epoch({"test": Evaluation(1.0, (epoch, 0), (EPOCHS, 0), (EPOCHS, 0))})


# Where the process dies


class Calls:
    """Counts the calls that change files, and kills this process before one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.made: list[str] = []
        self._fatal = fatal

    def patch(self) -> None:
        """Wrap every such call."""
        for name in CALLS:
            setattr(os, name, partial(self._make_on_path, name, getattr(os, name)))
        os.fsync = lambda handle: self.make("fsync", lambda: None)  # type: ignore[assignment]
        real = io.open

        def counting_open(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(file, mode, *args, **settings)
            opened = self.make(f"open {Path(file).name}", lambda: real(file, mode, *args, **settings))
            return WrittenFile(self, opened)

        io.open = builtins.open = counting_open  # type: ignore[assignment]

    def _make_on_path(self, name: str, real: Callable[..., Any], path: str, *args: Any, **settings: Any) -> Any:
        return self.make(f"{name} {Path(path).name}", lambda: real(path, *args, **settings))

    def make(self, what: str, call: Callable[[], Any]) -> Any:
        """Make a call, or die."""
        if len(self.made) == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.made.append(what)
        return call()


class WrittenFile:
    """A file that is written to the disk in pieces."""

    def __init__(self, calls: Calls, file: Any) -> None:
        self._calls, self._file = calls, file

    def write(self, content: Any) -> int:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self._calls.make("write", lambda piece=piece: (self._file.write(piece), self._file.flush()))
        return len(content)

    def __enter__(self) -> "WrittenFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def save_and_die(folder: Path, fatal: int | None) -> list[str]:
    """Save epoch 3 in another process, which dies before call `fatal` or after the last; return the calls."""
    calls, report = Calls(fatal), folder.parent / "calls"
    child = os.fork()
    if child == 0:
        try:
            lock = RunLock.acquire(folder, log=str)
            load(folder)
            calls.patch()
            save_epoch(folder, lock, 3)
            report.write_text(json.dumps(calls.made))
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:  # noqa: BLE001 (the child must not return from here)
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return json.loads(report.read_text())  # type: ignore[no-any-return]


# What is left


def load(folder: Path) -> LoadedCheckpoint:
    """Return the newest checkpoint as the next start loads it; check that all are whole and nothing else is left."""
    checkpoints = folder / CHECKPOINTS
    store.clean_up(checkpoints)
    remove_leftovers(folder, MODEL)
    remove_leftovers(folder / ATTEMPTS, "*")
    messages: list[str] = []
    latest = store.load_latest(checkpoints, log=messages.append)
    assert latest is not None
    assert not messages, messages
    ids = store.list_checkpoints(checkpoints)
    expected = {store.LATEST, *(checkpoint.name for checkpoint in ids)}
    assert {path.name for path in checkpoints.iterdir()} == expected, "a damaged checkpoint, or leftovers"
    assert {path.name for path in folder.iterdir()} == {CHECKPOINTS, ATTEMPTS, MODEL}
    assert all(path.suffix == ".json" and path.name[0] != "." for path in (folder / ATTEMPTS).iterdir())
    assert (checkpoints / store.LATEST).read_text() == f"{ids[0].name}\n"
    assert latest.path.name == ids[0].name
    for checkpoint in ids:
        check_content(store.read(checkpoints / checkpoint.name))
    return latest


def check_content(loaded: LoadedCheckpoint) -> None:
    expected, state = make_state(loaded.state.epoch).state_dict(), make_state(0)
    state.load_state_dict(loaded.state_dict(), where="checkpoint")
    actual = state.state_dict()
    assert all(same_tensors(actual[name], expected[name]) for name in ("model", "optimizer", "ema"))
    assert [actual[k] for k in ("epoch", "step", "metrics")] == [expected[k] for k in ("epoch", "step", "metrics")]
    assert actual["best"].epoch == loaded.state.epoch
    assert loaded.metrics == metrics(loaded.state.epoch)


def model_epoch(folder: Path) -> int:
    """Return the epoch of the run's model file; check that it is whole."""
    metadata = read_metadata(folder / MODEL)
    assert metadata is not None
    epoch = int(metadata.metrics["epoch"])
    assert same_tensors(load_file(folder / MODEL), dict(make_state(epoch).model.state_dict()))
    return epoch


def resume(folder: Path, epochs: range) -> None:
    """Resume and save some epochs; check that the last two remain."""
    lock = RunLock.acquire(folder, log=str)
    for epoch in epochs:
        save_epoch(folder, lock, epoch)
    lock.end("done")
    last = epochs[-1]
    assert store.list_checkpoints(folder / CHECKPOINTS) == [CheckpointId(n, n) for n in (last, last - 1)]
    assert load(folder).state.epoch == model_epoch(folder) == last


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # A killed process loses nothing that it has written: fsync matters for power failures alone.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    start, run = folder / "start", folder / "run"
    resume(start, range(1, 3))
    shutil.copytree(start, run)
    calls = save_and_die(run, None)
    (renamed,) = (n for n, call in enumerate(calls) if call.startswith("rename .writing-"))
    model_replaced = next(n for n, call in enumerate(calls) if call.startswith(f"replace .{MODEL}."))

    epochs = []
    for fatal in range(len(calls) + 1):
        shutil.rmtree(run)
        shutil.copytree(start, run)
        save_and_die(run, fatal)
        try:
            epochs.append(load(run).state.epoch)
            assert epochs[-1] == (3 if fatal > renamed else 2)
            assert model_epoch(run) == (3 if fatal > model_replaced else 2)
            resume(run, range(epochs[-1] + 1, 5))
        except BaseException:
            print(f"killed before call {fatal} of {len(calls)}: {calls[fatal : fatal + 1]}", file=sys.stderr)
            raise
    (folder / "result.json").write_text(json.dumps({"calls": calls, "epochs": epochs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

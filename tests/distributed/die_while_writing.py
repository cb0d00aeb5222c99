"""Die at every call that writes a checkpoint: `python -m tests.distributed.die_while_writing FOLDER`.

A process resumes from two checkpoints, saves a third one with the best model, prunes the first one, and is killed right
before or after one of the system calls that change files. Then the run is resumed from what is left.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from regraft.contract import ATTEMPTS, CHECKPOINTS, MODEL
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import CheckpointId, RunIdentity, RunMetadata
from trainer.checkpoint.store import LoadedCheckpoint
from trainer.data.augment import Preprocessing
from trainer.data.sampler import EpochOrder
from trainer.distributed.signals import StopSignals
from trainer.evaluate import Evaluation
from trainer.metrics import BestEpoch
from trainer.model.metadata import ModelMetadata, read_metadata
from trainer.optim.ema import ModelEma
from trainer.optim.schedule import TrainSchedule
from trainer.run.atomic import remove_leftovers
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun
from trainer.state import TrainState

PIECE = 512
"""Number of bytes of each write; a process dies between any two of them."""
EPOCHS = 10
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")
ORDER = EpochOrder(examples=4, batch_size=4, seed=0)
SCHEDULE = TrainSchedule(batch_sizes=ORDER.batch_sizes, epochs=EPOCHS, logs_per_epoch=1, lr_multiplier=lambda step: 1.0)
PREPROCESSING = Preprocessing(
    image_size=8, resize_size=8, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
)  # fmt: skip


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
    best = BestEpoch(epoch=epoch, step=epoch, accuracy=epoch / EPOCHS, loss=1 / EPOCHS) if epoch else None
    return TrainState(model=model, optimizer=optimizer, ema=ModelEma(model, None), epoch=epoch, step=epoch, best=best)


def metrics(epoch: int) -> str:
    return "".join(json.dumps({"kind": "epoch", "epoch": n + 1, "step": n + 1}) + "\n" for n in range(epoch))


def equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)


def save_epoch(folder: Path, lock: RunLock, epoch: int) -> None:
    """End an epoch that is the best so far: the model file and a checkpoint are written, an old one is pruned."""
    ctx: Any = SimpleNamespace(world_size=1, is_main_process=True, all_reduce_max=list)
    console: Any = None
    run = OpenRun(
        ctx=ctx, console=console, signals=StopSignals(), root=folder, folder=folder, lock=lock, attempt=1,
        hang_timeout=None,
    )  # fmt: skip
    retention = RetentionPolicy(every_steps=1, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)
    saver = CheckpointSaver(
        run,
        retention=retention,
        metadata=RunMetadata(
            identity=RunIdentity(architecture="resnet18", classes=("a", "b"), examples=(2, 2), data="0"),
            seed=0, steps_per_epoch=1, schedule={}, auto_resolved={}, world_size=1, threads=1, attempt=1, versions={},
        ),
        model_metadata=ModelMetadata(
            version="0", architecture="resnet18", classes=("a", "b"), preprocessing=PREPROCESSING, source="", metrics={}
        ),
        selected_on="test",
        order_digest=ORDER.digest,
    )  # fmt: skip
    earlier, state = make_state(epoch - 1), make_state(epoch)
    row = {"kind": "epoch", "epoch": epoch, "step": epoch}
    logger = SimpleNamespace(failure=None, epochs=[row], text=metrics(epoch))
    manager = CheckpointManager(
        run, earlier, SCHEDULE, saver=saver, retention=retention,
        early_stopping=EarlyStopping(split=None, patience=None), logger=logger,
    )  # fmt: skip
    with manager:
        vars(earlier).update(vars(state) | {"best": earlier.best})  # the epoch's update
        evaluation = Evaluation(1.0, (epoch, 0), (EPOCHS, 0), (EPOCHS, 0))
        manager.end_epoch({"test": evaluation})


# Where the process dies


class Calls:
    """Counts the calls that change files, and kills this process before or after one of them."""

    def __init__(self, fatal: int | None, *, after: bool) -> None:
        self.made: list[str] = []
        self._fatal, self._after = fatal, after

    def patch(self) -> None:
        """Wrap every such call."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = lambda handle: self.make("fsync", lambda: None)  # type: ignore[assignment]
        real = io.open

        def counting_open(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
            def call() -> Any:
                return real(file, mode, *args, **settings)

            if not set(mode) & set("wxa+"):
                return call()
            return WrittenFile(self, self.make(f"open {Path(file).name}", call))

        io.open = builtins.open = counting_open  # type: ignore[assignment]

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *args, **settings: self.make(
            f"{name} {Path(path).name}", lambda: real(path, *args, **settings)
        )

    def make(self, what: str, call: Callable[[], Any]) -> Any:
        """Make a call, or die."""
        self.made.append(what)
        is_fatal = len(self.made) - 1 == self._fatal
        if is_fatal and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call()
        finally:  # an existing folder or a missing file may be no error
            if is_fatal:
                os.kill(os.getpid(), signal.SIGKILL)


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


def save_and_die(folder: Path, fatal: int | None, *, after: bool) -> list[str]:
    """Save epoch 3 in another process, which dies at call `fatal`; return its calls if it is None."""
    calls = Calls(fatal, after=after)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            lock = RunLock.acquire(folder, log=str)
            load(folder)
            calls.patch()
            save_epoch(folder, lock, 3)
            (folder.parent / "calls").write_text(json.dumps(calls.made))
            code = 0
        except BaseException:  # noqa: BLE001 (the child must not return from here)
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if fatal is None:
        assert status == 0, f"the status is {status}"
        made: list[str] = json.loads((folder.parent / "calls").read_text())
        return made
    assert os.WIFSIGNALED(status), "the process was not killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return []


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
    assert all(equal(actual[name], expected[name]) for name in ("model", "optimizer", "ema"))
    assert [actual[k] for k in ("epoch", "step", "metrics")] == [expected[k] for k in ("epoch", "step", "metrics")]
    assert actual["best"].epoch == loaded.state.epoch
    assert loaded.metrics == metrics(loaded.state.epoch)


def model_epoch(folder: Path) -> int:
    """Return the epoch of the run's model file; check that it is whole."""
    metadata = read_metadata(folder / MODEL)
    assert metadata is not None
    epoch = int(metadata.metrics["epoch"])
    assert equal(load_file(folder / MODEL), dict(make_state(epoch).model.state_dict()))
    return epoch


def resume(folder: Path, epoch: int) -> None:
    """Resume after an epoch, and save up to epoch 4."""
    lock = RunLock.acquire(folder, log=str)
    for following in range(epoch + 1, 5):
        save_epoch(folder, lock, following)
    lock.end("done")
    assert store.list_checkpoints(folder / CHECKPOINTS) == [CheckpointId(4, 4), CheckpointId(3, 3)]
    assert load(folder).state.epoch == 4
    assert model_epoch(folder) == 4


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # A killed process loses nothing that it has written: fsync matters for power failures alone.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    start, run = folder / "start", folder / "run"
    lock = RunLock.acquire(start, log=str)
    save_epoch(start, lock, 1)
    save_epoch(start, lock, 2)
    lock.end("stopped")
    assert [checkpoint.step for checkpoint in store.list_checkpoints(start / CHECKPOINTS)] == [2, 1]

    shutil.copytree(start, run)
    calls = save_and_die(run, None, after=False)
    assert load(run).state.epoch == 3
    (renamed,) = (n for n, call in enumerate(calls) if call.startswith("rename .writing-"))
    model_replaced = next(n for n, call in enumerate(calls) if call.startswith(f"replace .{MODEL}."))

    epochs = []
    for fatal, call in enumerate(calls):
        for after in (False, True):
            shutil.rmtree(run)
            shutil.copytree(start, run)
            save_and_die(run, fatal, after=after)
            try:
                epoch = load(run).state.epoch
                assert epoch == (3 if fatal + after > renamed else 2)
                assert model_epoch(run) == (3 if fatal + after > model_replaced else 2)
                if after:  # before a call, the files are as after the previous one
                    resume(run, epoch)
            except BaseException:
                moment = "after" if after else "before"
                print(f"killed {moment} call {fatal} of {len(calls)}: {call}", file=sys.stderr)
                raise
            epochs.append(epoch)
    (folder / "result.json").write_text(json.dumps({"calls": calls, "epochs": epochs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

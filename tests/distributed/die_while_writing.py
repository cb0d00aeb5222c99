"""Save as a run does, in processes that die at every call which changes a file: `die_while_writing FOLDER`.

Each one goes on from the same two checkpoints, saves a third with the best model before it and the first pruned
after it, and is killed right before or right after one of those calls. What it leaves is then taken up again.
"""

import builtins
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from trainer.checkpoint.tensors import restore

from trainer.checkpoint import store
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import CheckpointState, RunIdentity
from trainer.checkpoint.store import CheckpointId, LoadedCheckpoint
from trainer.data.augment import Preprocessing
from trainer.data.loader import EpochOrder
from trainer.distributed.signals import StopSignals
from trainer.evaluate import Evaluation
from trainer.loop import Progress
from trainer.metrics import Metrics
from trainer.model.metadata import ModelMetadata, read_metadata
from trainer.run.atomic import remove_leftovers
from trainer.run.folder import CHECKPOINTS, MODEL
from trainer.run.lock import ATTEMPTS, RunLock

PIECE = 512
"""Bytes that are written at a time: a process dies between any two of them."""
EPOCHS = 10
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")
PREPROCESSING = Preprocessing(
    image_size=8,
    resize_size=8,
    resize="squash",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


# What is saved: everything in it follows from the epoch, so that it is known what has to come back.


def network(epoch: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and an optimizer, as they are after that many epochs."""
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(epoch)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator) if "num" not in name else torch.tensor(epoch)
            )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.randn(parameter.shape, generator=generator)}
    return model, optimizer


def metrics(epoch: int) -> str:
    return "".join(json.dumps({"kind": "epoch", "epoch": n + 1, "step": n + 1}) + "\n" for n in range(epoch))


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


def keeper(folder: Path, attempt: RunLock, earlier: CheckpointState | None, epoch: int) -> CheckpointManager:
    """Return the keeper of a run that goes on from `earlier` and comes to the end of an epoch."""
    model, optimizer = network(epoch)
    single: Any = SimpleNamespace(world_size=1, is_main_process=True, agree=list)
    report: Any = SimpleNamespace(
        failure=None, rows=[{"kind": "epoch", "epoch": epoch, "step": epoch}], text=metrics(epoch)
    )
    return CheckpointManager(
        ctx=single,
        signals=StopSignals(),
        attempt=attempt,
        folder=folder,
        model=model,
        optimizer=optimizer,
        scaler=None,
        order=EpochOrder(examples=4, batch_size=4, seed=0),
        epochs=EPOCHS,
        policy=RetentionPolicy(
            every_steps=1, every_seconds=None, keep_last=2, keep_best=False, keep_every=None
        ),
        run_metadata={
            "seed": 0,
            "schedule": {"kind": "constant"},
            "chosen": {},
            "threads": 1,
            "versions": {},
        },
        lr_multiplier=lambda step: 1.0,
        identity=RunIdentity(architecture="resnet18", classes=("a", "b"), examples=(2, 2), data="0"),
        description=ModelMetadata(
            version="0",
            architecture="resnet18",
            classes=("a", "b"),
            preprocessing=PREPROCESSING,
            source="",
            metrics={},
        ),
        selection=None,
        logger=report,
        best=earlier.best if earlier else None,
        last=CheckpointId(earlier.step, earlier.epoch) if earlier else None,
    )


def save(folder: Path, attempt: RunLock, earlier: CheckpointState | None, epoch: int) -> None:
    """Come to the end of an epoch that is the best so far: its model is written, its state, and one is pruned."""
    figures = Metrics(
        loss_sum=1.0, correct=1, seen=4, seconds=1.0, compute_seconds=1.0, first_nonfinite_step=None
    )
    progress = Progress(epoch=epoch, epoch_step=1, step=epoch, metrics=figures, lr={})
    evaluation = Evaluation(1.0, (epoch, 0), (EPOCHS, 1), (epoch, EPOCHS + 1 - epoch))
    with keeper(folder, attempt, earlier, epoch) as saving:
        saving.end_epoch(progress, {"test": evaluation})


# Where it dies


class Calls:
    """The calls that change files, counted; this process is killed before or after one of them."""

    def __init__(self, fatal: int | None, *, after: bool) -> None:
        self.made: list[str] = []
        self._fatal, self._after = fatal, after

    def arm(self) -> None:
        """Stand in the way of every such call from here on."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = lambda handle: self.make("fsync", lambda: None)  # type: ignore[assignment]
        real = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(file, mode, *args, **settings)
            return Written(
                self, self.make(f"open {Path(file).name}", lambda: real(file, mode, *args, **settings))
            )

        io.open = builtins.open = opened  # type: ignore[assignment]

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
        finally:  # a folder that was there, or a file that was not, is no error
            if is_fatal:
                os.kill(os.getpid(), signal.SIGKILL)


class Written:
    """A file whose every piece comes to the disk on its own."""

    def __init__(self, calls: Calls, file: Any) -> None:
        self._calls, self._file = calls, file

    def write(self, content: Any) -> int:
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self._calls.make("write", lambda piece=piece: (self._file.write(piece), self._file.flush()))
        return len(content)

    def __enter__(self) -> "Written":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def die(folder: Path, fatal: int | None, *, after: bool) -> list[str]:
    """Save epoch 3 in another process, and return the calls it made if it has lived."""
    calls = Calls(fatal, after=after)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            attempt = RunLock.acquire(folder, log=str)
            earlier = taken_up(folder).state
            calls.arm()
            save(folder, attempt, earlier, 3)
            text = json.dumps(calls.made)
            (folder.parent / "calls").write_text(text)
            code = 0
        except BaseException:  # noqa: BLE001 (it must not come back from here)
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if fatal is None:
        assert status == 0, f"not killed, but its status is {status}"
        made: list[str] = json.loads((folder.parent / "calls").read_text())
        return made
    assert os.WIFSIGNALED(status), "it was to be killed"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return []


# What is left


def taken_up(folder: Path) -> LoadedCheckpoint:
    """Return the newest checkpoint as the next start finds it, and require that it is whole and nothing is lost."""
    checkpoints = folder / CHECKPOINTS
    store.clean_up(checkpoints)
    remove_leftovers(folder, MODEL)
    remove_leftovers(folder / ATTEMPTS, "*")
    said: list[str] = []
    found = store.load_latest(checkpoints, log=said.append)
    assert found is not None
    assert not said, said
    places = store.list_checkpoints(checkpoints)
    expected = {store.LATEST, *(place.name for place in places)}
    assert {path.name for path in checkpoints.iterdir()} == expected, "no damage, no leftovers"
    assert {path.name for path in folder.iterdir()} == {CHECKPOINTS, ATTEMPTS, MODEL}
    assert all(path.suffix == ".json" and path.name[0] != "." for path in (folder / ATTEMPTS).iterdir())
    assert (checkpoints / store.LATEST).read_text() == f"{places[0].name}\n"
    assert found.path.name == places[0].name
    for place in places:
        require_right(store.read(checkpoints / place.name))
    return found


def require_right(found: LoadedCheckpoint) -> None:
    """Require that a checkpoint holds what was saved in it."""
    epoch = found.state.epoch
    expected, expected_optimizer = network(epoch)
    model, optimizer = network(0)
    restore(found.path, model, optimizer, updated=True)
    assert same(dict(model.state_dict()), dict(expected.state_dict()))
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        momentum, other_momentum = optimizer.state[mine], expected_optimizer.state[other]
        assert torch.equal(momentum["momentum_buffer"], other_momentum["momentum_buffer"])
    assert found.metrics == metrics(epoch)
    assert found.state.step == epoch
    assert found.state.best is not None
    assert found.state.best.epoch == epoch


def model_epoch(folder: Path) -> int:
    """Return which epoch's model the run's model file holds, and require that it is whole."""
    description = read_metadata(folder / MODEL)
    assert description is not None
    epoch = int(description.metrics["epoch"])
    assert same(load_file(folder / MODEL), dict(network(epoch)[0].state_dict()))
    return epoch


def go_on(folder: Path, found: LoadedCheckpoint) -> None:
    """Save up to epoch 4."""
    attempt = RunLock.acquire(folder, log=str)
    state = found.state
    for epoch in range(state.epoch + 1, 5):
        save(folder, attempt, state, epoch)
        state = store.read(folder / CHECKPOINTS / CheckpointId(epoch, epoch).name).state
    attempt.end("done")
    assert store.list_checkpoints(folder / CHECKPOINTS) == [CheckpointId(4, 4), CheckpointId(3, 3)]
    assert taken_up(folder).state == state
    assert model_epoch(folder) == 4


def main(folder: Path) -> None:
    began = time.monotonic()
    torch.set_num_threads(1)
    # A process that is killed loses nothing that it has written: only a power cut makes a difference.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    start, run = folder / "start", folder / "run"
    attempt = RunLock.acquire(start, log=str)
    save(start, attempt, None, 1)
    save(start, attempt, taken_up(start).state, 2)
    attempt.end("stopped")
    assert [place.step for place in store.list_checkpoints(start / CHECKPOINTS)] == [2, 1]

    shutil.copytree(start, run)
    calls = die(run, None, after=False)
    assert taken_up(run).state.epoch == 3
    (put_in_place,) = (n for n, call in enumerate(calls) if call.startswith("rename .writing-"))
    model_replaced = next(n for n, call in enumerate(calls) if call.startswith(f"replace .{MODEL}."))

    found_epochs = []
    for fatal, call in enumerate(calls):
        for after in (False, True):
            shutil.rmtree(run)
            shutil.copytree(start, run)
            die(run, fatal, after=after)
            try:
                found = taken_up(run)
                done = fatal + after  # calls
                assert found.state.epoch == (3 if done > put_in_place else 2)
                assert model_epoch(run) == (3 if done > model_replaced else 2)
                if after:  # what is left before a call is what was left after the one before it
                    go_on(run, found)
            except BaseException:
                print(
                    f"killed {'after' if after else 'before'} call {fatal} of {len(calls)}: {call}",
                    file=sys.stderr,
                )
                raise
            found_epochs.append(found.state.epoch)
    result = {"calls": calls, "found": found_epochs, "seconds": time.monotonic() - began}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

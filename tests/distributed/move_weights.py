"""What tests/distributed/test_moving_weights.py runs in each process: `move_weights.py OUT`."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

from tests.folders import image_folder
from tests.trainer.transfer.test_wise_ft import DESCRIPTION, net
from trainer.checkpoint import store
from trainer.checkpoint.manager import Keeper
from trainer.checkpoint.resume import put_back
from trainer.checkpoint.tensors import capture, capture_average
from trainer.config.parse import dump
from trainer.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RegulariseConfig,
    RunConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.data.loader import Order
from trainer.distributed import context
from trainer.distributed.signals import StopSignals
from trainer.evaluate import Evaluation
from trainer.loop import Plan, Share, Start, Wish, fit
from trainer.main import leave
from trainer.metrics import Sums
from trainer.model.batch_norm import gather_statistics
from trainer.model.file import write_model
from trainer.optim.ema import Shadow
from trainer.optim.param_groups import group_parameters, make_optimizer
from trainer.pipeline import resolve
from trainer.report.logger import Silent
from trainer.run.folder import MODEL, START, write_config
from trainer.run.lock import Attempt, records
from trainer.train_run import finetune
from trainer.transfer.l2_sp import Pull, outside, spare_decay
from trainer.transfer.wise_ft import Search

SEED, DECAY, PULL = 3, 0.8, 0.3
ORDER = Order(examples=11, batch_size=4, seed=SEED)  # 3 steps an epoch, the last of 3 examples
PLAN = Plan(
    batch_sizes=ORDER.batch_sizes,
    epochs=2,
    loss_reduction="mean",
    accumulation=1,
    clip_norm=None,
    seed=SEED,
    points_per_epoch=1,
    lr_factor=lambda step: 1.0,
)


class Net(nn.Module):
    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))  # type: ignore[no-any-return]


def shares(rank: int, world: int, start: int) -> Iterator[Share]:
    """Yield a process's part of every global batch from a step of the run on."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (ORDER.examples, 3, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (ORDER.examples,), generator=generator)
    steps = [
        batch for epoch in range(PLAN.epochs) for batch in ORDER.permutation(epoch).split(ORDER.batch_size)
    ]
    for batch in steps[start:]:
        mine = batch[rank::world]
        yield images[mine], labels[mine], mine


class Left(Exception):
    """The state was saved where it was to be."""


class Saving:
    """A keeper that saves at one place, and leaves the loop there; and the listener beside it."""

    over = False

    def __init__(self, at: tuple[int, int] | None, save: Any) -> None:
        self.at, self._save = at, save
        self.just_before: list[list[float]] = []
        """Statistics of the average after each update."""
        self.shadow: Shadow | None = None

    def agree(self, step: int) -> Wish:
        return Wish(save=self.at is not None and step == self.at[0], stop=None)

    def save(self, epoch: int, step: int, sums: Sums) -> None:
        if (step, epoch) == self.at:
            self._save(step, epoch, sums)
            raise Left

    def epoch(self, progress: Any, evaluations: Any) -> str | None:
        if isinstance(progress, int):  # the listener's step
            return None
        if (progress.step, progress.epoch) == self.at:
            self._save(progress.step, progress.epoch, None)
            raise Left
        return None

    def step(self, epoch: int, epoch_step: int) -> None:
        assert self.shadow is not None
        layer = dict(self.shadow.model.named_modules())["norm"]
        if isinstance(layer, nn.BatchNorm2d):
            self.just_before.append(layer.running_mean.tolist())  # type: ignore[union-attr]

    def point(self, progress: Any) -> None: ...


def fitted(
    machine: context.Runtime,
    folder: Path,
    *,
    norm: bool,
    at: tuple[int, int] | None = None,
    found: Any = None,
) -> dict[str, Any]:
    """Train with an average and a pull, to the end or to `at`, where the state is saved; from `found` on if given."""
    torch.manual_seed(SEED)
    bare = Net(norm=norm)
    backbone = outside(bare, ["fc"])
    pull = Pull(backbone, PULL, decoupled=False)
    groups = group_parameters(bare, ["fc"], lr=0.05, head_lr_scale=2.0, weight_decay=0.01)
    optimizer = make_optimizer("sgd", spare_decay(groups, backbone), momentum=0.9)
    model, optimizer = machine.accelerator.prepare(bare, optimizer)
    shadow = Shadow(bare, DECAY)
    start = Start()
    if found is not None:
        error = put_back(found, bare, optimizer, None, machine=machine, shadow=shadow)
        assert error is None, error
        start = Start(epoch=found.state.epoch, step=found.state.step, sums=found.state.sums)

    def save(step: int, epoch: int, sums: Sums | None) -> None:
        statistics = gather_statistics(shadow.and_model(), machine.world)
        if machine.is_main:
            folder.mkdir(parents=True)
            tensors = capture(bare, optimizer) | capture_average(shadow.model)
            if statistics:
                tensors[store.STATISTICS] = statistics
            for name, held in tensors.items():
                save_file(held, folder / name)
        kept["sums"] = sums

    kept: dict[str, Any] = {"evaluated": [], "sums": None}

    def evaluate(model: nn.Module, interrupted: Any) -> dict[str, Any]:
        kept["evaluated"].append({name: tensor.tolist() for name, tensor in model.state_dict().items()})
        return {}

    saving = Saving(at, save)
    saving.shadow = shadow
    with contextlib.suppress(Left):
        fit(
            model, optimizer, shares(machine.rank, machine.world, start.step), PLAN, start,
            accelerator=machine.accelerator, normalise=lambda images: images.float() / 255, evaluate=evaluate,
            keeper=saving, listener=saving, paths_of=lambda epoch, step: [], shadow=shadow, pull=pull,
        )  # fmt: skip
    machine.accelerator.free_memory()
    now = {"model": bare.state_dict(), "average": shadow.model.state_dict()}
    return kept | {
        "just_before": saving.just_before,
        **{who: {name: tensor.tolist() for name, tensor in state.items()} for who, state in now.items()},
    }


def resumed(machine: context.Runtime, folder: Path, step: int, epoch: int) -> dict[str, Any]:
    """Save at a place, and train on from what was saved."""
    left = fitted(machine, folder, norm=True, at=(step, epoch))
    machine.accelerator.wait_for_everyone()
    state = SimpleNamespace(step=step, epoch=epoch, sums=left["sums"], scaler={})
    found = SimpleNamespace(path=folder, state=state)
    return fitted(machine, folder, norm=True, found=found)


def over(machine: context.Runtime) -> list[bool]:
    """Ask whether a run is over, of which rank 0 alone has the figures."""
    answers = []
    for accuracies in ([0.5, 0.6, 0.6], [0.5, 0.6, 0.7]):
        rows = [
            {"kind": "epoch", "epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0}
            for epoch, accuracy in enumerate(accuracies, start=1)
        ]
        report = SimpleNamespace(rows=rows if machine.is_main else Silent().rows)
        keeper: Any = SimpleNamespace(machine=machine, patience=1, selection="val", report=report)
        answers.append(Keeper._is_over(keeper))
    return answers


def line(machine: context.Runtime, home: Path) -> dict[str, Any]:
    """Find the best point of a line whose ends rank 0 alone can see yet; each process counts its half of the images."""
    folder = home / f"seen-by-{machine.rank}"
    folder.mkdir()
    if machine.is_main:
        write_model(folder / START, net(0, 0).state_dict(), DESCRIPTION)
        write_model(
            folder / MODEL, net(1, 9).state_dict(), dataclasses.replace(DESCRIPTION, metrics={"step": 4})
        )
    attempt = Attempt.claim(folder, say=print) if machine.is_main else None
    values: list[float] = []

    def evaluate(model: nn.Module, interrupted: Any, parts: Any = None) -> dict[str, Evaluation]:
        assert not interrupted()
        value = round(model[1].running_mean[0].item(), 3)  # type: ignore[index, union-attr, operator]
        values.append(value)
        mine = torch.tensor(25.0 - round(10 * abs(value - 0.4)))
        right = int(machine.accelerator.reduce(mine, reduction="sum"))
        return {parts[0]: Evaluation(loss_sum=1.0, correct=(right, 0), support=(100, 0), predicted=(100, 0))}

    search = Search(
        folder=folder,
        part="val",
        machine=machine,
        attempt=attempt,
        signals=StopSignals(),
        watch=contextlib.nullcontext,
        say=lambda table: None,
    )
    alpha = search.settle(lambda: net(7, 7), evaluate, step=4)
    if attempt is not None:
        attempt.end("done")
    kept = load_file(folder / MODEL)["0.weight"].unique().tolist() if machine.is_main else None
    return {"alpha": alpha, "values": values, "kept": kept}


def whole(machine: context.Runtime, home: Path) -> dict[str, Any]:
    """Make a whole run that does not get better, and start it again when it is finished."""
    if machine.is_main:
        parts = {"train": {"a": 4, "b": 3}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
        image_folder(home / "images", parts)
        torch.manual_seed(11)
        save_file(models.squeezenet1_1().state_dict(), home / "source.safetensors")
    machine.accelerator.wait_for_everyone()
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu", hang_timeout=None),
            data=DataConfig(root=str(home / "images"), image_size=32, workers=0, cache=str(home / "cache")),
            model=ModelConfig(name="squeezenet1_1", weights=str(home / "source.safetensors")),
            transfer=TransferConfig(wise_ft=True, l2_sp=0.1),
            optim=OptimConfig(lr=1e-30),
            regularise=RegulariseConfig(ema=0.9, early_stopping=1),
            train=TrainConfig(epochs=9, batch_size=4, precision="fp32", points_per_epoch=1),
        )
    )
    alphas, epochs = [], []
    for _ in range(2):
        attempt = Attempt.claim(home / "run", say=print) if machine.is_main else None
        if attempt is not None:
            write_config(home / "run", dump(config))
        outcome = finetune(
            config,
            machine,
            Console(quiet=True),
            weights=config.model.weights,
            attempt=attempt,
            signals=StopSignals(),
        )
        if attempt is not None:
            attempt.end("done")
        machine.accelerator.wait_for_everyone()
        alphas.append(outcome.alpha)
        epochs.append(len(outcome.rows))
    states = [(r.state, r.step, r.steps, r.epoch, r.epochs) for r in records(home / "run")]
    return {"alphas": alphas, "epochs": epochs, "states": states}


def main() -> None:
    out = Path(sys.argv[1])
    machine = context.start(device="cpu", precision="fp32", threads=1)
    found: dict[str, Any] = {"without": fitted(machine, out / "none", norm=False)}
    if machine.world > 1:
        found |= {
            "whole": fitted(machine, out / "none", norm=True),
            "within": resumed(machine, out / "within", 2, 0),
            "between": resumed(machine, out / "between", 3, 1),
            "over": over(machine),
            "line": line(machine, out),
            "run": whole(machine, out),
        }
    for one in found.values():
        if isinstance(one, dict):
            one.pop("sums", None)
    (out / f"found-{machine.world}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    context.shut_down()
    leave(0)


if __name__ == "__main__":
    main()

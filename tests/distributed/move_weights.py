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
from trainer.checkpoint.tensors import snapshot, snapshot_ema

from tests.folders import image_folder
from tests.trainer.transfer.test_wise_ft import DESCRIPTION, net
from trainer.checkpoint import store
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.resume import restore_checkpoint
from trainer.config.parse import dump
from trainer.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RegularizationConfig,
    RunConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.data.loader import EpochOrder
from trainer.distributed import context
from trainer.distributed.signals import StopSignals
from trainer.evaluate import Evaluation
from trainer.loop import ResumePoint, Share, StepDecision, TrainSchedule, fit
from trainer.main import exit_process
from trainer.metrics import MetricState
from trainer.model.batch_norm import gather_batch_norm_statistics
from trainer.model.metadata import write_model
from trainer.optim.ema import ModelEma
from trainer.optim.param_groups import group_parameters, make_optimizer
from trainer.pipeline import resolve
from trainer.report.logger import NullLogger
from trainer.run.folder import MODEL, START, write_config
from trainer.run.lock import RunLock, read_attempts
from trainer.train_run import train_run
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay
from trainer.transfer.wise_ft import WiseFT

SEED, DECAY, PULL = 3, 0.8, 0.3
ORDER = EpochOrder(examples=11, batch_size=4, seed=SEED)  # 3 steps an epoch, the last of 3 examples
PLAN = TrainSchedule(
    batch_sizes=ORDER.batch_sizes,
    epochs=2,
    loss_reduction="mean",
    grad_accum_steps=1,
    max_grad_norm=None,
    seed=SEED,
    logs_per_epoch=1,
    lr_multiplier=lambda step: 1.0,
)


class Net(nn.Module):
    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.fc = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))  # type: ignore[no-any-return]


def shares(rank: int, world_size: int, start: int) -> Iterator[Share]:
    """Yield a process's part of every global batch from a step of the run on."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (ORDER.examples, 3, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (ORDER.examples,), generator=generator)
    steps = [
        batch for epoch in range(PLAN.epochs) for batch in ORDER.permutation(epoch).split(ORDER.batch_size)
    ]
    for batch in steps[start:]:
        mine = batch[rank::world_size]
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
        self.ema: ModelEma | None = None

    def agree(self, step: int) -> StepDecision:
        return StepDecision(save=self.at is not None and step == self.at[0], stop=None)

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
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
        assert self.ema is not None
        layer = dict(self.ema.model.named_modules())["norm"]
        if isinstance(layer, nn.BatchNorm2d):
            self.just_before.append(layer.running_mean.tolist())  # type: ignore[union-attr]

    def point(self, progress: Any) -> None: ...


def fitted(
    ctx: context.DistributedContext,
    folder: Path,
    *,
    norm: bool,
    at: tuple[int, int] | None = None,
    found: Any = None,
) -> dict[str, Any]:
    """Train with an average and a pull, to the end or to `at`, where the state is saved; from `found` on if given."""
    torch.manual_seed(SEED)
    bare = Net(norm=norm)
    backbone = backbone_parameters(bare, ["fc"])
    l2_sp = L2SP(backbone, PULL, decoupled=False)
    groups = group_parameters(bare, ["fc"], lr=0.05, head_lr_scale=2.0, weight_decay=0.01)
    optimizer = make_optimizer("sgd", without_weight_decay(groups, backbone), momentum=0.9)
    model, optimizer = ctx.accelerator.prepare(bare, optimizer)
    ema = ModelEma(bare, DECAY)
    start = ResumePoint()
    if found is not None:
        error = restore_checkpoint(found, bare, optimizer, None, ctx=ctx, ema=ema)
        assert error is None, error
        start = ResumePoint(epoch=found.state.epoch, step=found.state.step, sums=found.state.sums)

    def save(step: int, epoch: int, sums: MetricState | None) -> None:
        statistics = gather_batch_norm_statistics(ema.and_model(), ctx.world_size)
        if ctx.is_main_process:
            folder.mkdir(parents=True)
            tensors = snapshot(bare, optimizer) | snapshot_ema(ema.model)
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
    saving.ema = ema
    with contextlib.suppress(Left):
        fit(
            model, optimizer, shares(ctx.rank, ctx.world_size, start.step), PLAN, start,
            accelerator=ctx.accelerator, normalize=lambda images: images.float() / 255, evaluate=evaluate,
            keeper=saving, listener=saving, batch_paths=lambda epoch, step: [], ema=ema, l2_sp=l2_sp,
        )  # fmt: skip
    ctx.accelerator.free_memory()
    now = {"model": bare.state_dict(), "average": ema.model.state_dict()}
    return kept | {
        "just_before": saving.just_before,
        **{who: {name: tensor.tolist() for name, tensor in state.items()} for who, state in now.items()},
    }


def resumed(ctx: context.DistributedContext, folder: Path, step: int, epoch: int) -> dict[str, Any]:
    """Save at a place, and train on from what was saved."""
    left = fitted(ctx, folder, norm=True, at=(step, epoch))
    ctx.accelerator.wait_for_everyone()
    state = SimpleNamespace(step=step, epoch=epoch, sums=left["sums"], scaler={})
    found = SimpleNamespace(path=folder, state=state)
    return fitted(ctx, folder, norm=True, found=found)


def over(ctx: context.DistributedContext) -> list[bool]:
    """Ask whether a run is over, of which rank 0 alone has the figures."""
    answers = []
    for accuracies in ([0.5, 0.6, 0.6], [0.5, 0.6, 0.7]):
        rows = [
            {"kind": "epoch", "epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0}
            for epoch, accuracy in enumerate(accuracies, start=1)
        ]
        report = SimpleNamespace(rows=rows if ctx.is_main_process else NullLogger().rows)
        keeper: Any = SimpleNamespace(ctx=ctx, patience=1, selection="val", report=report)
        answers.append(CheckpointManager._is_over(keeper))
    return answers


def line(ctx: context.DistributedContext, home: Path) -> dict[str, Any]:
    """Find the best point of a line whose ends rank 0 alone can see yet; each process counts its half of the images."""
    folder = home / f"seen-by-{ctx.rank}"
    folder.mkdir()
    if ctx.is_main_process:
        write_model(folder / START, net(0, 0).state_dict(), DESCRIPTION)
        write_model(
            folder / MODEL, net(1, 9).state_dict(), dataclasses.replace(DESCRIPTION, metrics={"step": 4})
        )
    attempt = RunLock.acquire(folder, log=print) if ctx.is_main_process else None
    values: list[float] = []

    def evaluate(model: nn.Module, interrupted: Any, parts: Any = None) -> dict[str, Evaluation]:
        assert not interrupted()
        value = round(model[1].running_mean[0].item(), 3)  # type: ignore[index, union-attr, operator]
        values.append(value)
        mine = torch.tensor(25.0 - round(10 * abs(value - 0.4)))
        right = int(ctx.accelerator.reduce(mine, reduction="sum"))
        return {parts[0]: Evaluation(loss_sum=1.0, correct=(right, 0), support=(100, 0), predicted=(100, 0))}

    search = WiseFT(
        folder=folder,
        split="val",
        ctx=ctx,
        attempt=attempt,
        signals=StopSignals(),
        watch=contextlib.nullcontext,
        log=lambda table: None,
    )
    alpha = search.select_alpha(lambda: net(7, 7), evaluate, step=4)
    if attempt is not None:
        attempt.end("done")
    kept = load_file(folder / MODEL)["0.weight"].unique().tolist() if ctx.is_main_process else None
    return {"alpha": alpha, "values": values, "kept": kept}


def whole(ctx: context.DistributedContext, home: Path) -> dict[str, Any]:
    """Make a whole run that does not get better, and start it again when it is finished."""
    if ctx.is_main_process:
        parts = {"train": {"a": 4, "b": 3}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
        image_folder(home / "images", parts)
        torch.manual_seed(11)
        save_file(models.squeezenet1_1().state_dict(), home / "source.safetensors")
    ctx.accelerator.wait_for_everyone()
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu", hang_timeout=None),
            data=DataConfig(
                root=str(home / "images"), image_size=32, num_workers=0, cache=str(home / "cache")
            ),
            model=ModelConfig(name="squeezenet1_1", weights=str(home / "source.safetensors")),
            transfer=TransferConfig(wise_ft=True, l2_sp=0.1),
            optim=OptimConfig(lr=1e-30),
            regularization=RegularizationConfig(ema=0.9, early_stopping=1),
            train=TrainConfig(epochs=9, batch_size=4, precision="fp32", logs_per_epoch=1),
        )
    )
    alphas, epochs = [], []
    for _ in range(2):
        attempt = RunLock.acquire(home / "run", log=print) if ctx.is_main_process else None
        if attempt is not None:
            write_config(home / "run", dump(config))
        outcome = train_run(
            config,
            ctx,
            Console(quiet=True),
            weights=config.model.weights,
            attempt=attempt,
            signals=StopSignals(),
        )
        if attempt is not None:
            attempt.end("done")
        ctx.accelerator.wait_for_everyone()
        alphas.append(outcome.alpha)
        epochs.append(len(outcome.rows))
    states = [(r.state, r.step, r.steps, r.epoch, r.epochs) for r in read_attempts(home / "run")]
    return {"alphas": alphas, "epochs": epochs, "states": states}


def main() -> None:
    out = Path(sys.argv[1])
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    found: dict[str, Any] = {"without": fitted(ctx, out / "none", norm=False)}
    if ctx.world_size > 1:
        found |= {
            "whole": fitted(ctx, out / "none", norm=True),
            "within": resumed(ctx, out / "within", 2, 0),
            "between": resumed(ctx, out / "between", 3, 1),
            "over": over(ctx),
            "line": line(ctx, out),
            "run": whole(ctx, out),
        }
    for one in found.values():
        if isinstance(one, dict):
            one.pop("sums", None)
    (out / f"found-{ctx.world_size}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    context.shut_down()
    exit_process(0)


if __name__ == "__main__":
    main()

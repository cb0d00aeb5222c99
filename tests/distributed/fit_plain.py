"""Run the loop on a model of the tests, under torchrun, and write the losses of each step."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from tests.distributed.test_parity import BATCH, DECAY, EPOCHS, HEAD_SCALE, LR, SEED, Plain, join_truncated
from trainer.data.augment import Normalize, Preprocessing, eval_transform
from trainer.data.loader import DistributedBatchSampler, EpochOrder, ImageDataset, make_dataloader
from trainer.distributed import context
from trainer.loop import NullCheckpointManager, Progress, ResumePoint, TrainSchedule, fit
from trainer.main import exit_process
from trainer.optim.param_groups import group_parameters, make_optimizer


class Recorder:
    """Keeps the mean loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum, self._seen = 0.0, 0

    def step(self, epoch: int, epoch_step: int) -> None: ...

    def point(self, progress: Progress) -> None:
        figures = progress.metrics
        if progress.epoch_step == 1:
            self._sum, self._seen = 0.0, 0
        self.losses.append((figures.loss_sum - self._sum) / (figures.seen - self._seen))
        self._sum, self._seen = figures.loss_sum, figures.seen

    def epoch(self, progress: Progress, evaluations: Any) -> None: ...


def losses(
    folder: Path, ctx: context.DistributedContext, reduction: Any, grad_accum_steps: int
) -> list[float]:
    torch.manual_seed(SEED)
    model = Plain()
    groups = group_parameters(model, ["last"], lr=LR[reduction], head_lr_scale=HEAD_SCALE, weight_decay=DECAY)
    model, optimizer = ctx.accelerator.prepare(model, make_optimizer("sgd", groups, momentum=0))
    preprocessing = Preprocessing(
        image_size=32,
        resize_size=36,
        resize="squash",
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    images = ImageDataset(join_truncated(folder), eval_transform(preprocessing), seed=SEED)
    order = EpochOrder(examples=len(images), batch_size=BATCH, seed=SEED)
    shares = DistributedBatchSampler(order, epochs=EPOCHS, rank=ctx.rank, world_size=ctx.world_size)
    loader = partial(
        make_dataloader, image_size=32, channels_last=False, workers=0, accelerator=ctx.accelerator
    )
    recorder = Recorder()
    fit(
        model,
        optimizer,
        iter(loader(images, shares)),
        TrainSchedule(
            batch_sizes=order.batch_sizes,
            epochs=EPOCHS,
            loss_reduction=reduction,
            grad_accum_steps=grad_accum_steps,
            max_grad_norm=None,
            seed=SEED,
            logs_per_epoch=100,
            lr_multiplier=lambda step: 1.0,
        ),
        ResumePoint(),
        accelerator=ctx.accelerator,
        normalize=Normalize(preprocessing, torch.device("cpu")),
        evaluate=lambda model, interrupted: {},
        keeper=NullCheckpointManager(),
        listener=recorder,
        batch_paths=lambda epoch, step: [],
    )
    ctx.accelerator.free_memory()
    return recorder.losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    found = {}
    for reduction in ("sum", "mean"):
        found[reduction] = losses(arguments.folder, ctx, reduction, 1)
        found[f"{reduction}, in two parts"] = losses(arguments.folder, ctx, reduction, 2)
    if ctx.is_main_process:
        arguments.out.write_text(json.dumps(found))
    context.shut_down()
    exit_process(0)


if __name__ == "__main__":
    main()

"""Run the loop on a model of the tests, under torchrun, and write the losses of each step."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from tests.distributed.test_parity import BATCH, DECAY, EPOCHS, HEAD_SCALE, LR, SEED, Plain, listed
from trainer.data.augment import Normalise, Preprocessing, eval_transform
from trainer.data.loader import Images, Order, Shares, make_loader
from trainer.distributed import context
from trainer.loop import Plan, Progress, Start, Unkept, fit
from trainer.main import leave
from trainer.optim.param_groups import group_parameters, make_optimizer


class Recorder:
    """Keeps the mean loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum, self._seen = 0.0, 0

    def step(self, epoch: int, epoch_step: int) -> None: ...

    def point(self, progress: Progress) -> None:
        figures = progress.figures
        if progress.epoch_step == 1:
            self._sum, self._seen = 0.0, 0
        self.losses.append((figures.loss_sum - self._sum) / (figures.seen - self._seen))
        self._sum, self._seen = figures.loss_sum, figures.seen

    def epoch(self, progress: Progress, evaluations: Any) -> None: ...


def losses(folder: Path, machine: context.Runtime, reduction: Any, accumulation: int) -> list[float]:
    torch.manual_seed(SEED)
    model = Plain()
    groups = group_parameters(model, ["last"], lr=LR[reduction], head_lr_scale=HEAD_SCALE, weight_decay=DECAY)
    model, optimizer = machine.accelerator.prepare(model, make_optimizer("sgd", groups, momentum=0))
    preprocessing = Preprocessing(
        image_size=32,
        resize_size=36,
        resize="squash",
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    images = Images(listed(folder), eval_transform(preprocessing), seed=SEED)
    order = Order(examples=len(images), batch_size=BATCH, seed=SEED)
    shares = Shares(order, epochs=EPOCHS, rank=machine.rank, world=machine.world)
    loader = partial(
        make_loader, image_size=32, channels_last=False, workers=0, accelerator=machine.accelerator
    )
    recorder = Recorder()
    fit(
        model,
        optimizer,
        iter(loader(images, shares)),
        Plan(
            batch_sizes=order.batch_sizes,
            epochs=EPOCHS,
            loss_reduction=reduction,
            accumulation=accumulation,
            clip_norm=None,
            seed=SEED,
            points_per_epoch=100,
            lr_factor=lambda step: 1.0,
        ),
        Start(),
        accelerator=machine.accelerator,
        normalise=Normalise(preprocessing, torch.device("cpu")),
        evaluate=lambda model, interrupted: {},
        keeper=Unkept(),
        listener=recorder,
        paths_of=lambda epoch, step: [],
    )
    machine.accelerator.free_memory()
    return recorder.losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine = context.start(device="cpu", precision="fp32", threads=1)
    found = {}
    for reduction in ("sum", "mean"):
        found[reduction] = losses(arguments.folder, machine, reduction, 1)
        found[f"{reduction}, in two parts"] = losses(arguments.folder, machine, reduction, 2)
    if machine.is_main:
        arguments.out.write_text(json.dumps(found))
    context.shut_down()
    leave(0)


if __name__ == "__main__":
    main()

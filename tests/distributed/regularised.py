"""Train under each option of the objective, of mixing and of sampling; each of several processes calls `everything`."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.distributed.test_parity import Plain
from trainer.data.loader import DistributedBatchSampler, EpochOrder
from trainer.distributed import context
from trainer.loop import (
    Evaluations,
    NullCheckpointManager,
    Progress,
    ResumePoint,
    StepDecision,
    TrainSchedule,
    fit,
)
from trainer.metrics import MetricState
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.param_groups import group_parameters, make_optimizer

COUNTS, EPOCHS, SEED = (12, 3, 7), 2, 3
BATCH = 7
"""22 = 3 x 7 + 1: two of three processes have none of the last batch."""
CUT_AT = 3
"""Updates after which a run is left that goes on."""
LABELS = tuple(itertools.chain.from_iterable([label] * count for label, count in enumerate(COUNTS)))


class Case(NamedTuple):
    smoothing: float = 0.0
    weighted: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False


CASES = {
    "plain": Case(),
    "label smoothing and class weights": Case(smoothing=0.2, weighted=True),
    "mixup": Case(mixup=0.4),
    "CutMix": Case(cutmix=1.0),
    "all that go together": Case(smoothing=0.1, mixup=0.3, cutmix=1.0, weighted=True),
    "all with balanced sampling": Case(smoothing=0.1, mixup=0.3, cutmix=1.0, balanced=True),
}


class Metrics:
    """Keeps the last figures of each epoch: they are over all processes."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int, int]] = []

    def step(self, epoch: int, epoch_step: int) -> None: ...

    def point(self, progress: Progress) -> None: ...

    def epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        figures = progress.metrics
        self.found.append((figures.loss_sum, figures.correct, figures.seen))


class Copying(NullCheckpointManager):
    """Copies model and optimizer as they stand after `CUT_AT` updates."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._parts = (model, optimizer)
        self.copy: tuple[list[Any], MetricState] | None = None

    def agree(self, step: int) -> StepDecision:
        return StepDecision(save=step == CUT_AT, stop=None)

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
        assert (epoch, step) == (0, CUT_AT)
        self.copy = ([copy.deepcopy(part.state_dict()) for part in self._parts], sums)


def shares_of(
    order: EpochOrder, start: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pictures that lie in memory; one that comes again is rolled, for another crop."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (len(LABELS), 3, 12, 12), dtype=torch.uint8, generator=generator)
    for draws in DistributedBatchSampler(
        order, epochs=EPOCHS, start_step=start, rank=rank, world_size=world_size
    ):
        share = [images[draw.example].roll(draw.repeat, -1) for draw in draws]
        labels = torch.tensor([LABELS[draw.example] for draw in draws], dtype=torch.int64)
        examples = torch.tensor([draw.example for draw in draws], dtype=torch.int64)
        yield torch.stack(share) if share else images[:0], labels, examples


def trained(ctx: context.DistributedContext, case: Case, grad_accum_steps: int) -> dict[str, Any]:
    """Return parameters and figures of a whole run, and the parameters of one that was cut and went on."""
    order = EpochOrder(
        examples=len(LABELS), batch_size=BATCH, seed=SEED, labels=LABELS if case.balanced else None
    )
    weights = balanced_weights(COUNTS) if case.weighted else None
    mixes = case.mixup or case.cutmix

    def run(start: ResumePoint, state: list[Any] | None) -> tuple[list[float], Metrics, Copying]:
        torch.manual_seed(SEED)
        model = Plain()
        groups = group_parameters(model, ["last"], lr=0.02, head_lr_scale=5, weight_decay=1e-3)
        prepared, optimizer = ctx.accelerator.prepare(model, make_optimizer("sgd", groups, momentum=0.9))
        for part, saved in zip((model, optimizer), state or [], strict=False):
            part.load_state_dict(saved)
        figures, keeper = Metrics(), Copying(model, optimizer)
        fit(
            prepared,
            optimizer,
            shares_of(order, start.step, ctx.rank, ctx.world_size),
            TrainSchedule(
                batch_sizes=order.batch_sizes,
                epochs=EPOCHS,
                loss_reduction="mean",
                grad_accum_steps=grad_accum_steps,
                max_grad_norm=None,
                seed=SEED,
                logs_per_epoch=1,
                lr_multiplier=lambda step: 1.0,
            ),
            start,
            accelerator=ctx.accelerator,
            normalize=lambda images: images.float() / 128 - 1,
            evaluate=lambda model, interrupted: {},
            keeper=keeper,
            listener=figures,
            batch_paths=lambda epoch, step: [],
            criterion=Criterion(label_smoothing=case.smoothing, class_weights=weights),
            mixup=Mixup(
                mixup_alpha=case.mixup,
                cutmix_alpha=case.cutmix,
                seed=SEED,
                rank=ctx.rank,
                world_size=ctx.world_size,
                gather=ctx.accelerator.gather,
            )
            if mixes
            else None,
        )
        return torch.cat([one.detach().flatten() for one in model.parameters()]).tolist(), figures, keeper

    parameters, figures, keeper = run(ResumePoint(), None)
    found = {"parameters": parameters, "figures": figures.found}
    if grad_accum_steps == 1:
        assert keeper.copy is not None
        state, sums = keeper.copy
        resumed, again, _ = run(ResumePoint(epoch=0, step=CUT_AT, sums=sums), state)
        found |= {"resumed": resumed, "resumed figures": again.found}
    return found


def everything(ctx: context.DistributedContext) -> dict[str, Any]:
    """Return what comes of each case, in one part and in two."""
    found = {
        f"{name}, {parts} parts": trained(ctx, case, parts)
        for name, case in CASES.items()
        for parts in (1, 2)
        if ctx.world_size == 1 or name != "plain"  # test_parity.py has that
    }
    ctx.accelerator.free_memory()
    return found

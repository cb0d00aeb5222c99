"""Checks that run in each of several processes: `-m tests.distributed.ranks IMAGES OUT` writes `OUT/rank-N.json`.

One start makes all checks of a number of processes, since the start takes longest. test_ranks.py and test_parity.py
compare the results.
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.contract import read_attempts
from tests.distributed.d2l_recipe import (
    BATCH_SIZE,
    COUNTS,
    EPOCHS,
    HEAD_LR_SCALE,
    LR,
    SEED,
    WEIGHT_DECAY,
    SmallModel,
    train_examples,
)
from tests.launching import rows
from trainer.cli import exit_process
from trainer.commands.compare import compare
from trainer.commands.lr_find import lr_find
from trainer.data.augment import Preprocessing, eval_transform
from trainer.data.dataset import ImageDataset
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.distributed.context import DistributedContext, init_distributed, shut_down
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.evaluate import Interrupted, evaluate
from trainer.loop import NullCheckpoints, fit
from trainer.main import main as train
from trainer.metrics import Meter, MetricState, Progress
from trainer.model.batch_norm import (
    average_batch_norm_statistics,
    freeze_batch_norm,
    gather_batch_norm_statistics,
    restore_batch_norm_statistics,
)
from trainer.model.create import build_model
from trainer.model.source_classes import ClassMapping
from trainer.optim.ema import ModelEma
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.param_groups import create_optimizer, group_parameters
from trainer.optim.schedule import TrainSchedule
from trainer.optim.train_step import LocalBatch, TrainStep
from trainer.seeds import derive_seed
from trainer.state import TrainState
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay
from trainer.transfer.linear_probe import fit_head

PREPROCESSING = Preprocessing(
    image_size=32, resize_size=36, resize="squash", interpolation="bilinear",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
LABELS = tuple(itertools.chain.from_iterable([n] * count for n, count in enumerate(COUNTS.values())))


# Training


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options of a short training of the small model."""

    reduction: str = "mean"
    smoothing: float = 0.0
    weighted: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    balanced: bool = False
    l2_sp: float = 0.0
    ema: float | None = None
    max_grad_norm: float | None = None


CASES = {
    "sum": Case(reduction="sum"),
    "mean": Case(),
    "label smoothing, class weights": Case(smoothing=0.2, weighted=True),
    "mixup": Case(mixup=0.4),
    "CutMix": Case(cutmix=1.0),
    "L2-SP, EMA, clipping": Case(l2_sp=0.3, ema=0.8, max_grad_norm=0.1),
    "all": Case(smoothing=0.1, mixup=0.3, cutmix=1.0, weighted=True, l2_sp=0.3, ema=0.8, max_grad_norm=0.1),
    "all, balanced sampling": Case(smoothing=0.1, mixup=0.3, cutmix=1.0, balanced=True),
}


class Batches:
    """The local batches, from images that are decoded once."""

    def __init__(self, images: Tensor, order: EpochOrder, ctx: DistributedContext) -> None:
        sampler = DistributedBatchSampler(order, epochs=EPOCHS, rank=ctx.rank, world_size=ctx.world_size)
        self._images, self._keys = images, iter(sampler)

    def __next__(self) -> LocalBatch:
        keys = next(self._keys)
        # A repeated example is rolled: it gets other pixels, as another crop would.
        local = [self._images[key.example].roll(key.repeat, -1) for key in keys]
        labels = torch.tensor([LABELS[key.example] for key in keys], dtype=torch.int64)
        examples = torch.tensor([key.example for key in keys], dtype=torch.int64)
        return torch.stack(local) if local else self._images[:0], labels, examples

    def paths(self, epoch: int, step: int) -> Sequence[str]:
        return []


class Recorder:
    """Records the mean loss of each batch, and the metrics of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.epochs: list[tuple[float, int, int]] = []
        self._sums = (0.0, 0)

    def log_progress(self, epoch: int, epoch_step: int) -> None: ...

    def log_step(self, progress: Progress) -> None:
        metrics = progress.metrics
        loss_sum, seen = self._sums if progress.epoch_step > 1 else (0.0, 0)
        self.losses.append((metrics.loss_sum - loss_sum) / (metrics.seen - seen))
        self._sums = metrics.loss_sum, metrics.seen

    def log_epoch(self, progress: Progress, evaluations: Any) -> None:
        metrics = progress.metrics
        self.epochs.append((metrics.loss_sum, metrics.correct, metrics.seen))


def fit_case(case: Case, grad_accum_steps: int, images: Tensor, ctx: DistributedContext) -> dict[str, Any]:
    """Train the small model; return losses, metrics, and the parameters of the model and its average."""
    torch.manual_seed(SEED)
    bare = SmallModel()
    groups = group_parameters(
        bare, ["last"], lr=LR[case.reduction], head_lr_scale=HEAD_LR_SCALE, weight_decay=WEIGHT_DECAY
    )
    backbone = backbone_parameters(bare, ["last"])
    l2_sp = L2SP(backbone, case.l2_sp, decoupled=False)
    if case.l2_sp:
        groups = without_weight_decay(groups, backbone)
    model, optimizer = ctx.prepare(bare, create_optimizer("sgd", groups, momentum=0))
    order = EpochOrder(examples=len(LABELS), batch_size=BATCH_SIZE, seed=SEED, labels=LABELS if case.balanced else None)
    state = TrainState(model=bare, optimizer=optimizer, ema=ModelEma(bare, case.ema))
    recorder = Recorder()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    fit(
        state,
        Batches(images, order, ctx),
        TrainSchedule(batch_sizes=order.batch_sizes, epochs=EPOCHS, logs_per_epoch=100, lr_multiplier=lambda step: 1.0),
        TrainStep(
            ctx=ctx,
            normalize=lambda images: (images.float() / 255 - mean) / std,
            criterion=Criterion(
                label_smoothing=case.smoothing,
                class_weights=balanced_weights(tuple(COUNTS.values())) if case.weighted else None,
            ),
            mixup=Mixup(
                mixup_alpha=case.mixup,
                cutmix_alpha=case.cutmix,
                seed=SEED,
                rank=ctx.rank,
                world_size=ctx.world_size,
                gather=ctx.accelerator.gather,
            ),
            l2_sp=l2_sp,
            loss_reduction=case.reduction,  # type: ignore[arg-type]
            grad_accum_steps=grad_accum_steps,
            max_grad_norm=case.max_grad_norm,
            seed=SEED,
        ),
        start_epoch=lambda epoch: model,
        evaluate=lambda model, interrupted: {},
        checkpoints=NullCheckpoints(),
        logger=recorder,
    )
    ctx.accelerator.free_memory()

    def flat(module: nn.Module) -> list[float]:
        return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()

    return {
        "losses": recorder.losses,
        "epochs": recorder.epochs,
        "parameters": flat(bare),
        "ema": flat(state.ema.model),
    }


def fits(ctx: DistributedContext, images: Path) -> dict[str, Any]:
    """Train each case, with local batches in one and in two micro-batches."""
    dataset = ImageDataset(train_examples(images), eval_transform(PREPROCESSING), seed=SEED)
    sampler = EvalBatchSampler(len(dataset), batch_size=1)
    decoded = torch.stack([torch.from_numpy(dataset[key][0]).permute(2, 0, 1) for (key,) in sampler])
    return {
        f"{name}, {parts} micro-batches": fit_case(case, parts, decoded, ctx)
        for name, case in CASES.items()
        for parts in (1, 2)
    }


# Collectives


def main_process_first(ctx: DistributedContext, out: Path) -> dict[str, Any]:
    """Rank 0 makes a file, the others find it; then each rank fails in turn."""
    path = out / "made"

    def make() -> bool:
        existed = path.exists()
        path.touch()
        return existed

    existed, errors = ctx.main_process_first(make), []
    for failing in range(ctx.world_size):

        def fail(failing: int = failing) -> None:
            if ctx.rank == failing:
                raise UserError(f"rank {failing} has failed")

        try:
            ctx.main_process_first(fail)
        except UserError as error:
            errors.append(str(error))
    return {"existed": existed, "errors": errors}


def collectives(ctx: DistributedContext) -> dict[str, Any]:
    """Reduce flags, broadcast, and sum up metrics with different sums on every rank."""
    rank = ctx.rank
    meter = Meter(ctx.accelerator)
    for step in range(2):
        meter.start_step()
        meter.end_step(step, rank, torch.tensor(0.1 * rank, dtype=torch.float64), torch.tensor(rank))
    state, _ = meter.state()
    diverged = Meter(ctx.accelerator)
    diverged.end_step(5 + rank, 1, torch.tensor(float("nan" if rank else 1.0)), torch.tensor(0))
    of_more = MetricState(rows=((0.5, 1, 2),) * (ctx.world_size + 1), seconds=3.0, compute_seconds=1.0)
    metrics = Meter(ctx.accelerator, of_more).compute()
    return {
        "max": ctx.all_reduce_max([rank, ctx.world_size - 1 - rank, 3]),
        "broadcast": ctx.broadcast({"rank": rank}),
        "rows": state.rows,
        "restored": Meter(ctx.accelerator, state).state()[0].rows,
        "of more processes": [metrics.loss_sum, metrics.correct, metrics.seen],
        "nonfinite": diverged.state()[1],
    }


def batch_norm(ctx: DistributedContext) -> dict[str, Any]:
    """Gather each rank's statistics as a checkpoint does, average them, and restore them; the third layer is frozen."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3), nn.BatchNorm2d(1))
    freeze_batch_norm(model[2])
    generator = torch.Generator().manual_seed(ctx.rank)
    for layer in model:
        layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator))
        layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator))
        layer.num_batches_tracked.fill_(1000 - ctx.rank)

    def statistics() -> list[list[float]]:
        return [torch.cat([layer.running_mean, layer.running_var]).tolist() for layer in model]

    result: dict[str, Any] = {"local": statistics()}
    gathered = gather_batch_norm_statistics(model, ctx.world_size)
    average_batch_norm_statistics(model, ctx.world_size)
    result["averaged"] = statistics()
    restore_batch_norm_statistics(model, gathered, rank=ctx.rank, world_size=ctx.world_size)
    result["restored"] = statistics()
    restore_batch_norm_statistics(model, gathered, rank=0, world_size=ctx.world_size + 1)
    result["on another world size"] = statistics()
    result["gathered"] = sorted(gathered)
    return result


def evaluation(ctx: DistributedContext) -> dict[str, Any]:
    """Evaluate 7 examples, a number that no world size divides; then stop an evaluation at its second batch."""
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator)
    sampler = EvalBatchSampler(7, batch_size=2, rank=ctx.rank, world_size=ctx.world_size)
    local = [torch.tensor([key.example for key in keys]) for keys in sampler]
    model = nn.Sequential(nn.Identity()).train()
    evaluate_local = partial(
        evaluate,
        model,
        [(logits[some], labels[some], some) for some in local],
        classes=3,
        expected=7,
        normalize=lambda images: images,
        reduce=partial(ctx.accelerator.reduce, reduction="sum"),
        device=torch.device("cpu"),
        num_batches=-(-7 // (2 * ctx.world_size)),
    )
    result = evaluate_local(interrupted=lambda: False)
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return ctx.all_reduce_max([asked == 2 and ctx.rank == ctx.world_size - 1])[0] > 0

    was_interrupted = False
    try:
        evaluate_local(num_batches=4, interrupted=interrupted)
    except Interrupted:
        was_interrupted = True
    return {
        "counts": [result.correct, result.support],
        "loss": result.loss,
        "examples": [example for some in local for example in some.tolist()],
        "interrupted": [was_interrupted, asked, model.training],
    }


# Output layers


def heads(ctx: DistributedContext, out: Path) -> dict[str, Any]:
    """Initialize output layers from the source's classes and by a linear probe, with empty local batches too."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 255, (7, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = [0, 1, 2, 0, 1, 2, 0]

    def build(init: Any) -> nn.Module:
        torch.manual_seed(1)
        return build_model(
            "squeezenet1_1",
            image_size=64,
            num_classes=3,
            weights=str(out.parent / "source.safetensors"),
            head_init=init,
            class_mapping=ClassMapping(targets=("x", "bees", "ants"), in_weights_file=("ant", "bee"), aliases={}),
            dropout=0.25,
        ).model

    def digest(tensors: Sequence[Tensor]) -> str:
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def normalize(images: Tensor) -> Tensor:
        return (images.float() - 128) / 64

    def probe(model: nn.Module, batches: Any, count: int, log: Callable[[str], object]) -> None:
        fit_head(
            model, "classifier.1", batches, labels[:count], balanced=count == 7, seed=0, normalize=normalize,
            ctx=ctx, watchdog=nullcontext, log=log,
        )  # fmt: skip

    model = build("source-labels")
    result: dict[str, Any] = {
        "source-labels": digest(list(model.state_dict().values())),
        "norms": model.classifier[1].weight[:, :, 0, 0].norm(dim=1).tolist(),
    }
    torch.manual_seed(derive_seed("masks", 0, 5, ctx.rank))  # as in an update
    kept = model.classifier[0].train()(torch.ones(100, 100)) != 0
    result |= {"kept": kept.float().mean().item(), "mask": digest([kept])}

    model = build("linear-probe")
    for count in (7, 1):  # with one example, all ranks but one have an empty local batch
        sampler = EvalBatchSampler(count, batch_size=2, rank=ctx.rank, world_size=ctx.world_size)
        local = [torch.tensor([key.example for key in keys]) for keys in sampler]
        messages: list[str] = []
        probe(model, [(images[some], torch.tensor(labels)[some], some) for some in local], count, messages.append)
        with torch.no_grad():
            logits = model.eval()(normalize(images[:count]))
        weights = digest(list(model.state_dict().values()))
        result[f"of {count}"] = {"model": weights, "logits": logits.tolist(), "message": messages[1]}
    model.classifier.append(nn.Tanh())
    one = [(images[:1], torch.tensor([0]), torch.tensor([0]))]
    try:  # rank 1 has no image: it hears of the error from rank 0
        probe(model, one if ctx.rank == 0 else [], 1, print)
    except UserError as error:
        result["refused"] = str(error)
    return result


# Whole runs; each joins the process group anew


def parity_options(reduction: str, images: Path, folder: Path) -> Iterator[str]:
    """Yield the options of the D2L recipe on a ResNet-18."""
    options = {
        "run.dir": folder, "run.seed": SEED, "run.threads": 1, "run.device": "cpu", "data.root": images,
        "data.image_size": 32, "data.resize_size": 36, "data.augment": "none", "data.num_workers": 0,
        "data.cache": folder.parent / "cache", "model.name": "resnet18",
        "model.weights": images.parent / "resnet18.safetensors", "transfer.batch_norm": "frozen",
        "optim.lr": LR[reduction], "optim.head_lr_scale": HEAD_LR_SCALE, "optim.weight_decay": WEIGHT_DECAY,
        "optim.momentum": 0, "optim.loss_reduction": reduction, "optim.schedule": "constant", "train.epochs": EPOCHS,
        "train.batch_size": BATCH_SIZE, "train.logs_per_epoch": 100, "train.precision": "fp32",
    }  # fmt: skip
    return (f"--{key}={value}" for key, value in options.items())


def parity(images: Path, out: Path) -> dict[str, list[float]]:
    """Run the whole program by the D2L recipe; return the mean loss of each batch."""
    result = {}
    for reduction in LR:
        folder = out / reduction
        assert train([*parity_options(reduction, images, folder)]) == 0
        losses, earlier = [], (0.0, 0)
        for row in rows(folder, "train"):
            sums = row["train_loss"] * row["train_seen"], row["train_seen"]
            loss_sum, seen = earlier if row["train_seen"] > earlier[1] else (0.0, 0)  # a new epoch
            losses.append((sums[0] - loss_sum) / (sums[1] - seen))
            earlier = sums
        result[reduction] = losses
    return result


def short_run(images: Path, folder: Path, **more: object) -> list[str]:
    """Return the options of a run of one epoch."""
    options = {
        "run.dir": folder, "run.device": "cpu", "run.threads": 1, "data.root": images, "data.image_size": 32,
        "data.num_workers": 0, "data.cache": folder.parent / "cache", "model.name": "shufflenet_v2_x0_5",
        "model.weights": "null", "transfer.batch_norm": "frozen", "optim.momentum": 0, "train.epochs": 1,
        "train.batch_size": BATCH_SIZE,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in (options | more).items()]


def early_stopping(images: Path, out: Path) -> dict[str, Any]:
    """Run without progress until early stopping ends the run, which selects WiSE-FT's alpha; start it again."""
    more = {
        "model.name": "squeezenet1_1", "model.weights": out.parent / "source.safetensors", "train.epochs": 9,
        "transfer.wise_ft": "true", "transfer.l2_sp": 0.1, "optim.lr": 1e-30, "regularization.ema": 0.9,
        "regularization.early_stopping": 1, "data.val_fraction": 0.3,
    }  # fmt: skip
    codes = [train(short_run(images, out / "early", **more)) for _ in range(2)]
    attempts = [(a.state, a.step, a.steps, a.epoch, a.epochs) for a in read_attempts(out / "early")]
    alpha = json.loads((out / "early" / "wise.json").read_text())["alpha"]
    return {"codes": codes, "attempts": attempts, "alpha": alpha, "epochs": len(rows(out / "early", "epoch"))}


STRATEGIES = "d2l@optim.lr=1e-5,from-scratch@optim.lr=1e30@optim.warmup=0 steps,head-only@optim.lr=1e-4"


def commands(images: Path, out: Path) -> dict[str, Any]:
    """Run `lr-find` and `compare`."""
    signals = StopSignals()
    found, too_far = (
        lr_find([*short_run(images, out / name), *words], signals)
        for name, words in {
            "range": ("--from=1e-5", "--to=1e-2", "--steps=10"),
            "far": ("--from=1e-4", "--to=1e4", "--steps=25"),
        }.items()
    )
    words = [*short_run(images, out / "compare"), "--seeds=1", f"--strategies={STRATEGIES}"]
    compared = [compare(words, signals) for _ in range(2)]
    return {
        "losses": list(found.losses),
        "steps": len(too_far.losses),
        "diverged": too_far.diverged,
        "suggested": too_far.suggestion.lr,
        "accuracies": [summaries and [s.accuracy for s in summaries] for summaries in compared],
        "failures": compared[0] and [list(s.failures.values()) for s in compared[0]],
        "epochs": [
            rows(out / "compare" / name / "seed-0", "epoch")[0]
            for name in STRATEGIES.split(",")
            if "from-scratch" not in name
        ],
    }


def main(images: Path, out: Path) -> None:
    ctx = init_distributed(device="cpu", precision="fp32", threads=1)
    results: dict[str, Any] = {
        "fits": fits(ctx, images),
        "main_process_first": main_process_first(ctx, out),
        "collectives": collectives(ctx),
        "batch_norm": batch_norm(ctx),
        "evaluation": evaluation(ctx),
    }
    if ctx.world_size < 3:
        results["heads"] = heads(ctx, out)
    ctx.accelerator.free_memory()
    shut_down()
    results["parity"] = parity(images, out)
    if ctx.world_size < 3:
        results |= {"early_stopping": early_stopping(images, out), "commands": commands(images, out)}
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

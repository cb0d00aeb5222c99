"""Checks that run in each of several processes: `-m tests.distributed.ranks IMAGES OUT` writes `OUT/rank-N.json`.

One start makes all checks of a number of processes, since the start takes longest. test_ranks.py and test_parity.py
compare the results.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.contract import read_attempts
from tests.distributed.d2l_recipe import BATCH_SIZE, EPOCHS, HEAD_LR_SCALE, LR, SEED, WEIGHT_DECAY
from tests.launching import command_line, rows
from trainer.cli import exit_process
from trainer.commands.compare import compare
from trainer.commands.lr_find import lr_find
from trainer.data.sampler import EvalBatchSampler
from trainer.distributed.context import DistributedContext, init_distributed, shut_down
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.evaluate import Interrupted, evaluate
from trainer.evaluation.gather import PredictionGatherer
from trainer.main import main as train
from trainer.metrics import Meter, MetricState
from trainer.model import compile as model_compile
from trainer.model.batch_norm import (
    average_batch_norm_statistics,
    freeze_batch_norm,
    gather_batch_norm_statistics,
    restore_batch_norm_statistics,
)
from trainer.model.create import build_model
from trainer.model.source_classes import ClassMapping
from trainer.transfer.linear_probe import fit_head, held_out_mask


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
        "max of floats": [ctx.max_across_ranks(value) for value in (rank + 0.25, -0.1 - rank)],
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
    result["gathered"] = sorted(gathered)
    return result


def local_batches(ctx: DistributedContext, examples: int) -> list[Tensor]:
    """Return the examples of each batch that this rank evaluates."""
    sampler = EvalBatchSampler(examples, batch_size=2, rank=ctx.rank, world_size=ctx.world_size)
    return [torch.tensor([key.example for key in keys]) for keys in sampler]


def evaluation(ctx: DistributedContext) -> dict[str, Any]:
    """Evaluate 7 examples, a number that no world size divides; then stop an evaluation at its second batch."""
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator)
    local, model = local_batches(ctx, 7), nn.Sequential(nn.Identity()).train()
    evaluate_local = partial(
        evaluate, model, [(logits[some], labels[some], some) for some in local], classes=3, expected=7,
        normalize=lambda images: images, reduce=partial(ctx.accelerator.reduce, reduction="sum"),
        device=torch.device("cpu"), num_batches=-(-7 // (2 * ctx.world_size)),
    )  # fmt: skip
    gatherer = PredictionGatherer(ctx, examples=7, classes=3, batch_size=2)
    result = evaluate_local(interrupted=lambda: False, record=gatherer)
    gathered = gatherer.predictions()
    flags, was_interrupted = iter([False, ctx.rank == ctx.world_size - 1]), False
    try:
        evaluate_local(num_batches=4, interrupted=lambda: ctx.all_reduce_max([next(flags)])[0] > 0)
    except Interrupted:
        was_interrupted = not [*flags]
    return {
        "counts": [result.correct, result.support],
        "loss": result.loss,
        "gathered": None if gathered is None else [torch.equal(gathered.logits, logits), gathered.labels.tolist()],
        "examples": [example for some in local for example in some.tolist()],
        "interrupted": [was_interrupted, model.training],
    }


def heads(ctx: DistributedContext, source: Path) -> dict[str, Any]:
    """Initialize output layers from the source's classes and by a linear probe, with empty local batches too."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 255, (7, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def build(init: Any) -> nn.Module:
        torch.manual_seed(1)
        mapping = ClassMapping(targets=("x", "bees", "ants"), in_weights_file=("ant", "bee"), aliases={})
        return build_model(
            "squeezenet1_1", image_size=64, num_classes=3, weights=str(source),
            head_init=init, class_mapping=mapping,
        ).model  # fmt: skip

    def digest(model: nn.Module) -> str:
        tensors = model.state_dict().values()
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def normalize(images: Tensor) -> Tensor:
        return (images.float() - 128) / 64

    def probe(model: nn.Module, local: list[Tensor], count: int, log: Callable[[str], object]) -> None:
        fit_head(
            model, "classifier.1", [(images[some], labels[some], some) for some in local], labels[:count].tolist(),
            balanced=count == 7, held_out=held_out_mask(labels[:count], 0), normalize=normalize,
            ctx=ctx, watchdog=nullcontext, log=log,
        )  # fmt: skip

    result: dict[str, Any] = {"source-labels": digest(build("source-labels"))}
    model = build("linear-probe")
    for count in (7, 1):  # with one example, all ranks but one have an empty local batch
        messages: list[str] = []
        probe(model, local_batches(ctx, count), count, messages.append)
        with torch.no_grad():
            logits = model.eval()(normalize(images[:count]))
        result[f"of {count}"] = {"model": digest(model), "logits": logits.tolist(), "message": messages[1]}
    model.classifier.append(nn.Tanh())
    try:  # rank 1 has no image: it hears of the error from rank 0
        probe(model, [torch.tensor([0])] if ctx.rank == 0 else [], 1, print)
    except UserError as error:
        result["refused"] = str(error)
    return result


# Whole runs; each joins the process group anew


def run_options(images: Path, folder: Path, **changes: object) -> list[str]:
    """Return the options of a run."""
    defaults = {
        "run.dir": folder, "run.device": "cpu", "run.threads": 1, "data.root": images,
        "data.image_size": 32, "data.num_workers": 0, "data.cache": folder.parent / "cache",
        "model.name": "shufflenet_v2_x0_5", "model.weights": "null", "transfer.batch_norm": "frozen",
        "optim.momentum": 0, "train.epochs": 1, "train.batch_size": BATCH_SIZE,
    }  # fmt: skip
    return command_line(defaults, changes)


def batch_losses(logged: list[dict[str, Any]]) -> list[float]:
    """Return the mean loss of each batch; the logged means are those since the start of the epoch."""
    losses, earlier = [], (0.0, 0)
    for row in logged:
        loss_sum, seen = row["train_loss"] * row["train_seen"], row["train_seen"]
        before = earlier if seen > earlier[1] else (0.0, 0)  # a new epoch
        losses.append((loss_sum - before[0]) / (seen - before[1]))
        earlier = loss_sum, seen
    return losses


def parity(images: Path, out: Path) -> dict[str, list[float]]:
    """Run the whole program by the D2L recipe on a ResNet-18; return the mean loss of each batch."""
    result = {}
    for reduction, lr in LR.items():
        recipe = {
            "run__seed": SEED, "data__resize_size": 36, "data__augment": "none",
            "model__name": "resnet18", "model__weights": images.parent / "resnet18.safetensors",
            "optim__lr": lr, "optim__head_lr_scale": HEAD_LR_SCALE, "optim__weight_decay": WEIGHT_DECAY,
            "optim__loss_reduction": reduction, "optim__schedule": "constant",
            "train__epochs": EPOCHS, "train__logs_per_epoch": 100, "train__precision": "fp32",
        }  # fmt: skip
        assert train(run_options(images, out / reduction, **recipe)) == 0
        result[reduction] = batch_losses(rows(out / reduction, "train"))
    return result


def cached_features(images: Path, out: Path, *, alone: bool) -> list[float]:
    """Run three stages on two fixed views, as several processes with features of frozen layers; return the losses."""
    changes = {
        "model__name": "squeezenet1_1", "model__dropout": 0, "model__weights": images.parent / "source.safetensors",
        "transfer__trainable": "{0: head, 1: 'from:features.12', 2: all}", "data__views": 2,
        "train__epochs": 4, "train__logs_per_epoch": 100, "train__precision": "fp32",
    }  # fmt: skip
    folder, option = out / "features", "off" if alone else "auto"
    assert train(run_options(images, folder, train__cache_features=option, **changes)) == 0
    return [*batch_losses(rows(folder, "train")), *(row["test_loss"] for row in rows(folder, "epoch"))]


def early_stopping(images: Path, out: Path) -> dict[str, Any]:
    """Run without progress until early stopping ends the run, which selects WiSE-FT's alpha; start it again."""
    changes = {
        "model__name": "squeezenet1_1", "model__weights": images.parent / "source.safetensors", "train__epochs": 9,
        "transfer__wise_ft": "true", "transfer__l2_sp": 0.1, "optim__lr": 1e-30, "regularization__ema": 0.9,
        "regularization__early_stopping": 1, "data__val_fraction": 0.3,
    }  # fmt: skip
    codes = [train(run_options(images, out / "early", **changes)) for _ in range(2)]
    attempts = [(a.state, a.step, a.steps, a.epoch, a.epochs) for a in read_attempts(out / "early")]
    alpha = json.loads((out / "early" / "wise.json").read_text())["alpha"]
    epochs, final = rows(out / "early", "epoch"), json.loads((out / "early" / "evaluation.json").read_text())["splits"]
    names = {"correct": "correct", "seen": "examples", "accuracy": "accuracy", "f1_macro": "f1_macro"}
    equal = {
        split: all(epochs[0][f"{split}_{one}"] == report[other] for one, other in names.items())
        for split, report in final.items()
    }
    return {"codes": codes, "attempts": attempts, "alpha": alpha, "epochs": len(epochs), "equal": equal}


def compiled(images: Path, out: Path) -> list[list[float]]:
    """Run without and with train.compile, whose graph is split at DDP's gradient buckets; return the losses."""
    model_compile.BACKEND = "aot_eager"
    losses = []
    for flag in ("false", "true"):
        options = {"train__compile": flag, "train__precision": "fp32", "train__logs_per_epoch": 100}
        folder = out / f"compile-{flag}"
        assert train(run_options(images, folder, model__name="squeezenet1_1", **options)) == 0
        losses.append(batch_losses(rows(folder, "train")))
    return losses


def frozen_dtype(images: Path, out: Path) -> list[list[float]]:
    """Run two stages with frozen weights in float32 and in bfloat16, which DDP broadcasts; return the losses."""
    changes = {
        "model__name": "squeezenet1_1", "model__dropout": 0, "model__weights": images.parent / "source.safetensors",
        "transfer__trainable": "{0: head, 1: 'from:features.12'}", "train__cache_features": "off",
        "train__epochs": 2, "train__logs_per_epoch": 100, "train__precision": "bf16",
    }  # fmt: skip
    losses = []
    for dtype in ("float32", "bfloat16"):
        folder = out / f"frozen-{dtype}"
        assert train(run_options(images, folder, train__frozen_dtype=dtype, **changes)) == 0
        losses.append(batch_losses(rows(folder, "train")))
    return losses


STRATEGIES = "d2l@optim.lr=1e-5,from-scratch@optim.lr=1e30@optim.warmup=0 steps,head-only@optim.lr=1e-4"


def commands(images: Path, out: Path) -> dict[str, Any]:
    """Run `lr-find` and `compare`."""
    signals = StopSignals()
    found, too_far = (
        lr_find([*run_options(images, out / name), *words], signals)
        for name, words in {
            "range": ("--from=1e-5", "--to=1e-2", "--steps=10"),
            "far": ("--from=1e-4", "--to=1e4", "--steps=25"),
        }.items()
    )
    words = [*run_options(images, out / "compare"), "--seeds=1", f"--strategies={STRATEGIES}"]
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
        "main_process_first": main_process_first(ctx, out),
        "collectives": collectives(ctx),
        "batch_norm": batch_norm(ctx),
        "evaluation": evaluation(ctx),
    }
    if ctx.world_size < 3:
        results["heads"] = heads(ctx, images.parent / "source.safetensors")
    ctx.accelerator.free_memory()
    shut_down()
    results["parity"] = parity(images, out)
    results["cached_features"] = cached_features(images, out, alone=ctx.world_size == 1)
    if ctx.world_size < 3:
        results["commands"] = commands(images, out)
    if ctx.world_size == 2:
        results["compiled"] = compiled(images, out)
        results["frozen_dtype"] = frozen_dtype(images, out)
        results["early_stopping"] = early_stopping(images, out)
    (out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))
    exit_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

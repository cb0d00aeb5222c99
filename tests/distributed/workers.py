"""What the tests of several processes run in each of them: `workers.py OUT NAME...`."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from trainer.distributed import context
from trainer.errors import UserError
from trainer.main import exit_process


def main_process_first(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Rank 0 makes, the others find."""
    made = out.with_name("made")

    def make() -> bool:
        found = made.exists()
        made.touch()
        return found

    return {"found": context.main_process_first(ctx.accelerator, make)}


def error_of_one(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """One process fails, each in its turn."""
    said = []
    for failing in range(ctx.world_size):

        def fail(failing: int = failing) -> None:
            if ctx.rank == failing:
                raise UserError(f"rank {failing} has failed")

        try:
            context.main_process_first(ctx.accelerator, fail)
        except UserError as error:
            said.append(str(error))
    return {"said": said}


def statistics(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Average BatchNorm's statistics; a frozen layer's stay."""
    import torch
    from torch import nn

    from trainer.model.batch_norm import average_batch_norm_statistics, freeze_batch_norm

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3), nn.BatchNorm2d(1))
    freeze_batch_norm(model[2])
    for number, layer in enumerate(model):
        layer.running_mean.fill_(10.0 * ctx.rank + number)
        layer.running_var.fill_(1.0 + ctx.rank)
    average_batch_norm_statistics(model, ctx.world_size)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    return {
        "mean": [layer.running_mean.tolist() for layer in model],
        "var": [layer.running_var.tolist() for layer in model],
    }


def evaluation(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Evaluate 7 examples, so that shares are unequal, and with 5 processes one would be alone."""
    from functools import partial

    import torch
    from torch import nn

    from trainer.data.loader import EvalBatchSampler
    from trainer.evaluate import evaluate

    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator)
    slices = EvalBatchSampler(7, batch_size=2, rank=ctx.rank, world_size=ctx.world_size)
    batches = [
        (logits[where], labels[where], torch.tensor(where))
        for where in ([draw.example for draw in draws] for draws in slices)
    ]
    found = evaluate(
        nn.Identity(),
        batches,
        classes=3,
        expected=7,
        normalize=lambda images: images,
        reduce=partial(ctx.accelerator.reduce, reduction="sum"),
        device=torch.device("cpu"),
        num_batches=-(-7 // (2 * ctx.world_size)),
        interrupted=lambda: False,
    )
    return {
        "correct": list(found.correct),
        "support": list(found.support),
        "loss": found.loss,
        "mine": [draw.example for draws in slices for draw in draws],
    }


def kept_statistics(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Gather each process's BatchNorm statistics as a checkpoint does, and put them back after they have changed."""
    import torch
    from torch import nn

    from trainer.model.batch_norm import (
        average_batch_norm_statistics,
        freeze_batch_norm,
        gather_batch_norm_statistics,
        restore_batch_norm_statistics,
    )

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3), nn.BatchNorm2d(1))
    freeze_batch_norm(model[2])
    generator = torch.Generator().manual_seed(ctx.rank)
    for layer in model:
        layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator))
        layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator))
        layer.num_batches_tracked.fill_(1000 - ctx.rank)

    def live() -> list[list[float]]:
        return [buffer.tolist() for layer in model[:2] for buffer in layer.buffers()]

    mine = live()
    frozen = model[2].running_mean.item()
    gathered = gather_batch_norm_statistics(model, ctx.world_size)
    average_batch_norm_statistics(model, ctx.world_size)
    averaged = live()
    model[2].running_mean.fill_(7.0)
    restore_batch_norm_statistics(model, gathered, rank=ctx.rank, world_size=ctx.world_size)
    restored = live()
    assert model[2].running_mean.item() == 7.0 != frozen
    restore_batch_norm_statistics(model, gathered, rank=0, world_size=ctx.world_size + 1)
    return {
        "mine": mine,
        "averaged": averaged,
        "restored": restored,
        "elsewhere": live(),
        "gathered": {name: tensor.tolist() for name, tensor in gathered.items()},
    }


def boundaries(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Agree, add up and evaluate with shares so unequal that one process has none."""
    import torch
    from torch import nn

    from trainer.evaluate import Interrupted, evaluate
    from trainer.metrics import Meter, MetricState

    rank, last = ctx.rank, ctx.world_size - 1
    meter = Meter(ctx.accelerator)
    for step in range(2):
        meter.start_step()
        meter.end_step(step, rank, torch.tensor(0.1 * rank, dtype=torch.float64), torch.tensor(rank))
    sums, first_nonfinite_step = meter.state()
    bad = Meter(ctx.accelerator)
    bad.end_step(5 + rank, 1, torch.tensor(float("nan" if rank else 1.0)), torch.tensor(0))
    fewer = MetricState(rows=((0.5, 1, 2),) * (ctx.world_size + 1), seconds=3.0, compute_seconds=1.0)
    figures = Meter(ctx.accelerator, fewer).compute()

    rounds, model = 0, nn.Sequential(nn.Identity()).train()

    def interrupted() -> bool:
        nonlocal rounds
        rounds += 1
        return ctx.all_reduce_max([rank == last and rounds == 2, 0])[0] > 0

    ended = False
    try:
        evaluate(
            model,
            [(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(1))]
            * (3 if rank == 0 else 0),
            classes=3,
            expected=3,
            normalize=lambda images: images,
            reduce=lambda total: total,
            device=torch.device("cpu"),
            num_batches=3,
            interrupted=interrupted,
        )
    except Interrupted:
        ended = True
    return {
        "agreed": ctx.all_reduce_max([rank, last - rank, 3]),
        "from_main": ctx.broadcast({"rank": rank}),
        "rows": sums.rows,
        "bad_step": first_nonfinite_step,
        "first_bad_step": bad.state()[1],
        "again": Meter(ctx.accelerator, sums).state()[0].rows,
        "of_more": (figures.loss_sum, figures.correct, figures.seen, figures.seconds > 3.0),
        "ended": ended,
        "rounds": rounds,
        "training": model.training,
    }


def regularised(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Train under each option of the objective, of mixing and of sampling."""
    from tests.distributed.regularised import everything

    return everything(ctx)


def heads(ctx: context.DistributedContext, out: Path) -> dict[str, Any]:
    """Start output layers from the source's rows and from a linear probe, with an empty share too; drop features."""
    import hashlib

    import torch
    from torch import Tensor, nn

    from trainer.data.loader import EvalBatchSampler
    from trainer.model.create import build_model
    from trainer.model.source_classes import ClassMapping
    from trainer.seeds import derive_seed
    from trainer.transfer.linear_probe import fit_head

    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 255, (7, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = [0, 1, 2, 0, 1, 2, 0]

    def start(init: Any) -> nn.Module:
        torch.manual_seed(1)
        return build_model(
            "squeezenet1_1",
            image_size=64,
            num_classes=3,
            weights=str(out.with_name("source.safetensors")),
            head_init=init,
            labels=ClassMapping(targets=("x", "bees", "ants"), described=("ant", "bee"), aliases={}),
            dropout=0.25,
        ).model

    def digest(model: nn.Module) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()

    model = start("source-labels")
    found: dict[str, Any] = {
        "copied": digest(model),
        "norms": model.classifier[1].weight[:, :, 0, 0].norm(dim=1).tolist(),
    }
    # The masks as the loop draws them.
    torch.manual_seed(derive_seed("masks", 0, 5, ctx.rank))
    kept = model.classifier[0].train()(torch.ones(100, 100)) != 0
    found |= {"kept": kept.float().mean().item(), "mask": hashlib.sha256(kept.numpy().tobytes()).hexdigest()}

    def normalize(images: Tensor) -> Tensor:
        return (images.float() - 128) / 64

    model = start("linear-probe")
    for count in (7, 1):  # with one example all but one process have none
        slices = EvalBatchSampler(count, batch_size=2, rank=ctx.rank, world_size=ctx.world_size)
        shares = [torch.tensor([draw.example for draw in draws]) for draws in slices]
        said: list[str] = []
        fit_head(
            model,
            "classifier.1",
            [(images[share], torch.tensor(labels)[share], share) for share in shares],
            labels[:count],
            classes=3,
            balanced=count == 7,
            seed=0,
            normalize=normalize,
            ctx=ctx,
            watch=nullcontext,
            log=said.append,
        )
        with torch.no_grad():
            logits = model.eval()(normalize(images[:count]))
        found[f"of {count}"] = {"model": digest(model), "logits": logits.tolist(), "said": said[1]}
    model.classifier.append(nn.Tanh())
    try:  # the share of rank 1 is empty: it hears of it from the other
        fit_head(
            model,
            "classifier.1",
            [(images[:1], torch.tensor([0]), torch.tensor([0]))] if ctx.rank == 0 else [],
            labels[:1],
            classes=3,
            balanced=False,
            seed=0,
            normalize=normalize,
            ctx=ctx,
            watch=nullcontext,
            log=said.append,
        )
    except UserError as error:
        found["refused"] = str(error)
    return found


WORKERS: dict[str, Callable[[context.DistributedContext, Path], dict[str, Any]]] = {
    worker.__name__: worker
    for worker in (
        main_process_first,
        error_of_one,
        statistics,
        evaluation,
        kept_statistics,
        boundaries,
        regularised,
        heads,
    )
}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    for name in names:
        found = WORKERS[name](ctx, out)
        out.with_name(f"{name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    context.shut_down()
    exit_process(0)


if __name__ == "__main__":
    main()

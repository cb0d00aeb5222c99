"""The output layer by logistic regression, before training: one pass over the training images, then a convex problem.

LP-FT: Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.model.head import trial_forward
from trainer.optim.loss import balanced_weights
from trainer.seeds import derive_seed
from trainer.transfer.logistic_regression import PENALTIES, CVResult, fit, fit_cv

HELD_OUT = 0.2
"""Share of each class's examples on which the penalty is chosen."""
_UNCHOSEN = 1e-1
"""Penalty where no class has two examples, so that none can be held out."""
_ROUNDING = 2e-3
"""Greatest deviation of the model's logits from the layer's on its features, as a share of the sum of their terms'
sizes: ten times what GPUs lose that multiply in TF32."""

_COMPARED = 2
"""Images on which that is looked at, twice: of a whole batch it would cost as much as the pass."""


def require_linear(model: nn.Module, head: str, image_size: int) -> None:
    """Raise a UserError unless the output layer acts on one row of features a picture; tried without memory.

    Such are a Linear on [B, D], and a convolution of 1 x 1 whose outputs the model averages over the picture:
    all of torchvision's classification models.
    """
    layer = model.get_submodule(head)
    with _inputs_of(layer) as seen:
        trial_forward(model, image_size)
    shape = list(seen[-1].shape)
    is_point = isinstance(layer, nn.Conv2d) and (
        set(layer.kernel_size) == set(layer.stride) == {1} and set(layer.padding) == {0}
    )
    if len(seen) != 1 or not (is_point or (isinstance(layer, nn.Linear) and len(shape) == 2)):
        raise UserError(
            f"model.head_init is linear-probe, but {head} is a {type(layer).__name__} on inputs {shape}: expected a "
            "Linear layer on one row of features a picture, or a 1 x 1 convolution that is averaged. Choose xavier or "
            "source-labels"
        )


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what reaches a layer within a block."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _features_and_logits(model: nn.Module, layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (features [B, D]: what the layer sees, averaged over places; logits [B, K]), in float32."""
    with _inputs_of(layer) as seen:
        logits = model(inputs)
    return seen[0].float().flatten(2).mean(2) if seen[0].ndim > 2 else seen[0].float(), logits.float()


def _require_equal(model: nn.Module, head: str, inputs: Tensor) -> None:
    """Raise a UserError unless the model's logits are the output layer's on its features."""
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    features, logits = _features_and_logits(model, layer, inputs)
    weight = layer.weight.flatten(1).float()
    bias = weight.new_zeros(()) if layer.bias is None else layer.bias.float()
    terms = features.abs() @ weight.abs().T + bias.abs()
    off = (logits - (features @ weight.T + bias)).abs()
    if not bool((off <= _ROUNDING * terms).all()):
        raise UserError(
            f"model.head_init is linear-probe, but the model's logits are not {head} on the mean of what reaches it "
            f"(off by {off.max():.3g}): something follows that layer. Choose xavier or source-labels"
        )


def held_out_mask(labels: Tensor, seed: int) -> Tensor:
    """Return which examples are held out, bool [examples]: a fifth of each class, at least 1 of 2; none of 1."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(derive_seed("probe", seed))
    for label in labels.unique().tolist():
        where = (labels == label).nonzero().flatten()
        count = max(1, int(HELD_OUT * len(where))) if len(where) > 1 else 0
        chosen[where[torch.randperm(len(where), generator=generator)[:count]]] = True
    return chosen


def fit_head(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    labels: Sequence[int],
    *,
    balanced: bool,
    seed: int,
    normalize: Callable[[Tensor], Tensor],
    ctx: DistributedContext,
    watchdog: Callable[[Heartbeat], AbstractContextManager[Heartbeat]],
    log: Callable[[str], object],
) -> float:
    """Solve for the output layer, put it into the model, the same bit for bit on every process; returns the seconds.

    All processes call it; rank 0 solves. Each holds all features meanwhile, 4 bytes x examples x features.

    Args:
        model: bare, on its device; left in its mode.
        head: name of the output layer.
        batches: this process's share (images uint8 [B, 3, H, W], labels, examples) of one pass over the training
            images as they are evaluated.
        labels: of all training examples.
        balanced: weigh each class alike, whatever the number of its examples.
        seed: of the choice of the examples that are held out.
        normalise: uint8 images -> the model's input.
        machine: the processes.
        watchdog: returns what watches over the pass.
        say: hears what was done.

    Raises:
        UserError: the model's logits are not linear in the features, or these are not finite.

    """
    log(f"linear probe: one pass over the {len(labels)} training images")
    began = time.perf_counter()
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), watchdog(Heartbeat()) as heartbeat:
            features, first = _collect(
                model, head, batches, examples=len(labels), normalize=normalize, ctx=ctx, heartbeat=heartbeat
            )
        passed = time.perf_counter()
        choice = ctx.main_process_first(
            lambda: (
                _solve(
                    features.to(ctx.accelerator.device),
                    torch.tensor(labels),
                    layer.weight.shape[0],
                    balanced=balanced,
                    seed=seed,
                    intercept=layer.bias is not None,
                )
                if ctx.is_main_process
                else None
            ),
        )
        choice = ctx.broadcast(choice)
        assert choice is not None  # for mypy: rank 0 has it
        with torch.no_grad():
            layer.weight.copy_(choice.solution.weight.view_as(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(choice.solution.bias)
        solved = time.perf_counter()
        with torch.inference_mode():
            _agree_on_equality(model, head, first, normalize, ctx)
    finally:
        model.train(was_training)
    count = int(held_out_mask(torch.tensor(labels), seed).sum())
    size = " x ".join(map(str, features.shape))
    log(
        f"linear probe: features {size} in {passed - began:.1f} s, output layer in {solved - passed:.1f} s; "
        f"{_report(choice, count)}"
    )
    return time.perf_counter() - began


def _collect(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    examples: int,
    normalize: Callable[[Tensor], Tensor],
    ctx: DistributedContext,
    heartbeat: Heartbeat,
) -> tuple[Tensor, Tensor | None]:
    """Return (features float32 [examples, D] on the CPU, in their order; some of this process's images, if it has any).

    Each row comes from one process: adding the others' zeros to it is exact.
    """
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    mine = iter(batches)
    head_of = next(mine, None)
    # Ahead of the pass, and again after it: whether the model is linear there does not depend on the weights.
    first = None if head_of is None else head_of[0][:_COMPARED]
    _agree_on_equality(model, head, first, normalize, ctx)
    features = torch.zeros(examples, layer.weight.shape[1])
    seen = torch.zeros(examples, dtype=torch.int64)
    for images, _, places in chain(() if head_of is None else (head_of,), mine):
        with ctx.accelerator.autocast():
            found, _ = _features_and_logits(model, layer, normalize(images))
        features[places.cpu()] = found.cpu()
        seen[places.cpu()] += 1
        heartbeat.tick(0)
    if ctx.world_size > 1:
        for tensor in (features, seen):
            torch.distributed.all_reduce(tensor, group=ctx.control)
    if not bool((seen == 1).all()):
        raise RuntimeError(f"the features of {int((seen == 1).sum())} of {examples} examples were found once")
    return features, first


def _agree_on_equality(
    model: nn.Module,
    head: str,
    images: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    ctx: DistributedContext,
) -> None:
    error = None
    if images is not None:
        try:
            _require_equal(model, head, normalize(images))
        except UserError as caught:
            error = caught
    ctx.raise_on_all_ranks(error)


def _solve(
    features: Tensor, labels: Tensor, classes: int, *, balanced: bool, seed: int, intercept: bool
) -> CVResult:
    """Return the solution, on the CPU; the penalty is chosen on a part of the examples that is held out."""
    unusable = ~features.isfinite().all(1)
    if bool(unusable.any()):
        raise UserError(
            f"model.head_init is linear-probe, but the source model's features of {int(unusable.sum())} training "
            "images are not finite: see model.weights, data.mean and data.std, or try train.precision fp32"
        )
    apart = held_out_mask(labels, seed).to(features.device)
    weights = None
    if balanced:
        weights = balanced_weights(labels.bincount(minlength=classes).tolist())[labels].to(features)
    there = labels.to(features.device)
    if bool(apart.any()):
        found = fit_cv(features, there, classes, apart, weights=weights, intercept=intercept)
    else:
        path = [penalty for penalty in PENALTIES if penalty >= _UNCHOSEN]
        solution = fit(features, there, classes, path, weights=weights, intercept=intercept)[-1]
        found = CVResult(solution, {}, 0)
    solution = found.solution
    return found._replace(solution=replace(solution, weight=solution.weight.cpu(), bias=solution.bias.cpu()))


def _report(choice: CVResult, count: int) -> str:
    """Return what was found, for a person; `count` examples were held out."""
    solution = choice.solution
    how = (
        f"penalty {solution.penalty:g}, chosen on {count} images held out, {choice.correct} right "
        f"({choice.correct / count:.3f})"
        if count
        else f"penalty {solution.penalty:g}, not chosen: no class has a second image to hold out"
    )
    if solution.converged:
        return f"{how}; solved in {solution.iterations} steps of L-BFGS"
    return f"{how}; NOT SOLVED to the end in {solution.iterations} steps of L-BFGS (slope {solution.max_grad:.1e})"

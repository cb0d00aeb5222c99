"""Linear probe: fit the output layer by logistic regression on the features of the pretrained model, before training.

One pass over the training images, then a convex problem. Fine-tuning starts from the solution (LP-FT): Kumar et al.
2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.data.split import grouped_split
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.model.head import trial_forward
from trainer.optim.loss import balanced_weights
from trainer.seeds import derive_seed
from trainer.transfer.logistic_regression import PENALTIES, CVResult, fit, fit_cv

HELD_OUT = 0.2
"""Share of each class's examples that the penalty is selected on."""
_DEFAULT_PENALTY = 1e-1
"""Penalty if no class has two examples, so that none can be held out."""
_ROUNDING = 2e-3
"""Greatest difference between the model's logits and the layer's on its features, as a share of the sum of absolute
terms: ten times the error of a GPU that multiplies in TF32."""
_CHECKED_IMAGES = 2
"""Number of images on which that difference is checked."""


def require_linear(model: nn.Module, head: str, image_size: int) -> None:
    """Raise a UserError unless the output layer maps one row of features per image; checked by a trial forward.

    That is a Linear on [B, D], or a 1 x 1 convolution whose outputs the model averages over the image. All of
    torchvision's classification models have one of the two.
    """
    layer = model.get_submodule(head)
    with _record_inputs(layer) as inputs:
        trial_forward(model, image_size)
    shape = list(inputs[-1].shape)
    is_pointwise = isinstance(layer, nn.Conv2d) and (
        set(layer.kernel_size) == set(layer.stride) == {1} and set(layer.padding) == {0}
    )
    if len(inputs) != 1 or not (is_pointwise or (isinstance(layer, nn.Linear) and len(shape) == 2)):
        raise UserError(
            f"model.head_init is linear-probe, but {head} is a {type(layer).__name__} on inputs {shape}: expected a "
            "Linear layer on one row of features per image, or a 1 x 1 convolution that is averaged. Choose xavier or "
            "source-labels"
        )


@contextmanager
def _record_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer within a block."""
    inputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    handle = layer.register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()


def _features_and_logits(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return (features [B, D]: the layer's input, averaged over positions; logits [B, K]), in float32."""
    with _record_inputs(layer) as inputs:
        logits = model(images)
    features = inputs[0].float()
    return features.flatten(2).mean(2) if features.ndim > 2 else features, logits.float()


def _check_logits(model: nn.Module, head: str, images: Tensor) -> None:
    """Raise a UserError unless the model's logits are those of the output layer on its features."""
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    features, logits = _features_and_logits(model, layer, images)
    weight = layer.weight.flatten(1).float()
    bias = weight.new_zeros(()) if layer.bias is None else layer.bias.float()
    terms = features.abs() @ weight.abs().T + bias.abs()
    difference = (logits - (features @ weight.T + bias)).abs()
    if not bool((difference <= _ROUNDING * terms).all()):
        raise UserError(
            f"model.head_init is linear-probe, but the model's logits are not those of {head} on its mean input (they "
            f"differ by {difference.max():.3g}): something follows that layer. Choose xavier or source-labels"
        )


def held_out_mask(labels: Tensor, seed: int, groups: Sequence[str | None] = ()) -> Tensor:
    """Return which examples are held out, bool [examples]: a fifth of each class, at least 1 of 2, and none of 1.

    Args:
        labels: int64 [examples].
        seed: selects the examples.
        groups: group of each example, or None; if there are any, whole groups are held out.

    """
    if any(groups):
        images: dict[str, list[str]] = {}
        for example, label in enumerate(labels.tolist()):
            images.setdefault(str(label), []).append(str(example))
        of = {str(example): group for example, group in enumerate(groups) if group}
        _, held_out = grouped_split(images, of, HELD_OUT, seed=seed, purpose="val")
        selected = [int(example) for examples in held_out.values() for example in examples]
        return torch.zeros(len(labels), dtype=torch.bool).index_fill(0, torch.tensor(selected, dtype=torch.int64), True)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(derive_seed("probe", seed))
    for label in labels.unique().tolist():
        examples = (labels == label).nonzero().flatten()
        count = max(1, int(HELD_OUT * len(examples))) if len(examples) > 1 else 0
        mask[examples[torch.randperm(len(examples), generator=generator)[:count]]] = True
    return mask


def fit_head(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    labels: Sequence[int],
    *,
    balanced: bool,
    held_out: Tensor,
    normalize: Callable[[Tensor], Tensor],
    ctx: DistributedContext,
    watchdog: Callable[[Heartbeat], AbstractContextManager[Heartbeat]],
    log: Callable[[str], object],
) -> float:
    """Fit the output layer, with bit-identical weights on every process. Return the seconds that it took.

    Every process must call it; rank 0 solves. Each process holds all features for that time: 4 bytes x examples x
    features.

    Args:
        model: unwrapped, on its device; keeps its mode.
        head: name of the output layer.
        batches: this process's part (images uint8 [B, 3, H, W], labels, examples) of one pass over the training images,
            preprocessed as in evaluation.
        labels: of all training examples.
        balanced: give all classes the same weight, whatever the number of their examples.
        held_out: which examples the penalty is selected on, bool [examples]; see `held_out_mask`.
        normalize: uint8 images -> the model's input.
        ctx: the processes.
        watchdog: returns a context that watches over the pass.
        log: called with lines for the console.

    Raises:
        UserError: the model's logits are not linear in the features, or the features are not finite.

    """
    log(f"linear probe: one pass over the {len(labels)} training images")
    start = time.perf_counter()
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), watchdog(Heartbeat()) as heartbeat:
            features = _extract_features(
                model, head, batches, examples=len(labels), normalize=normalize, ctx=ctx, heartbeat=heartbeat
            )
    finally:
        model.train(was_training)
    pass_end = time.perf_counter()
    result = ctx.main_process_first(
        lambda: (
            _solve(
                features.to(ctx.device),
                torch.tensor(labels),
                layer.weight.shape[0],
                balanced=balanced,
                held_out=held_out,
                intercept=layer.bias is not None,
            )
            if ctx.is_main_process
            else None
        )
    )
    result = ctx.broadcast(result)
    assert result is not None  # for mypy: rank 0 has it
    with torch.no_grad():
        layer.weight.copy_(result.solution.weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(result.solution.bias)
    end = time.perf_counter()
    size = " x ".join(map(str, features.shape))
    log(
        f"linear probe: features {size} in {pass_end - start:.1f} s, output layer in {end - pass_end:.1f} s; "
        f"{_report(result, int(held_out.sum()))}"
    )
    return end - start


def _extract_features(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    examples: int,
    normalize: Callable[[Tensor], Tensor],
    ctx: DistributedContext,
    heartbeat: Heartbeat,
) -> Tensor:
    """Return the features of all examples, float32 [examples, D], on the CPU of every process.

    Each row comes from one process, so the sum with the zeros of the others is exact.
    """
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(head))
    iterator = iter(batches)
    first = next(iterator, None)  # None: this process has no images
    error = None
    if first is not None:
        try:
            _check_logits(model, head, normalize(first[0][:_CHECKED_IMAGES]))
        except UserError as caught:
            error = caught
    ctx.raise_on_all_ranks(error)
    features = torch.zeros(examples, layer.weight.shape[1])
    counts = torch.zeros(examples, dtype=torch.int64)
    for images, _, indices in chain(() if first is None else (first,), iterator):
        with ctx.accelerator.autocast():
            batch_features, _ = _features_and_logits(model, layer, normalize(images))
        features[indices.cpu()] = batch_features.cpu()
        counts[indices.cpu()] += 1
        heartbeat.tick(0)
    if ctx.world_size > 1:
        for tensor in (features, counts):
            torch.distributed.all_reduce(tensor, group=ctx.control)
    if not bool((counts == 1).all()):
        raise RuntimeError(f"features of {int((counts == 1).sum())} of {examples} examples were computed exactly once")
    return features


def _solve(
    features: Tensor, labels: Tensor, classes: int, *, balanced: bool, held_out: Tensor, intercept: bool
) -> CVResult:
    """Return the solution, on the CPU, with the penalty that is best on the held-out examples."""
    not_finite = ~features.isfinite().all(1)
    if bool(not_finite.any()):
        raise UserError(
            f"model.head_init is linear-probe, but the source model's features of {int(not_finite.sum())} training "
            "images are not finite: check model.weights, data.mean and data.std, or set train.precision to fp32"
        )
    held_out = held_out.to(features.device)
    weights = None
    if balanced:
        weights = balanced_weights(labels.bincount(minlength=classes).tolist())[labels].to(features)
    labels = labels.to(features.device)
    if bool(held_out.any()):
        result = fit_cv(features, labels, classes, held_out, weights=weights, intercept=intercept)
    else:
        path = [penalty for penalty in PENALTIES if penalty >= _DEFAULT_PENALTY]
        solution = fit(features, labels, classes, path, weights=weights, intercept=intercept)[-1]
        result = CVResult(solution, {}, 0)
    solution = result.solution
    return result._replace(solution=replace(solution, weight=solution.weight.cpu(), bias=solution.bias.cpu()))


def _report(result: CVResult, held_out: int) -> str:
    """Return the result in words; `held_out` is the number of held-out examples."""
    solution = result.solution
    selection = (
        f"penalty {solution.penalty:g}, selected on {held_out} held-out images, {result.correct} correct "
        f"({result.correct / held_out:.3f})"
        if held_out
        else f"penalty {solution.penalty:g} by default: no class has a second image to hold out"
    )
    if solution.converged:
        return f"{selection}; converged in {solution.iterations} steps of L-BFGS"
    return f"{selection}; NOT CONVERGED in {solution.iterations} steps of L-BFGS (gradient {solution.max_grad:.1e})"

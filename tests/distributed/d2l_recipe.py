"""A plain implementation of the D2L recipe: the reference for the trainer's losses.

It uses torchvision's transforms, cross-entropy, autograd and SGD written out. Only the order of the examples and the
initial model come from the trainer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from trainer.data.sampler import EpochOrder

# 22 = 3 x 7 + 1: the last batch has one example, so two of three processes get an empty local batch.
BATCH_SIZE, EPOCHS, SEED = 7, 2, 3
LR, HEAD_LR_SCALE, WEIGHT_DECAY = {"sum": 2e-4, "mean": 2e-3}, 10.0, 1e-3
COUNTS = {"a": 9, "b": 7, "c": 6}
"""Class -> number of training images."""


def train_examples(folder: Path) -> list[tuple[str, int]]:
    """Return (path, label) of the training images in an image folder."""
    return [
        (str(path), label) for label, name in enumerate(COUNTS) for path in sorted((folder / "train" / name).iterdir())
    ]


def recipe_losses(
    model: nn.Module, head: Sequence[nn.Parameter], examples: Sequence[tuple[str, int]], reduction: str
) -> Iterator[float]:
    """Train as the recipe does, and yield each batch's mean loss before its update."""
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize([36, 36]), transforms.CenterCrop(32), transforms.ToTensor(), normalize]
    preprocess = transforms.Compose(steps)
    images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    order = EpochOrder(examples=len(examples), batch_size=BATCH_SIZE, seed=SEED)
    in_head = {id(p) for p in head}
    for epoch in range(EPOCHS):
        for batch in order.permutation(epoch).split(BATCH_SIZE):
            losses = nn.functional.cross_entropy(model(images[batch]), labels[batch], reduction="none")
            yield losses.mean().item()
            (losses.sum() if reduction == "sum" else losses.mean()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    lr = LR[reduction] * (HEAD_LR_SCALE if id(parameter) in in_head else 1)
                    parameter.sub_(lr * (parameter.grad + WEIGHT_DECAY * parameter))
                    parameter.grad = None

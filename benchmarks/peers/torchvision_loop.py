"""A loop in the style of torchvision's reference scripts, written from their documentation.

Transforms on uint8 tensors, `torch.amp` autocast, and loss and accuracy of every batch read and averaged, as their
logger does. Their documentation recommends `--amp`: `--precision bf16`.
"""

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.peers.common import (
    MEAN,
    STD,
    Recorder,
    Settings,
    accuracy,
    loaders,
    read_settings,
    recipe_optimizer,
    torchvision_model,
)


def folders(settings: Settings) -> tuple[ImageFolder, ImageFolder]:
    """Return the images of (train, val)."""
    to_input = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    evaluated = v2.Compose([v2.Resize([256, 256]), v2.CenterCrop(224), *to_input])
    augmented = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), *to_input])
    train = ImageFolder(str(settings.data_root / "train"), evaluated if settings.fixed_views else augmented)
    return train, ImageFolder(str(settings.data_root / "val"), evaluated)


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    train, val = folders(settings)
    model, backbone, head = torchvision_model(settings, len(train.classes))
    train_batches, val_batches = loaders(settings, train, val)
    optimizer = recipe_optimizer(settings, backbone, head)
    loss_of = settings.criterion
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        model.train()
        losses = correct = 0.0
        recorder.start_epoch()
        for batch, targets in train_batches:
            images = batch.to(settings.device, memory_format=settings.memory_format)
            labels = targets.to(settings.device)
            with settings.autocast:
                logits = model(images)
                loss = loss_of(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.item()
            correct += (logits.argmax(dim=1) == labels).sum().item()
        recorder.end_training(len(train))
        model.eval()
        with settings.autocast:
            recorder.end_epoch(accuracy(model, val_batches, settings))


if __name__ == "__main__":
    main()

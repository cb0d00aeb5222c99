"""The D2L recipe as a plain loop, written from the lecture's description: SGD, 10 x the learning rate for a new head.

In fp32 and in PyTorch's default memory layout, as the lecture trains; `--precision bf16` adds autocast and
channels_last.
"""

from torch import nn

from benchmarks.peers.common import (
    Recorder,
    accuracy,
    image_folders,
    loaders,
    read_settings,
    recipe_optimizer,
    torchvision_model,
)


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    train, val = image_folders(settings)
    model, backbone, head = torchvision_model(settings, len(train.classes))
    for parameter in head:
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    train_batches, val_batches = loaders(settings, train, val)
    optimizer = recipe_optimizer(settings, backbone, head)
    loss_of = settings.criterion
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        model.train()
        recorder.start_epoch()
        for batch, labels in train_batches:
            images = batch.to(settings.device, memory_format=settings.memory_format)
            with settings.autocast:
                loss = loss_of(model(images), labels.to(settings.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        recorder.end_training(len(train))
        model.eval()
        with settings.autocast:
            recorder.end_epoch(accuracy(model, val_batches, settings))


if __name__ == "__main__":
    main()

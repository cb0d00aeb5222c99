"""accelerate's computer-vision example: everything prepared by `Accelerator`, its own sharding of the loaders.

Its documentation recommends `mixed_precision="bf16"`: `--precision bf16`.
"""

from accelerate import Accelerator

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
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no", cpu=settings.device.type == "cpu"
    )
    train, val = image_folders(settings)
    model, backbone, head = torchvision_model(settings, len(train.classes))
    optimizer = recipe_optimizer(settings, backbone, head)
    model, optimizer, train_batches, val_batches = accelerator.prepare(model, optimizer, *loaders(settings, train, val))
    loss_of = settings.criterion
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        model.train()
        recorder.start_epoch()
        for images, labels in train_batches:
            loss = loss_of(model(images.to(memory_format=settings.memory_format)), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        recorder.end_training(len(train))
        model.eval()
        recorder.end_epoch(accuracy(model, val_batches, settings))


if __name__ == "__main__":
    main()

"""Lightning: a `LightningModule` trained by its `Trainer`, without logger and checkpoints.

Its documentation recommends `precision="bf16-mixed"`: `--precision bf16`.
"""

import lightning
import torch
from torch import Tensor, nn

from benchmarks.peers.common import (
    Recorder,
    Settings,
    image_folders,
    loaders,
    read_settings,
    recipe_optimizer,
    torchvision_model,
)


class Classifier(lightning.LightningModule):
    """A torchvision model with its loss and optimizer."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, recorder: Recorder, examples: int
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.recorder, self.examples = model, optimizer, recorder, examples
        self.loss_of, self.memory_format = settings.criterion, settings.memory_format
        self.correct = self.seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        loss: Tensor = self.loss_of(self.model(images.to(memory_format=self.memory_format)), labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Count correct predictions."""
        images, labels = batch
        self.correct += int((self.model(images).argmax(dim=1) == labels).sum())
        self.seen += len(labels)

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.recorder.start_epoch()

    def on_validation_epoch_start(self) -> None:
        """Stop the clock: Lightning validates within the epoch of training, after its last update."""
        self.recorder.end_training(self.examples)
        self.correct = self.seen = 0

    def on_validation_epoch_end(self) -> None:
        """Record the accuracy."""
        self.recorder.end_epoch(self.correct / self.seen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return self.optimizer


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    train, val = image_folders(settings)
    model, backbone, head = torchvision_model(settings, len(train.classes))
    optimizer = recipe_optimizer(settings, backbone, head)
    trainer = lightning.Trainer(
        max_epochs=settings.epochs,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    classifier = Classifier(model, optimizer, settings, Recorder(settings), len(train))
    trainer.fit(classifier, *loaders(settings, train, val))


if __name__ == "__main__":
    main()

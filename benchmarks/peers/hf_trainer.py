"""Hugging Face's `Trainer` on a torchvision model, without logging and checkpoints.

Its documentation recommends `bf16=True`: `--precision bf16`.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.common import (
    Recorder,
    Settings,
    accuracy,
    image_folders,
    loaders,
    read_settings,
    recipe_optimizer,
    torchvision_model,
)


class WithLoss(nn.Module):
    """Returns loss and logits, as `Trainer` expects."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.model, self.loss_of, self.memory_format = model, settings.criterion, settings.memory_format

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss and the logits."""
        logits = self.model(images.to(memory_format=self.memory_format))
        return {"loss": self.loss_of(logits, labels), "logits": logits}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Records the training time of each epoch."""

    def __init__(self, recorder: Recorder, examples: int, evaluate: Any) -> None:
        self.recorder, self.examples, self.evaluate = recorder, examples, evaluate

    def on_epoch_begin(self, *arguments: Any, **state: Any) -> None:
        """Start the clock."""
        self.recorder.start_epoch()

    def on_epoch_end(self, *arguments: Any, **state: Any) -> None:
        """Stop the clock and evaluate."""
        self.recorder.end_training(self.examples)
        self.recorder.end_epoch(self.evaluate())


def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Return a batch by the names of `WithLoss.forward`."""
    return {"images": torch.stack([image for image, _ in items]), "labels": torch.tensor([label for _, label in items])}


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    train, val = image_folders(settings)
    model, backbone, head = torchvision_model(settings, len(train.classes))
    optimizer = recipe_optimizer(settings, backbone, head)
    _, val_batches = loaders(settings, train, val)

    def evaluate() -> float:
        model.eval()
        with settings.autocast:
            result = accuracy(model, val_batches, settings)
        model.train()
        return result

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            bf16=settings.precision == "bf16",
            use_cpu=settings.device.type == "cpu",
            dataloader_num_workers=settings.workers,
            dataloader_persistent_workers=settings.workers > 0,
            seed=settings.seed,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            max_grad_norm=0,
        )
        examples: ImageFolder = train
        Trainer(
            model=WithLoss(model, settings),
            args=arguments,
            train_dataset=examples,
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[Clock(Recorder(settings), len(train), evaluate)],
        ).train()


if __name__ == "__main__":
    main()

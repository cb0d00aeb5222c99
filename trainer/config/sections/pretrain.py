"""Section `pretrain`: pretraining of a model of your own before fine-tuning."""

from dataclasses import dataclass

from trainer.config.sections.values import check_value, is_positive


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of a model of your own before fine-tuning."""

    root: str | None = None
    """Dataset for pretraining, in the forms of data.root; null skips pretraining and uses model.weights."""
    epochs: int = 10
    """Epochs of pretraining."""
    lr: float = 0.05
    """Learning rate of all layers in pretraining at its peak."""

    def __post_init__(self) -> None:
        check_value("pretrain.epochs", self.epochs, self.epochs >= 1, "1 or more")
        check_value("pretrain.lr", self.lr, is_positive(self.lr), "a number above 0")

"""Section `model`: architecture, pretrained weights and initialization of the head."""

from dataclasses import dataclass, field
from typing import Literal

from trainer.config.sections.values import check_value
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, pretrained weights and initialization of the head."""

    name: str = "resnet18"
    """Model name: a classification model of torchvision, or a model of timm as timm/NAME."""
    weights: str | None = "DEFAULT"
    """Pretrained weights: DEFAULT, another torchvision name (IMAGENET1K_V1), a safetensors or PyTorch file, a run or Hugging Face folder, or null for random ones."""
    weights_key: str = "auto"
    """Key or prefix of the model in the weights file, such as model_ema or teacher; auto finds it, and prefers raw weights to averaged ones."""
    allow_partial_weights: bool = False
    """Partial weights: tensors of the backbone that the weights lack or have in another shape stay random, instead of an error."""
    head_init: Literal["xavier", "torch", "source-labels", "linear-probe"] = "xavier"
    """Head initialization: Xavier-uniform (xavier), PyTorch's default (torch), pretrained rows of matching classes (source-labels), or logistic regression on features (linear-probe)."""
    source_labels: str = "auto"
    """Class names of the pretrained model for head_init source-labels: those of the weights (auto), or a text file with one name per line."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Class name mapping from yours to the pretrained model's for head_init source-labels, such as {dachshund puppy: dachshund}."""
    dropout: float | None = None
    """Dropout probability of the model's dropout layers; null keeps the model's default."""
    stochastic_depth: float | None = None
    """Stochastic depth probability of the last residual block, proportionally lower in earlier blocks; null keeps the model's default."""

    def __post_init__(self) -> None:
        for key in ("dropout", "stochastic_depth"):
            probability: float | None = getattr(self, key)
            valid = probability is None or 0 <= probability < 1
            check_value(f"model.{key}", probability, valid, "0 to below 1, or null")
        if self.weights is not None and not self.weights.strip():
            raise UserError(
                "model.weights is empty: expected DEFAULT or another name of torchvision, a file or folder, or null"
            )
        if not self.weights_key.strip():
            raise UserError("model.weights_key is empty: expected auto, or a key or prefix in the weights file")
        if not self.source_labels.strip():
            raise UserError("model.source_labels is empty: expected auto, or a text file with one name per line")

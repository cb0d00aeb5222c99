"""A classifier on an encoder of timm that has none, such as the vision encoder of a language model."""

from typing import cast

from torch import Tensor, nn


class EncoderClassifier(nn.Module):
    """A linear output layer on the encoder's features, averaged over positions, as timm's classifiers of its encoders.

    In its state dict, the names of the encoder's tensors begin with `encoder.`.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(cast(int, encoder.head_hidden_size), num_classes)
        self.num_classes = num_classes
        # Of a map of features, [B, D, H, W] or [B, H, W, D]. Tokens are [B, N, D].
        self._channels_first = getattr(encoder, "output_fmt", "NCHW") == "NCHW"

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, num_classes] of images [B, 3, H, W]."""
        features = self.encoder(images)
        if features.ndim == 4 and self._channels_first:
            features = features.mean((2, 3))
        elif features.ndim > 2:
            features = features.flatten(1, -2).mean(1)
        return cast(Tensor, self.head(features))

    def get_classifier(self) -> nn.Module:
        """Return the output layer, as timm's models do."""
        return self.head


def with_classifier(model: nn.Module, num_classes: int) -> nn.Module:
    """Return a model of timm with a classifier: the model itself, unless it is an encoder that has none."""
    is_encoder = not hasattr(model, "get_classifier") and hasattr(model, "head_hidden_size")
    return EncoderClassifier(model, num_classes) if is_encoder else model

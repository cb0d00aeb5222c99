"""Check the pretrained weights of a run before its images are decoded."""

from pathlib import Path

from regraft.contract import CHECKPOINTS
from trainer.checkpoint.store import list_checkpoints
from trainer.config.resolve import ResolvedConfig
from trainer.model.create import check_weights


def check_pretrained_weights(config: ResolvedConfig) -> None:
    """Raise a UserError if the pretrained weights are missing, cannot be read, or do not fit the model.

    Weights that have to be downloaded are not checked, nor those of a run that resumes, which may not need them.
    """
    weights = config.model.weights
    if weights is None or config.pretrain.root:
        return
    if config.run.resume != "never" and list_checkpoints(Path(config.run.dir) / CHECKPOINTS):
        return
    check_weights(
        config.model.name,
        image_size=config.data.image_size,
        weights=weights,
        weights_key=config.model.weights_key,
        allow_partial_weights=config.model.allow_partial_weights,
    )

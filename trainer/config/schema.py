"""All options of a run, as frozen dataclasses.

Each section checks its own values when it is created; `Config` checks values that depend on each other.
"""

from dataclasses import dataclass, field

from trainer.config.sections.baseline import BaselineConfig
from trainer.config.sections.checkpoint import CheckpointConfig
from trainer.config.sections.data import DataConfig
from trainer.config.sections.model import ModelConfig
from trainer.config.sections.optim import OptimConfig
from trainer.config.sections.pretrain import PretrainConfig
from trainer.config.sections.regularization import RegularizationConfig
from trainer.config.sections.run import RunConfig
from trainer.config.sections.train import TrainConfig
from trainer.config.sections.transfer import TransferConfig
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    debug: bool = False
    """Debug mode: run every step on a few batches in one process, and show shapes and times."""

    def __post_init__(self) -> None:
        transfer, has_weights = self.transfer, bool(self.pretrain.root or self.model.weights)
        if self.train.precision in ("fp16", "tf32") and self.run.device == "cpu":
            raise UserError(
                f"train.precision is {self.train.precision} and run.device is cpu: CPUs do not train in it; choose "
                "fp32, bf16 or auto"
            )
        if self.data.sampling == "balanced" and self.regularization.class_weights == "balanced":
            raise UserError(
                "data.sampling and regularization.class_weights are both balanced, which would correct the class "
                "frequencies twice: set data.sampling to shuffled, or class_weights to none"
            )
        if (self.regularization.mixup or self.regularization.cutmix) and self.train.batch_size == 1:
            raise UserError(
                "regularization.mixup and cutmix mix images of a batch, but train.batch_size is 1: set them to 0, or "
                "increase batch_size"
            )
        if self.pretrain.root and self.model.weights:
            raise UserError(
                f"pretrain.root is {self.pretrain.root} and model.weights is {self.model.weights}, but a run starts "
                "from one of them: set the other to null"
            )
        if not has_weights and self.model.head_init in ("source-labels", "linear-probe"):
            raise UserError(
                f"model.head_init is {self.model.head_init}, which needs pretrained weights: set model.weights or "
                "pretrain.root, or set head_init to xavier"
            )
        for option, value in (("l2_sp", transfer.l2_sp), ("wise_ft", transfer.wise_ft)):
            if value and not has_weights:
                raise UserError(
                    f"transfer.{option} is {value}, which needs pretrained weights: set model.weights or "
                    f"pretrain.root, or turn transfer.{option} off"
                )
        if self.baseline.lr and not has_weights:
            raise UserError(
                "baseline.lr compares fine-tuning with training from scratch, but this run trains from scratch: set "
                "model.weights or pretrain.root, or set baseline.lr to null"
            )

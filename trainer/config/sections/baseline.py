"""Section `baseline`: comparison with the same network trained from scratch."""

from dataclasses import dataclass

from trainer.config.sections.values import check_value, is_positive


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Comparison with the same network trained from scratch."""

    lr: float | None = None
    """Learning rate of all layers of the baseline; null skips the baseline."""

    def __post_init__(self) -> None:
        check_value("baseline.lr", self.lr, is_positive(self.lr), "a number above 0, or null")

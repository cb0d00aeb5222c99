"""Section `run`: run folder, seed, device and resume."""

import re
from dataclasses import dataclass
from typing import Literal

from trainer.config.sections.values import MAX_SEED, check_value
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Run folder, seed, device and resume."""

    dir: str = "runs/default"
    """Run folder, which receives all output files; if not set, a run with other options than that of runs/default goes to runs/default-2."""
    seed: int = 0
    """Random seed of the initialization, the order of the examples and their augmentation."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Resume from the newest checkpoint if there is one (auto), start over and archive the old run (never), or fail without a checkpoint (must)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses the GPU if there is one."""
    threads: int | None = None
    """CPU threads per process; null divides this machine's physical cores among its processes, or half of all cores if they use GPUs."""
    hang_timeout: float | Literal["auto"] | None = "auto"
    """Watchdog timeout of a step [seconds], after which the processes write their stacks and exit; auto adapts to the step time; null is off."""
    audit: bool = False
    """Audit files to compare runs: the examples, pixel checksums and learning rate of every update."""
    report: Literal["auto", "off"] = "auto"
    """HTML report in the run folder, report.html: written during the run and at its end (auto), or not (off)."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Experiment trackers that receive config, metrics and pictures, such as tensorboard or tensorboard,mlflow; a resumed run continues theirs."""
    tracker_project: str = "regraft"
    """Project of the run in wandb and trackio, and its experiment in mlflow."""

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise UserError("run.dir is empty: expected a folder that the run can write to")
        check_value("run.seed", self.seed, 0 <= self.seed <= MAX_SEED, "0 to 2^63 - 1")
        check_value("run.threads", self.threads, self.threads is None or self.threads >= 1, "1 or more, or null")
        valid = not isinstance(self.hang_timeout, int | float) or 0 < self.hang_timeout <= 1e6
        expected = "seconds (above 0, up to 1,000,000), auto, or null"
        check_value("run.hang_timeout", self.hang_timeout, valid, expected)
        valid = re.fullmatch(r"[\w.-]{1,100}", self.tracker_project) is not None
        check_value("run.tracker_project", repr(self.tracker_project), valid, "up to 100 letters, digits, _, - and .")

"""`TrainState`: everything that an update changes. The loop updates it, a checkpoint saves and restores it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState
from trainer.model.batch_norm import gather_batch_norm_statistics, restore_batch_norm_statistics
from trainer.optim.ema import ModelEma
from trainer.text import join_truncated

Tensors = dict[str, Tensor]
_START_ANEW = "Choose another run.dir, or start anew with --run.resume never, which archives the run"


@dataclass(kw_only=True)
class TrainState:
    """The state of training."""

    model: nn.Module
    """The unwrapped model: checkpoints hold neither DDP's wrapper nor its prefix of names."""
    optimizer: torch.optim.Optimizer
    """Prepared by accelerate."""
    ema: ModelEma
    """Moving average of the weights; off by default."""
    scaler: torch.amp.GradScaler | None = None
    """Loss scaler of fp16."""
    epoch: int = 0
    """Whole epochs completed: trained and evaluated."""
    step: int = 0
    """Updates completed, those of the epoch in progress included."""
    metrics: MetricState | None = None
    """Metric sums of the epoch in progress; None between two epochs."""
    best: BestEpoch | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state with copies of all tensors in main memory, so that training can go on at once.

        The keys are `model`, `optimizer` and `ema` (name -> tensor), `scaler`, `epoch`, `step`, `metrics` and `best`.
        The optimizer's moments are named after the model's parameters: `KEY.PARAMETER`.
        """
        return {
            "model": _copy(self.model.state_dict()),
            "optimizer": _copy(self._moments()),
            "ema": _copy(self.ema.state_dict()),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "epoch": self.epoch,
            "step": self.step,
            "metrics": self.metrics,
            "best": self.best,
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, where: str) -> None:
        """Restore what `state_dict` returned. Parameters that trained at that time must require gradients now.

        Args:
            saved: the state.
            where: the checkpoint's path, for errors.

        Raises:
            UserError: it belongs to another model or optimizer; nothing is changed then.

        """
        self._check_ema(saved["ema"], where)
        moments = self._expected_moments(saved)
        wrong = [
            *tensor_differences(saved["model"], self.model.state_dict()),
            *tensor_differences(saved["optimizer"], moments),
        ]
        if wrong:
            raise UserError(
                f"{where}: does not fit this run: {join_truncated(wrong, limit=5)}. {_START_ANEW}"
            )
        self.ema.load_state_dict(saved["ema"])
        self.model.load_state_dict(saved["model"])
        self._load_moments(saved["optimizer"], moments)
        if self.scaler is not None and saved["scaler"]:  # empty if the run began without fp16
            self.scaler.load_state_dict(dict(saved["scaler"]))
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.metrics, self.best = saved["metrics"], saved["best"]

    def gather_batch_norm_statistics(self, world_size: int) -> Tensors:
        """Return each process's own BatchNorm statistics, `RANK.NAME` -> tensor. Every process must call it."""
        return gather_batch_norm_statistics(self.ema.with_model(), world_size)

    def restore_batch_norm_statistics(self, statistics: Tensors, *, rank: int, world_size: int) -> None:
        """Restore what `gather_batch_norm_statistics` returned; for another number of processes, the mean."""
        restore_batch_norm_statistics(self.ema.with_model(), statistics, rank=rank, world_size=world_size)

    def _moments(self) -> Tensors:
        return {
            f"{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _optimized_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [(names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _moment_keys(self) -> tuple[str, ...]:
        """Return what the optimizer stores for each parameter that it has updated."""
        if "betas" in self.optimizer.defaults:
            return ("step", "exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.optimizer.defaults["momentum"] else ()

    def _expected_moments(self, saved: Mapping[str, Any]) -> Tensors:
        """Return the moments that this run expects, with memory to load them into."""
        keys = self._moment_keys()
        # Loss scaling skips updates until it has settled, so the first steps of fp16 may leave no moments.
        if not saved["optimizer"] and (saved["step"] == 0 or saved["scaler"]):
            keys = ()
        # A parameter that is still frozen has no moments, or (where the optimizer creates them at once) zeros.
        return {
            f"{key}.{name}": _empty_moment(key, parameter)
            for name, parameter in self._optimized_parameters()
            for key in keys
            if parameter.requires_grad or f"{key}.{name}" in saved["optimizer"]
        }

    def _load_moments(self, found: Tensors, moments: Tensors) -> None:
        for name, moment in moments.items():
            moment.copy_(found[name])
        keys = {name.partition(".")[0] for name in moments}
        state = {
            number: {
                key: moments[entry] if (entry := f"{key}.{name}") in moments else torch.zeros_like(parameter)
                for key in self._moment_keys()
                if key in keys
            }
            for number, (name, parameter) in enumerate(self._optimized_parameters())
            if parameter.requires_grad or self.optimizer.state.get(parameter)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_ema(self, saved: Tensors, where: str) -> None:
        if bool(saved) != self.ema.enabled:
            then, now = ("with", "without") if saved else ("without", "with")
            raise UserError(
                f"{where}: was saved {then} regularization.ema, and this run is {now} it. Restore that setting, choose "
                "another run.dir, or start anew with --run.resume never, which archives the run"
            )
        if wrong := tensor_differences(saved, self.ema.state_dict()):
            raise UserError(
                f"{where}: its moving average does not fit this run: {join_truncated(wrong, limit=5)}. {_START_ANEW}"
            )


def _copy(tensors: Mapping[str, Tensor]) -> Tensors:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        for name, tensor in tensors.items()
    }


def _empty_moment(key: str, parameter: Tensor) -> Tensor:
    """Return memory for a moment in its parameter's layout: channels_last weights have channels_last moments."""
    return torch.zeros(()) if key == "step" else torch.empty_like(parameter)


def tensor_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each difference of name, shape or dtype."""

    def kind(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} does not belong to it" for name in found if name not in expected),
        *(
            f"{name} is {kind(found[name])}, expected {kind(tensor)}"
            for name, tensor in expected.items()
            if name in found and kind(found[name]) != kind(tensor)
        ),
    ]

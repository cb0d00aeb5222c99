"""The training state: model, EMA, optimizer, loss scaler, position and metrics. Checkpoints save and restore it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.metrics import BestEpoch, MetricState
from trainer.model.batch_norm import gather_batch_norm_statistics, restore_batch_norm_statistics
from trainer.model.load_state import load_state
from trainer.optim.ema import ModelEma
from trainer.text import join_truncated

Tensors = dict[str, Tensor]
_ADVICE = "Choose another run.dir, or start anew with --run.resume never, which archives the run"


@dataclass(kw_only=True)
class TrainState:
    """Everything that an update changes."""

    model: nn.Module
    """The unwrapped model: names of parameters in a checkpoint have no prefix of DDP."""
    optimizer: torch.optim.Optimizer
    """Prepared by accelerate."""
    ema: ModelEma
    """Moving average of the weights; by default turned off."""
    scaler: torch.amp.GradScaler | None = None
    """Loss scaler of fp16; None in other precisions."""
    epoch: int = 0
    """Epochs completed, including their evaluation."""
    step: int = 0
    """Updates completed, including those of the epoch in progress."""
    metrics: MetricState | None = None
    """Metric sums of the epoch in progress; None between two epochs."""
    best: BestEpoch | None = None
    """The best epoch so far."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with copies of all tensors on the CPU.

        The keys are `model`, `optimizer` and `ema` (name -> tensor), `scaler`, `epoch`, `step`, `metrics` and `best`.
        The optimizer's moments are named `KEY.PARAMETER`, such as `exp_avg.fc.weight`.
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
        """Restore a state that `state_dict` returned.

        Parameters that were trained when the state was saved must require gradients now.

        Args:
            saved: the state.
            where: path of the checkpoint, for error messages.

        Raises:
            UserError: the state belongs to another model or optimizer. Nothing has been changed.

        """
        self._check_ema(saved["ema"], where)
        moments = self._expected_moments(saved)
        differences = [
            *tensor_differences(saved["model"], self.model.state_dict()),
            *tensor_differences(saved["optimizer"], moments),
        ]
        if differences:
            raise UserError(f"{where}: does not fit this run: {join_truncated(differences, limit=5)}. {_ADVICE}")
        self.ema.load_state_dict(saved["ema"])
        load_state(self.model, saved["model"])
        self._load_moments(saved["optimizer"], moments)
        if self.scaler is not None and saved["scaler"]:  # empty if the state was saved without fp16
            self.scaler.load_state_dict(dict(saved["scaler"]))
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.metrics, self.best = saved["metrics"], saved["best"]

    def gather_batch_norm_statistics(self, world_size: int) -> Tensors:
        """Return the BatchNorm statistics of each process, `RANK.NAME` -> tensor. Every process must call it."""
        return gather_batch_norm_statistics(self.ema.with_model(), world_size)

    def restore_batch_norm_statistics(self, statistics: Tensors, *, rank: int, world_size: int) -> None:
        """Restore the statistics of this process, or their mean if the number of processes has changed."""
        restore_batch_norm_statistics(self.ema.with_model(), statistics, rank=rank, world_size=world_size)

    def _moments(self) -> Tensors:
        return {
            f"{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _optimized_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return (name, parameter) in the order of the optimizer."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [(names[id(p)], p) for group in self.optimizer.param_groups for p in group["params"]]

    def _moment_keys(self) -> tuple[str, ...]:
        """Return the names of the moments that the optimizer keeps for each parameter."""
        if "betas" in self.optimizer.defaults:
            return ("step", "exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.optimizer.defaults["momentum"] else ()

    def _expected_moments(self, saved: Mapping[str, Any]) -> Tensors:
        """Return uninitialized tensors for the moments that this run expects."""
        keys = self._moment_keys()
        # Loss scaling skips the first updates of fp16 until the scale is low enough: there may be no moments yet.
        if not saved["optimizer"] and (saved["step"] == 0 or saved["scaler"]):
            keys = ()
        # A frozen parameter has no moments, or zeros if the optimizer has created all moments at once.
        return {
            f"{key}.{name}": _empty_moment(key, parameter)
            for name, parameter in self._optimized_parameters()
            for key in keys
            if parameter.requires_grad or f"{key}.{name}" in saved["optimizer"]
        }

    def _load_moments(self, saved: Tensors, moments: Tensors) -> None:
        for name, moment in moments.items():
            moment.copy_(saved[name])
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
            before, now = ("with", "without") if saved else ("without", "with")
            raise UserError(
                f"{where}: was saved {before} regularization.ema, and this run is {now} it. Restore that option, "
                "choose another run.dir, or start anew with --run.resume never, which archives the run"
            )
        if differences := tensor_differences(saved, self.ema.state_dict()):
            raise UserError(
                f"{where}: the moving average does not fit this run: {join_truncated(differences, limit=5)}. {_ADVICE}"
            )


def _copy(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return copies on the CPU; frozen weights that are stored in bfloat16 become float32, which is exact."""

    def copy(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor.detach())

    return {name: copy(tensor) for name, tensor in tensors.items()}


def _empty_moment(key: str, parameter: Tensor) -> Tensor:
    """Return an uninitialized moment in the memory format of its parameter."""
    return torch.zeros(()) if key == "step" else torch.empty_like(parameter)


def tensor_differences(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each difference in name, shape or dtype."""

    def describe(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    return [
        *(f"{name} is missing" for name in expected if name not in saved),
        *(f"{name} does not belong to it" for name in saved if name not in expected),
        *(
            f"{name} is {describe(saved[name])}, expected {describe(tensor)}"
            for name, tensor in expected.items()
            if name in saved and describe(saved[name]) != describe(tensor)
        ),
    ]

"""The distributed context of a run: process group and collectives, device, precision and CPU threads.

`init_distributed` overrides defaults that would slow a run down without a message: `accelerate launch` sets
OMP_NUM_THREADS=1, for example. What it chooses is printed.
"""

import os
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, Self, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn

from regraft.contract import available_cores, physical_cores
from trainer.distributed.allocator import keep_freed_memory
from trainer.distributed.launch_checks import (
    check_accelerate_variables,
    check_process_group,
    check_threads,
    read_process_group,
)
from trainer.distributed.precision import (
    ACCELERATE_PRECISION,
    Execution,
    Precision,
    asked_precision,
    check_precision,
    set_float32_precision,
)
from trainer.distributed.process_group import VARIABLES
from trainer.distributed.rendezvous import QUIET_SECONDS, join_process_group
from trainer.distributed.signals import has_launcher
from trainer.errors import UserError

T = TypeVar("T")

# One rank may generate, download or check images while the others wait at a barrier.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and the device and precision that they compute with."""

    accelerator: Accelerator
    precision: Precision
    threads: int
    """CPU threads of this process."""
    cores: int
    """CPU cores of this machine for each of its processes."""
    notes: tuple[str, ...]
    """Lines to print: what was chosen, and why."""
    control: torch.distributed.ProcessGroup | None = None
    """A gloo group for flags, so that no GPU has to be waited for; None: use the default group."""

    @property
    def rank(self) -> int:
        """Return the rank of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def local_world_size(self) -> int:
        """Return the number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    @property
    def is_main_process(self) -> bool:
        """Return whether this process is rank 0, which prints and writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Return the device that this process computes on."""
        device: torch.device = self.accelerator.device
        return device

    def execution(self, *, channels_last: bool) -> Execution:
        """Return the precision of this context with a memory layout."""
        return Execution(self.precision, channels_last)

    def all_reduce_max(self, flags: Sequence[int]) -> list[int]:
        """Return the maximum of each flag over all processes. Every process must call it."""
        return [int(flag) for flag in self._all_reduce_max(torch.tensor(flags, dtype=torch.int64))]

    def max_across_ranks(self, value: float) -> float:
        """Return the largest value of all processes. Every process must call it."""
        return float(self._all_reduce_max(torch.tensor(value, dtype=torch.float64)))

    def _all_reduce_max(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value. Every process must call it."""
        values: list[T] = broadcast_object_list([value], from_process=0)
        return values[0]

    def main_process_first(self, function: Callable[[], T], *, local: bool = False) -> T:
        """Return this process's `function()`. Rank 0 calls it first, so the others find the files that it wrote.

        Every process must call it. A UserError on one process is raised on all of them: the run then ends with one
        clear message instead of the other processes' reports of a lost peer.

        Args:
            function: what to call.
            local: let the first process of each machine go first, instead of rank 0 alone.

        """
        accelerator = self.accelerator
        is_first = accelerator.is_local_main_process if local else accelerator.is_main_process
        result: T | None = None
        for first_turn in (True, False):
            error: UserError | None = None
            if is_first == first_turn:
                try:
                    result = function()
                except UserError as caught:
                    error = caught
            self.raise_on_all_ranks(error)
        return cast(T, result)

    def raise_on_all_ranks(self, error: UserError | None) -> None:
        """Raise the first error that any process passed, on every process. Every process must call it."""
        texts = [text for text in gather_object([str(error) if error else None]) if text is not None]
        if texts:
            raise UserError(texts[0])

    def check_equal_across_ranks(self, value: object, what: str) -> None:
        """Raise a UserError on every process unless all of them passed the same value. Every process must call it."""
        values = gather_object([value])
        if any(other != values[0] for other in values):
            differing = [rank for rank, other in enumerate(values) if other != values[0]]
            raise UserError(
                f"the processes disagree on {what}: rank {', '.join(map(str, differing))} differs from rank 0. "
                "Expected the same run.dir and the same images on every machine"
            )

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer wrapped by accelerate."""
        with warnings.catch_warnings():
            # Its replacement does not exist in the oldest supported torch.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared: tuple[nn.Module, torch.optim.Optimizer] = self.accelerator.prepare(model, optimizer)
        return prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return a prepared model without DDP's wrapper, still with autocast around its forward."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        return unwrapped

    def rewrap_ddp(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Return the model wrapped again, after its set of trainable parameters has changed.

        DDP sorts parameters into buckets and registers a hook on each when it is built. Unfreezing parameters under
        a live wrapper makes the ranks diverge (Lightning issue 20340). The caller must drop its reference to the old
        wrapper, or the old hooks stay alive.

        Args:
            model: unwrapped.
            optimizer: prepared by accelerate; it is not changed.

        """
        if self.world_size == 1:
            return model
        # Without the autocast wrapper too, or it would be applied twice.
        bare: nn.Module = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        wrapped, _ = self.prepare(bare, optimizer)
        return wrapped

    def with_precision(self, precision: Precision) -> Self:
        """Return the context with another precision. Nothing that this one has prepared may be used any more.

        Raises:
            UserError: the device does not support it.

        """
        on_cpu = self.device.type == "cpu"
        check_precision(precision, on_cpu=on_cpu)
        set_float32_precision(precision, self.device)
        if ACCELERATE_PRECISION[precision] == ACCELERATE_PRECISION[self.precision]:
            return replace(self, precision=precision)
        _reset_accelerate()
        return replace(self, accelerator=_make_accelerator(precision, on_cpu=on_cpu), precision=precision)

    def reset(self) -> None:
        """Clear what an earlier phase of this process left: the loss scaler's state and the peak of GPU memory."""
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(self.device.type).state_dict())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def init_distributed(
    *, device: Literal["auto", "cpu", "cuda"], precision: Precision | Literal["auto"], threads: int | None
) -> DistributedContext:
    """Join the process group, if there is one, and return the distributed context.

    Args:
        device: the option run.device.
        precision: the option train.precision; `auto` stands for fp32 here, unless the launcher asks for another one.
        threads: the option run.threads; None uses all physical cores on a CPU, and half of all cores beside a GPU.

    Raises:
        UserError: this machine lacks the device or the precision, or the processes cannot find each other.

    """
    group = read_process_group(os.environ)
    check_accelerate_variables(os.environ)
    check_threads(os.environ)
    forces_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # overrides the arguments of Accelerator
    if forces_cpu and device == "cuda":
        raise UserError(
            "run.device is cuda, but accelerate is told to use the CPU (--cpu, or ACCELERATE_USE_CPU): drop one of them"
        )
    on_cpu = device == "cpu" or forces_cpu or (device == "auto" and not torch.cuda.is_available())
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch finds no GPU here: install a driver and a CUDA build of torch, "
            "or set run.device to auto"
        )
    chosen = asked_precision(precision, os.environ) or "fp32"
    check_precision(chosen, on_cpu=on_cpu)
    _reset_accelerate()
    quiet_seconds = QUIET_SECONDS if has_launcher(os.environ) else 0.0
    join_process_group(group, "gloo" if on_cpu else "nccl", timeout=_TIMEOUT, quiet_seconds=quiet_seconds)
    accelerator = _make_accelerator(chosen, on_cpu=on_cpu)
    set_float32_precision(chosen, accelerator.device)
    check_process_group(accelerator, group.world_size if group is not None else 1)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, available_cores() // local_world_size)
    num_threads = threads or max(1, physical_cores() // local_world_size if on_cpu else cores // 2)
    torch.set_num_threads(num_threads)
    if on_cpu:
        keep_freed_memory(os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" (CUDA_VISIBLE_DEVICES={visible!r})" if device == "auto" and on_cpu and visible is not None else ""
    note = (
        f"device {accelerator.device} x {accelerator.num_processes}{hidden}, {num_threads} CPU "
        f"thread{'s' * (num_threads > 1)} each"
    )
    control = (
        cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT))
        if accelerator.num_processes > 1 and not on_cpu
        else None
    )
    return DistributedContext(accelerator, chosen, num_threads, cores, (note,), control)


def _make_accelerator(precision: Precision, *, on_cpu: bool) -> Accelerator:
    try:
        return Accelerator(
            cpu=on_cpu,
            mixed_precision=ACCELERATE_PRECISION[precision],
            kwargs_handlers=[
                # BatchNorm statistics are averaged before each evaluation: DDP need not broadcast them every time.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_TIMEOUT),
            ],
        )
    except (ValueError, ImportError, NotImplementedError) as error:  # of a variable that is not checked above
        settings = ", ".join(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "NCCL_")))
        raise UserError(
            f"accelerate cannot be set up ({error}): check these variables of the environment: {settings or 'none'}"
        ) from error


def _reset_accelerate() -> None:
    """Reset accelerate's state of this process, so that one process can make several runs."""
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    if PartialState._shared_state and not torch.distributed.is_initialized():
        PartialState._reset_state()


def leave_process_group_env(environment: MutableMapping[str, str]) -> bool:
    """Remove the launcher's process group from the environment; return whether this process was its rank 0."""
    is_rank_0 = environment.get("RANK", "0") == "0"
    for name in VARIABLES:
        environment.pop(name, None)
    return is_rank_0


def shut_down() -> None:
    """Leave the process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process destroys the group while another is in its last collective
        torch.distributed.destroy_process_group()

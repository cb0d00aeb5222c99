"""The machine side of a run: processes, device, threads and precision, checked before any work.

Accelerate and torch are quick to run N copies of a job by accident, or one thread where there are many
cores (`accelerate launch` sets OMP_NUM_THREADS=1); what is chosen here is said.
"""

import os
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import nn

from regraft.contract import available_cores
from trainer.distributed.rendezvous import join_process_group
from trainer.errors import UserError

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]

_AS_BEGUN = "as this run began with"
_ACCELERATE_NAME = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# One rank may draw, download or check images while the others wait at a barrier.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class DistributedContext:
    """What a run runs on."""

    accelerator: Accelerator
    precision: Precision
    threads: int
    """CPU threads of this process."""
    cores: int
    """CPU cores open to each process of this machine."""
    notes: tuple[str, ...]
    """What was chosen, and why; one line each."""
    control: torch.distributed.ProcessGroup | None = None
    """The group for agreements: on the CPU, so that no device is waited for; None: the default one."""

    @property
    def rank(self) -> int:
        """Return this process's number among all, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def is_main_process(self) -> bool:
        """Return whether this process is the one that speaks and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Return the device that this process computes on."""
        device: torch.device = self.accelerator.device
        return device

    def all_reduce_max(self, flags: Sequence[int]) -> list[int]:
        """Return the maximum of each flag over all processes. Every process must call it."""
        if self.world_size == 1:
            return list(flags)
        maximum = torch.tensor(flags, dtype=torch.int64)
        torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=self.control)
        return [int(flag) for flag in maximum]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value. Every process must call it."""
        values: list[T] = broadcast_object_list([value], from_process=0)
        return values[0]

    def main_process_first(self, function: Callable[[], T], *, local: bool = False) -> T:
        """Return this process's `function()`. Rank 0 calls it first, so the others find what it made.

        Every process must call it. A UserError on one process is raised on all of them: the run then ends with one
        clear message instead of the other processes' reports of a lost peer.

        Args:
            function: the work.
            local: the first process of each machine goes first, instead of rank 0 alone.

        """
        accelerator = self.accelerator
        is_first = accelerator.is_local_main_process if local else accelerator.is_main_process
        result: T | None = None
        for first_round in (True, False):
            error: UserError | None = None
            if is_first == first_round:
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
                f"the processes do not agree: {what}, is another on rank {', '.join(map(str, differing))} than on rank "
                "0. Expected the same run.dir and the same images on every machine"
            )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer wrapped by accelerate."""
        with warnings.catch_warnings():
            # Its replacement does not exist in the oldest torch that is supported.
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

    def reset(self) -> None:
        """Clear what an earlier phase of this process left: the loss scaler's state and the peak of GPU memory."""
        accelerator = self.accelerator
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(self.device.type).state_dict())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def init_distributed(
    *,
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "fp32", "bf16", "fp16"],
    threads: int | None,
    saved_precision: Precision | None = None,
) -> DistributedContext:
    """Join the process group, if there is one, and return what the run runs on.

    `kept` is the precision that an earlier start of the run had `auto` choose.

    Raises:
        UserError: a device or precision that this machine lacks, or processes that do not know of one another.

    """
    refuse_copies(os.environ)
    refuse_launchers_settings(os.environ)
    told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate obeys it whatever it is asked for here
    if told_cpu and device == "cuda":
        raise UserError(
            "run.device is cuda, but accelerate is told to use the CPU (--cpu, or ACCELERATE_USE_CPU): drop one of them"
        )
    on_cpu = device == "cpu" or told_cpu or (device == "auto" and not torch.cuda.is_available())
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but torch finds no GPU here: install a driver and a CUDA build of torch, "
            "or set run.device to auto"
        )
    chosen, why = choose_precision(
        precision, on_cpu=on_cpu, environment=os.environ, saved_precision=saved_precision
    )
    _forget_earlier()
    join_process_group(os.environ, "gloo" if on_cpu else "nccl", patience=_PATIENCE)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_ACCELERATE_NAME[chosen],
        kwargs_handlers=[
            # BatchNorm's statistics are averaged before they are used: no broadcast in every forward.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    _check_group(accelerator)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, available_cores() // local_world)
    used = threads or (cores if on_cpu else max(1, cores // 2))
    torch.set_num_threads(used)
    notes = (
        f"device {accelerator.device} x {accelerator.num_processes}, {used} CPU thread{'s' * (used > 1)} each",
        f"precision {chosen}: {why}",
    )
    control = (
        cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
        if accelerator.num_processes > 1 and not on_cpu
        else None
    )
    return DistributedContext(accelerator, chosen, used, cores, notes, control)


def choose_precision(
    asked: Literal["auto", "fp32", "bf16", "fp16"],
    *,
    on_cpu: bool,
    environment: Mapping[str, str],
    saved_precision: Precision | None = None,
) -> tuple[Precision, str]:
    """Return the precision to use, and why; what `auto` chose when the run began (`kept`) is kept.

    Raises:
        UserError: fp16 on a CPU, which accelerate would silently run as fp32; bf16 on a GPU that lacks it, where
            it would be emulated.

    """
    from_launcher = {"bf16": "bf16", "fp16": "fp16"}.get(environment.get("ACCELERATE_MIXED_PRECISION", ""))
    if asked != "auto":
        chosen, why = asked, "as train.precision asks"
    elif saved_precision is not None:
        chosen, why = saved_precision, _AS_BEGUN
    elif from_launcher is not None:
        chosen, why = from_launcher, "as accelerate launch --mixed_precision asks"  # type: ignore[assignment]
    elif on_cpu:
        chosen, why = "fp32", "the safe choice on a CPU; bf16 may be faster on one with AMX or AVX-512 BF16"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        chosen, why = "bf16", "this GPU computes in it, and it needs no loss scaling"
    else:
        chosen, why = "fp16", "this GPU has no bf16; the loss is scaled"
    instead = "; it has to go on where that is at hand" if why == _AS_BEGUN else ": choose {}"
    if chosen == "fp16" and on_cpu:
        raise UserError(
            f"precision fp16 ({why}) on a CPU, which has no fp16 training{instead.format('fp32 or bf16')}"
        )
    if chosen == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"precision bf16 ({why}) on a GPU that would only emulate it{instead.format('fp16 or fp32')}"
        )
    return chosen, why


def refuse_copies(environment: Mapping[str, str]) -> None:
    """Raise a UserError where a launcher has started several processes that cannot find one another."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environment and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"srun has started {tasks} tasks and no WORLD_SIZE is set: each would train the whole job by itself. "
            "Start one task a node, and in it torchrun (or accelerate launch), which starts the processes"
        )
    if environment.get("WORLD_SIZE", "1") != "1":
        missing = [
            name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment
        ]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes "
                "by torchrun or accelerate launch, or unset WORLD_SIZE"
            )


def refuse_launchers_settings(environment: Mapping[str, str]) -> None:
    """Raise a UserError for what `accelerate launch` or its config file sets behind the run's own config.

    Accelerate takes these from the environment without a word: steps of accumulation would divide every
    gradient, a compiled model would be saved under other names.
    """
    for variable, harmless, instead in (
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            ("", "1"),
            "train.grad_accum_steps cuts a batch into parts",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "models are not compiled"),
        ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16", "fp16"), "train.precision is fp32, bf16 or fp16"),
    ):
        value = environment.get(variable, "")
        if value.lower() not in harmless:
            raise UserError(
                f"{variable} is {value!r}, set by accelerate launch or its config file: {instead} here. Leave that "
                "option out, or name another file by accelerate launch --config_file"
            )


def _check_group(accelerator: Accelerator) -> None:
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE is {expected}, but accelerate has formed a group of {accelerator.num_processes}: "
            f"{expected} copies of the same run would write into one folder. Launch with "
            f"torchrun --nproc-per-node {expected} trainer/main.py"
        )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type}, expected plain data-parallel processes: "
            "launch with torchrun, or choose another file by accelerate launch --config_file"
        )


def _forget_earlier() -> None:
    """Drop the state that accelerate keeps for the process, so that several runs may follow one another in it."""
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    if PartialState._shared_state and not torch.distributed.is_initialized():
        PartialState._reset_state()


def leave_process_group_env(environment: MutableMapping[str, str]) -> bool:
    """Leave the group that a launcher has started, and return whether this process is the one to go on alone."""
    is_first = environment.get("RANK", "0") == "0"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return is_first


def shut_down() -> None:
    """Leave the process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody takes the group down while another is in its last exchange
        torch.distributed.destroy_process_group()

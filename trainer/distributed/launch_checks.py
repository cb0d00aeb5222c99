"""Check the environment variables that a launcher sets, and the process group that comes of them.

srun, torchrun and `accelerate launch` can silently start N independent copies of a run, or change what it computes.
"""

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType

from trainer.errors import UserError


def check_world_size_variables(environment: Mapping[str, str]) -> None:
    """Raise a UserError if a launcher has started several processes that cannot find each other."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in environment and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"srun has started {tasks} tasks and WORLD_SIZE is not set: each task would train the whole job by itself. "
            "Start one task per node, and in it torchrun (or accelerate launch), which starts the processes"
        )
    if environment.get("WORLD_SIZE", "1") != "1":
        required = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in required if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set: start the processes "
                "with torchrun or accelerate launch, or unset WORLD_SIZE"
            )


def check_accelerate_variables(environment: Mapping[str, str]) -> None:
    """Raise a UserError for settings of `accelerate launch` or its config file that would override the run's config.

    Accelerate applies them without a message: gradient accumulation would divide every gradient, and a compiled model
    would be saved with other parameter names.
    """
    for variable, allowed, instead in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "use train.grad_accum_steps to split a batch"),
        ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "regraft does not compile models"),
        ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16", "fp16"), "train.precision is fp32, bf16 or fp16"),
    ):
        value = environment.get(variable, "")
        if value.lower() not in allowed:
            raise UserError(
                f"{variable} is {value!r}, set by accelerate launch or its config file: {instead}. Leave that option "
                "out, or name another file with accelerate launch --config_file"
            )


def check_process_group(accelerator: Accelerator, environment: Mapping[str, str]) -> None:
    """Raise a UserError unless accelerate has formed a data-parallel group of WORLD_SIZE processes."""
    expected = int(environment.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(
            f"WORLD_SIZE is {expected}, but accelerate has formed a group of {accelerator.num_processes}: "
            f"{expected} copies of the same run would write into one folder. Launch with "
            f"torchrun --nproc-per-node {expected} trainer/main.py"
        )
    supported = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"accelerate is set to {accelerator.distributed_type}, expected plain data-parallel processes: "
            "launch with torchrun, or name another file with accelerate launch --config_file"
        )

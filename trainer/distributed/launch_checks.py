"""Check the environment variables that a launcher sets, and the process group that comes of them.

srun, torchrun and `accelerate launch` can silently start N independent copies of a run, or change what it computes. The
variables of a launcher that has ended can stay in a shell, and describe processes that do not exist.
"""

from collections.abc import Mapping, MutableMapping

from accelerate import Accelerator
from accelerate.utils import DistributedType

from trainer.distributed.process_group import VARIABLES, ProcessGroup
from trainer.errors import UserError

_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_TASK_NUMBERS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
_MPI_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MV2_COMM_", "MPI_LOCAL")
_STRATEGIES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
_TRUE, _FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
"""Words that accelerate reads as true and false."""
_MAX_PORT, _MAX_DIGITS = 65535, 9


def read_process_group(environment: MutableMapping[str, str]) -> ProcessGroup | None:
    """Return the process group of the environment; None if this process trains alone.

    Variables that describe no group are removed from the environment, because accelerate would follow some of them:
    those of MPI, and those of a group of one process.

    Raises:
        UserError: a variable is malformed, the variables contradict each other, or a launcher has started several
            processes that cannot find each other.

    """
    for name in VARIABLES:
        if not environment.get(name, "").strip():
            environment.pop(name, None)
    world_size = _number(environment, "WORLD_SIZE", minimum=1) if "WORLD_SIZE" in environment else None
    if world_size is None:
        _check_single_task(environment)
    for name in [name for name in environment if name.startswith(_MPI_PREFIXES)]:
        del environment[name]
    if world_size is None or world_size == 1:
        for name in ("RANK", "LOCAL_RANK"):
            if name in environment and _number(environment, name) > 0:
                state = "is not set" if world_size is None else "is 1"
                raise UserError(f"{name} is {environment[name]}, but WORLD_SIZE {state}: {_advice(environment)}")
        for name in VARIABLES:
            environment.pop(name, None)
        return None
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: {_advice(environment)}")
    local = _number(environment, "LOCAL_WORLD_SIZE", minimum=1) if "LOCAL_WORLD_SIZE" in environment else world_size
    _number(environment, "LOCAL_RANK", maximum=local - 1)
    return ProcessGroup(
        rank=_number(environment, "RANK", maximum=world_size - 1),
        world_size=world_size,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", minimum=1, maximum=_MAX_PORT),
        description=", ".join(f"{name}={environment[name]}" for name in _set_variables(environment)),
    )


def _check_single_task(environment: Mapping[str, str]) -> None:
    """Raise a UserError if srun or mpirun has started several tasks, and nothing tells them how to work together."""
    for names, minimum in ((_TASK_COUNTS, 2), (_TASK_NUMBERS, 1)):
        for name in names:
            value = environment.get(name, "")
            if value.isascii() and value.isdigit() and int(value) >= minimum:
                launcher = "srun" if name.startswith("SLURM") else "mpirun"
                what = f"{launcher} has started {value} tasks" if minimum > 1 else "this is one of several tasks"
                raise UserError(
                    f"{what} ({name}={value}) and WORLD_SIZE is not set: each task would train the whole job by "
                    "itself. Start one task per node, and in it torchrun (or accelerate launch), which starts the "
                    f"processes. If the variable is left over from a job that has ended: unset {name}"
                )


def _number(environment: Mapping[str, str], name: str, *, minimum: int = 0, maximum: int | None = None) -> int:
    value = environment[name].strip()
    number = int(value) if value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS else -1
    if number < minimum or (maximum is not None and number > maximum):
        expected = f"of {minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"{name} is {environment[name]!r}, expected a whole number {expected}: {_advice(environment)}")
    return number


def _set_variables(environment: Mapping[str, str]) -> list[str]:
    return [name for name in VARIABLES if name in environment]


def _advice(environment: Mapping[str, str]) -> str:
    return (
        "start the processes with torchrun or accelerate launch, which set these variables. If they are left over from "
        f"an earlier start, unset {' '.join(_set_variables(environment))}"
    )


def check_accelerate_variables(environment: MutableMapping[str, str]) -> None:
    """Raise a UserError for settings of `accelerate launch` or its config file that would override the run's config.

    Accelerate applies them without a message: gradient accumulation would divide every gradient, and a compiled model
    would be saved with other parameter names. It raises a plain ValueError for malformed values.
    """
    for name in [name for name in environment if name.startswith("ACCELERATE_") and not environment[name].strip()]:
        del environment[name]
    advice = "Leave that option out, or name another file with accelerate launch --config_file"
    for variable, allowed, instead in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "use train.grad_accum_steps to split a batch"),
        ("ACCELERATE_DYNAMO_BACKEND", ("no",), "regraft does not compile models"),
        ("ACCELERATE_MIXED_PRECISION", ("no", "bf16", "fp16"), "train.precision is fp32, bf16 or fp16"),
        ("ACCELERATE_TORCH_DEVICE", (), "use run.device"),
    ):
        value = environment.get(variable)
        if value is not None and value.lower() not in allowed:
            raise UserError(
                f"{variable} is {value!r}, set by accelerate launch or its config file: {instead}. {advice}"
            )
    for variable in (*_STRATEGIES, *_FLAGS):
        value = environment.get(variable, "false")
        if value.lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"{variable} is {value!r}, expected true or false: correct it, or unset {variable}")
        if value.lower() in _TRUE and variable in _STRATEGIES:
            raise UserError(
                f"accelerate is set to {_STRATEGIES[variable]} ({variable}={value}), but regraft trains with plain "
                f"data parallelism. {advice}; or launch with torchrun or regraft train"
            )


def check_threads(environment: MutableMapping[str, str]) -> None:
    """Raise a UserError if OMP_NUM_THREADS is malformed. Of a list, which OpenMP allows, the first number stays."""
    value = environment.get("OMP_NUM_THREADS", "").strip()
    if not value:
        environment.pop("OMP_NUM_THREADS", None)
        return
    counts = [count.strip() for count in value.split(",")]
    if not all(count.isascii() and count.isdigit() and len(count) <= _MAX_DIGITS for count in counts):
        raise UserError(
            f"OMP_NUM_THREADS is {value!r}, expected a number of threads: correct it, or unset OMP_NUM_THREADS"
        )
    environment["OMP_NUM_THREADS"] = counts[0]


def check_process_group(accelerator: Accelerator, expected: int) -> None:
    """Raise a UserError unless accelerate has formed a data-parallel group of the expected number of processes."""
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

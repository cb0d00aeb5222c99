from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import DistributedType

from regraft.contract import physical_cores
from trainer.distributed import context
from trainer.distributed.context import DistributedContext, init_distributed, leave_process_group_env
from trainer.distributed.launch_checks import (
    check_accelerate_variables,
    check_process_group,
    check_threads,
    read_process_group,
)
from trainer.distributed.precision import asked_precision, check_precision, supported_precisions
from trainer.errors import UserError

GROUP = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RANKS = ("RANK", "LOCAL_RANK")


def refused(error: str | None) -> AbstractContextManager[object]:
    return nullcontext() if error is None else pytest.raises(UserError, match=error)


def test_a_cpu_run_uses_all_cores_unless_threads_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as accelerate launch does
    ctx = init_distributed(device="cpu", precision="auto", threads=None)
    assert ctx.threads == torch.get_num_threads() == physical_cores()
    assert (ctx.rank, ctx.world_size, ctx.is_main_process, ctx.device.type) == (0, 1, True, "cpu")
    assert f"{ctx.threads} CPU thread" in ctx.notes[0]
    assert ctx.precision == "fp32"
    assert init_distributed(device="cpu", precision="fp32", threads=1).threads == torch.get_num_threads() == 1


def test_precision_may_change_between_runs_of_one_process() -> None:
    for precision, name in (("bf16", "bf16"), ("fp32", "no"), ("bf16", "bf16")):
        ctx = init_distributed(device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
        assert ctx.accelerator.mixed_precision == name
        for other in ("fp32", "bf16", "fp32"):
            changed = ctx.with_precision(other)  # type: ignore[arg-type]
            model = changed.accelerator.prepare_model(torch.nn.Linear(2, 2))
            assert changed.precision == other
            # accelerate converts outputs to float32: bf16 shows in their rounding alone
            rounded = model(torch.ones(1, 2)).bfloat16().float()
            assert torch.equal(model(torch.ones(1, 2)), rounded) == (other == "bf16")


def test_contradictions_between_device_and_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.device is cuda, but torch finds no GPU"):
        init_distributed(device="cuda", precision="auto", threads=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert init_distributed(device="auto", precision="auto", threads=1).precision == "fp32"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        init_distributed(device="auto", precision="fp16", threads=1)
    with pytest.raises(UserError, match="accelerate is told to use the CPU"):
        init_distributed(device="cuda", precision="auto", threads=1)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="ACCELERATE_DYNAMO_BACKEND is 'INDUCTOR'"):
        init_distributed(device="cpu", precision="auto", threads=None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="4 tasks"):
        init_distributed(device="cpu", precision="auto", threads=None)


def test_collectives_of_a_single_process(ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctx.all_reduce_max([3, 0, True]) == [3, 0, 1]
    assert ctx.control is None
    assert ctx.broadcast({"a": (1, 2)}) == {"a": (1, 2)}
    assert ctx.main_process_first(lambda: 7) == 7
    ctx.raise_on_all_ranks(None)
    ctx.check_equal_across_ranks((3, "a"), "the images")

    def fail() -> None:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        ctx.main_process_first(fail)
    model = torch.nn.Linear(1, 1)
    prepared, optimizer = ctx.prepare(model, torch.optim.SGD(model.parameters()))
    assert ctx.rewrap_ddp(prepared, optimizer) is ctx.unwrap(prepared) is model
    ctx.reset()
    monkeypatch.setattr(context, "gather_object", lambda values: [(3, "a"), *values, (0, "a")])
    with pytest.raises(UserError, match="the processes disagree on the images: rank 2 differs from rank 0"):
        ctx.check_equal_across_ranks((3, "a"), "the images")


@pytest.mark.parametrize(
    ("option", "launcher", "expected"),
    [
        ("auto", "", None),
        ("auto", "no", None),
        ("auto", "bf16", "bf16"),
        ("fp32", "bf16", "fp32"),
        ("tf32", "", "tf32"),
    ],
)
def test_precision_that_the_user_asks_for(option: Any, launcher: str, expected: str | None) -> None:
    assert asked_precision(option, {"ACCELERATE_MIXED_PRECISION": launcher}) == expected


@pytest.mark.parametrize(
    ("precision", "on_cpu", "bf16", "error"),
    [
        ("fp16", True, False, "fp16 needs a GPU"),
        ("tf32", True, False, "tf32 needs a GPU"),
        ("bf16", True, False, None),
        ("bf16", False, False, "only emulate it: choose fp16, fp32 or auto"),
        ("bf16", False, True, None),
        ("fp16", False, False, None),
    ],
)
def test_precision_that_a_device_supports(
    precision: Any, on_cpu: bool, bf16: bool, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    with refused(error):
        check_precision(precision, on_cpu=on_cpu)
    supported = supported_precisions(torch.device("cpu" if on_cpu else "cuda"))
    assert (precision in supported, supported[0]) == (error is None, "fp32")


MPI = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_RANK": "0", "PMIX_RANK": "0", "PMI_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        *((environment, None) for environment in ({}, MPI, {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "1"})),
        *((environment, None) for environment in ({"LOCAL_RANK": "0"}, {"WORLD_SIZE": "", "RANK": " "})),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a host that is gone", "MASTER_PORT": "x"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun has started 4 tasks .* unset SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 tasks .* unset OMPI_COMM_WORLD_SIZE"),
        ({"PMIX_RANK": "1"}, r"one of several tasks \(PMIX_RANK=1\)"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set: .* unset RANK"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but WORLD_SIZE is 1"),
        *((GROUP | {missing: ""}, f"WORLD_SIZE is 2, but {missing} is not set") for missing in list(GROUP)[1:]),
        *((GROUP | {name: "abc"}, f"{name} is 'abc', expected a whole number") for name in GROUP if name[-1] != "R"),
        *((GROUP | {name: "2"}, f"{name} is '2', .* from 0 to 1: .* unset WORLD_SIZE RANK") for name in RANKS),
        *(
            (GROUP | {"MASTER_PORT": port}, "MASTER_PORT is .* from 1 to 65535")
            for port in ("0", "99999", "-1", "9" * 99)
        ),
    ],
)
def test_variables_of_a_launcher(environment: dict[str, str], error: str | None) -> None:
    environment = {"HOME": "/", **environment}
    with refused(error):
        assert read_process_group(environment) is None
        assert not any(
            name.startswith(("WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "OMPI", "PMI")) for name in environment
        )
    group = read_process_group(GROUP | MPI)
    assert group is not None
    assert (group.rank, group.world_size, group.address, group.port) == (1, 2, "127.0.0.1", 1)
    assert group.description.startswith("WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, MASTER_ADDR=127.0.0.1")


@pytest.mark.parametrize(
    ("variable", "allowed", "refused"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "4"),
        ("ACCELERATE_DYNAMO_BACKEND", ("", "NO", "no"), "INDUCTOR"),
        ("ACCELERATE_MIXED_PRECISION", ("no", "bf16", "fp16"), "fp8"),
        ("ACCELERATE_MIXED_PRECISION", (), "foo"),
        ("ACCELERATE_TORCH_DEVICE", ("", " "), "cuda:7"),
        ("ACCELERATE_USE_CPU", ("", "true", "0", "No"), "foo"),
        ("ACCELERATE_DEBUG_MODE", ("1",), "abc"),
    ],
)
def test_settings_of_accelerate_that_change_a_run_are_refused(
    variable: str, allowed: tuple[str, ...], refused: str
) -> None:
    for value in allowed:
        check_accelerate_variables({variable: value})
    with pytest.raises(UserError, match=f"{variable} is '{refused}'"):
        check_accelerate_variables({variable: refused})


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM", "a parallelism config"])
def test_another_kind_of_parallelism_is_refused(name: str) -> None:
    variable = f"ACCELERATE_USE_{name.removeprefix('a ').upper().replace('-', '_').replace(' ', '_')}"
    check_accelerate_variables({variable: "false"})
    with pytest.raises(UserError, match=f"accelerate is set to {name} .{variable}=true.*plain data parallelism"):
        check_accelerate_variables({variable: "true"})


def test_number_of_threads_of_openmp() -> None:
    for value, expected in (("4", "4"), ("4,3,2", "4"), ("", None), (" 2 ", "2")):
        environment = {"OMP_NUM_THREADS": value}
        check_threads(environment)
        assert environment.get("OMP_NUM_THREADS") == expected
    for value in ("abc", "-1", "4,x", "1.5"):
        with pytest.raises(UserError, match=f"OMP_NUM_THREADS is '{value}', expected a number of threads"):
            check_threads({"OMP_NUM_THREADS": value})


def test_errors_of_accelerate_are_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_NEW_OPTION", "1")
    monkeypatch.setattr(context, "Accelerator", Mock(side_effect=ImportError("NewParallel is not installed")))
    with pytest.raises(UserError, match=r"NewParallel is not installed.*ACCELERATE_NEW_OPTION"):
        init_distributed(device="cpu", precision="fp32", threads=1)


@pytest.mark.parametrize(
    ("world_size", "kind", "error"),
    [
        (1, DistributedType.NO, None),
        (2, DistributedType.NO, r"WORLD_SIZE is 2.*torchrun --nproc-per-node 2"),
        (1, DistributedType.FSDP, "FSDP"),
    ],
)
def test_another_process_group_is_refused(world_size: int, kind: DistributedType, error: str | None) -> None:
    """Under torchrun, accelerate forms no group if it is not told that the device is a CPU."""
    accelerator: Any = SimpleNamespace(num_processes=1, distributed_type=kind)
    with refused(error):
        check_process_group(accelerator, world_size)


def test_only_rank_0_continues_without_the_process_group() -> None:
    rank_0 = GROUP | {"RANK": "0", "HOME": "/"}
    assert [leave_process_group_env(variables) for variables in (dict(GROUP), rank_0, {})] == [False, True, True]
    assert rank_0 == {"HOME": "/"}

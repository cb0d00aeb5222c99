import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from trainer.distributed import context
from trainer.distributed.context import (
    _check_group,
    available_cores,
    check_equal_across_ranks,
    choose_precision,
    leave_process_group_env,
    main_process_first,
    raise_on_all_ranks,
    refuse_copies,
    refuse_launchers_settings,
    start,
)
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_on_a_cpu_all_cores_are_used_whatever_the_launcher_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as accelerate launch does
    ctx = start(device="cpu", precision="auto", threads=None)
    assert ctx.threads == torch.get_num_threads() == available_cores()
    assert (ctx.rank, ctx.world_size, ctx.is_main_process) == (0, 1, True)
    assert "CPU thread" in ctx.notes[0]
    assert ctx.precision == "fp32"
    assert "fp32" in ctx.notes[1]


def test_threads_can_be_set() -> None:
    assert start(device="cpu", precision="fp32", threads=1).threads == torch.get_num_threads() == 1


def test_the_precision_may_change_from_run_to_run_in_one_process() -> None:
    for precision, named in (("bf16", "bf16"), ("fp32", "no"), ("bf16", "bf16")):
        ctx = start(device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
        assert ctx.accelerator.mixed_precision == named


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"run\.device is cuda, but torch finds no GPU"):
        start(device="cuda", precision="auto", threads=None)


def test_fp16_on_a_cpu_is_refused_and_not_silently_fp32() -> None:
    for asked, environment in (("fp16", {}), ("auto", {"ACCELERATE_MIXED_PRECISION": "fp16"})):
        with pytest.raises(UserError, match="no fp16 training"):
            choose_precision(asked, on_cpu=True, environment=environment)  # type: ignore[arg-type]


def test_the_launchers_precision_counts_where_none_is_asked_for() -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert choose_precision("auto", on_cpu=True, environment=environment)[0] == "bf16"
    assert choose_precision("fp32", on_cpu=True, environment=environment)[0] == "fp32"
    assert (
        choose_precision("auto", on_cpu=True, environment={"ACCELERATE_MIXED_PRECISION": "no"})[0] == "fp32"
    )


def test_what_auto_chose_when_the_run_began_is_kept_and_what_is_asked_for_is_not_overruled() -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert choose_precision("auto", on_cpu=True, environment=environment, kept="fp32") == (
        "fp32",
        "as this run began with",
    )
    assert choose_precision("auto", on_cpu=True, environment={}, kept="bf16")[0] == "bf16"
    assert choose_precision("fp32", on_cpu=True, environment={}, kept="bf16")[0] == "fp32"
    assert start(device="cpu", precision="auto", threads=1, kept="bf16").precision == "bf16"


def test_a_precision_that_this_machine_lacks_is_not_kept_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no fp16 training"):
        choose_precision("auto", on_cpu=True, environment={}, kept="fp16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match="only emulate"):
        choose_precision("auto", on_cpu=False, environment={}, kept="bf16")


@pytest.mark.parametrize(("bf16", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_on_a_gpu_auto_takes_what_it_computes_in(
    bf16: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert choose_precision("auto", on_cpu=False, environment={})[0] == chosen


def test_bf16_that_a_gpu_would_only_emulate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    for asked, environment in (("bf16", {}), ("auto", {"ACCELERATE_MIXED_PRECISION": "bf16"})):
        with pytest.raises(UserError, match="only emulate"):
            choose_precision(asked, on_cpu=False, environment=environment)  # type: ignore[arg-type]


def test_a_launcher_that_says_cpu_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert start(device="auto", precision="auto", threads=1).precision == "fp32"
    with pytest.raises(UserError, match="no fp16 training"):
        start(device="auto", precision="fp16", threads=1)
    with pytest.raises(UserError, match="accelerate is told to use the CPU"):
        start(device="cuda", precision="auto", threads=1)


def test_standing_alone_is_for_the_first_of_a_group() -> None:
    group = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "HOME": "/"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert not leave_process_group_env(dict(group))
    first = group | {"RANK": "0"}
    assert leave_process_group_env(first)
    assert first == {"HOME": "/"}
    assert leave_process_group_env({})


def test_processes_that_disagree_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = start(device="cpu", precision="fp32", threads=1).accelerator
    check_equal_across_ranks(accelerator, (3, "a"), "the epoch")
    monkeypatch.setattr(context, "gather_object", lambda mine: [(3, "a"), *mine, (0, "a")])
    with pytest.raises(UserError, match="the epoch, is another on rank 2 than on rank 0"):
        check_equal_across_ranks(accelerator, (3, "a"), "the epoch")


def test_copies_by_srun_are_refused() -> None:
    with pytest.raises(UserError, match="4 tasks"):
        refuse_copies({"SLURM_STEP_NUM_TASKS": "4"})
    refuse_copies({"SLURM_STEP_NUM_TASKS": "1"})
    refuse_copies({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"})


def test_a_group_smaller_than_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As accelerate does under torchrun where it is not told that the device is a CPU.
    accelerator = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2.*torchrun --nproc-per-node 2"):
        _check_group(accelerator)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
    ],
)
def test_what_the_launcher_would_change_silently_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable} is '{value}'"):
        start(device="cpu", precision="auto", threads=None)


def test_what_accelerate_launch_sets_by_itself_is_no_offence() -> None:
    refuse_launchers_settings({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "no"})
    refuse_launchers_settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})


def test_another_kind_of_distribution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP)
    with pytest.raises(UserError, match="FSDP"):
        _check_group(accelerator)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launch_is_refused(missing: str) -> None:
    whole = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    refuse_copies(whole)
    with pytest.raises(UserError, match=f"WORLD_SIZE is 2, but {missing} is not set"):
        refuse_copies({name: value for name, value in whole.items() if name != missing})


def test_a_containers_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(context, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_cores() == 16


def test_in_turn_returns_the_result_or_raises_the_error_as_it_stands() -> None:
    accelerator = start(device="cpu", precision="fp32", threads=1).accelerator
    assert main_process_first(accelerator, lambda: 7) == 7

    def fail() -> None:
        raise UserError("three images cannot be read")

    with pytest.raises(UserError, match="three images cannot be read"):
        main_process_first(accelerator, fail)


def test_one_process_agrees_with_itself() -> None:
    ctx = start(device="cpu", precision="fp32", threads=1)
    assert ctx.all_reduce_max([3, 0, True]) == [3, 0, 1]
    assert ctx.control is None
    value = {"a": (1, 2)}
    assert ctx.broadcast(value) == value
    raise_on_all_ranks(ctx.accelerator, None)
    with pytest.raises(UserError, match="no room"):
        raise_on_all_ranks(ctx.accelerator, UserError("no room"))

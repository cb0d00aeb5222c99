from pathlib import Path

import pytest
import torch

from tests.trainer.training import make_net, make_train_step, same_tensors
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.optim import micro_batch
from trainer.optim.micro_batch import extrapolate_largest, is_out_of_memory, largest_micro_batch, try_largest

MIB = 1 << 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_errors_of_a_full_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_torch_raises_such_an_error_on_the_cpu() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("local", "fitting", "expected", "tried"),
    [
        (48, 20, 16, [1, 2, 4, 8, 16, 32]),
        (48, 47, 32, [1, 2, 4, 8, 16, 32, 48]),
        (48, 48, 48, [1, 2, 4, 8, 16, 32, 48]),
        (4, 9, 4, [1, 2, 4]),
        (8, 0, 0, [1]),
    ],
)
def test_sizes_are_doubled_until_one_is_out_of_memory(
    local: int, fitting: int, expected: int, tried: list[int]
) -> None:
    sizes: list[int] = []

    def run(size: int) -> None:
        sizes.append(size)
        if size > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert (try_largest(run, local), sizes) == (expected, tried)


@pytest.mark.parametrize(
    ("local", "budget", "expected", "largest_measured"),
    [
        (1000, 1000, (1000 - 100) // 5, 8),
        (64, 1000, 64, 8),
        (3, 1000, 3, 3),
        (1, 1000, 1, 1),
        (64, 123, 4, 4),  # 8 images would need 140
        (64, 50, 1, 1),
    ],
)
def test_peak_memory_is_extrapolated_from_few_images_within_the_budget(
    local: int, budget: int, expected: int, largest_measured: int
) -> None:
    sizes: list[int] = []

    def measure(size: int) -> int:  # gradients need 100, an image 5
        sizes.append(size)
        return 100 + 5 * size

    assert extrapolate_largest(measure, local, budget, least=1) == expected
    assert sizes[-1] == largest_measured


def test_memory_that_does_not_grow_counts_with_a_least_size() -> None:
    assert extrapolate_largest(lambda size: 100, 1000, 500, least=2) == 8 + (500 - 100) // 2


@pytest.mark.parametrize(("available", "expected"), [(10_000 * MIB, 64), (100 * MIB, range(8, 40)), (0, 1)])
def test_the_largest_micro_batch_fits_in_available_memory_and_changes_nothing(
    available: int, expected: int | range, ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net(batch_norm=True, dropout=0.5).eval()
    optimizer = ctx.accelerator.prepare(torch.optim.AdamW(net.parameters()))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    monkeypatch.setattr(micro_batch, "available_memory", lambda: available)
    step = make_train_step(ctx, grad_accum_steps=2)
    size, how = largest_micro_batch(step, net, optimizer, image_size=256, local=64)
    assert size in expected if isinstance(expected, range) else size == expected, how
    assert same_tensors(net.state_dict(), before)
    assert not net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_machine_that_hides_peak_memory_needs_a_number(
    ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(micro_batch, "_RESET_PEAK", tmp_path / "nowhere" / "clear_refs")
    net = make_net()
    optimizer = ctx.accelerator.prepare(torch.optim.SGD(net.parameters()))
    with pytest.raises(UserError, match=r"set train\.micro_batch_size to a number"):
        largest_micro_batch(make_train_step(ctx), net, optimizer, image_size=8, local=4)

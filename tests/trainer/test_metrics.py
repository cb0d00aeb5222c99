from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from trainer import metrics as module
from trainer.distributed import context
from trainer.distributed.context import DistributedContext
from trainer.metrics import Meter, MetricState


class Clock:
    """Stands still, but for what a test lets pass."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def ctx() -> Iterator[DistributedContext]:
    threads = torch.get_num_threads()
    yield context.start(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


class OneOfSeveral:
    """An accelerator of `rank` among processes that have added up nothing themselves."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world_size: int) -> None:
        self.process_index, self.num_processes = rank, world_size

    def gather(self, mine: Tensor) -> Tensor:
        return mine


def update(meter: Meter, clock: Clock, step: int, loss: float, *, seconds: float = 2.0) -> None:
    clock.now += 1.0  # a batch is read
    meter.start_step()
    clock.now += seconds
    meter.end_step(step, 4, torch.tensor(loss, dtype=torch.float64), torch.tensor(3))


def test_sums_go_on_exactly(ctx: DistributedContext, clock: Clock) -> None:
    losses = [0.1, 0.2, 0.7, 1e-9, 3.3]
    whole = Meter(ctx.accelerator)
    for step, loss in enumerate(losses):
        update(whole, clock, step, loss)
    expected = whole.compute()
    first = Meter(ctx.accelerator)
    for step, loss in enumerate(losses[:2]):
        update(first, clock, step, loss)
    sums, first_nonfinite_step = first.state()
    assert first_nonfinite_step is None
    assert sums == MetricState(rows=((0.1 + 0.2, 6, 8),), seconds=6.0, compute_seconds=4.0)
    assert all(type(number) is int for number in sums.rows[0][1:])
    clock.now += 1e6  # the run stood still
    then = Meter(ctx.accelerator, sums)
    assert then.state() == (sums, None), "without an update, as after an evaluation that was interrupted"
    for step, loss in enumerate(losses[2:], start=2):
        update(then, clock, step, loss)
    assert then.compute() == expected
    assert expected.seconds == 15.0, "what lies between the two starts does not count"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_process_goes_on_from_its_own_sums_or_rank_0_from_the_whole(world_size: int) -> None:
    rows = ((0.1, 1, 2), (0.2, 2, 3), (0.4, 0, 2))
    earlier = MetricState(rows=rows, seconds=9.0, compute_seconds=4.0)
    every = [
        Meter(OneOfSeveral(rank, world_size), earlier).state()[0].rows[0]  # type: ignore[arg-type]
        for rank in range(world_size)
    ]
    if world_size == 3:
        assert tuple(every) == rows
    else:
        assert every[0] == (sum(row[0] for row in rows), 3, 7)
        assert every[1:] == [(0.0, 0, 0)] * (world_size - 1)


def test_the_first_loss_that_is_not_finite_is_told_with_the_sums(
    ctx: DistributedContext, clock: Clock
) -> None:
    meter = Meter(ctx.accelerator)
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 1.0], start=6):
        update(meter, clock, step, loss)
    assert meter.state()[1] == meter.compute().first_nonfinite_step == 7

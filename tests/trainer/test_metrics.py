from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import metrics
from trainer.distributed.context import DistributedContext
from trainer.metrics import Meter, MetricState


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the clock of the meter, which only a test moves on."""
    clock = SimpleNamespace(now=1000.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def update(meter: Meter, clock: SimpleNamespace, step: int, loss: float, *, seconds: float = 2.0) -> None:
    clock.now += 1.0  # a batch is loaded
    meter.start_step()
    clock.now += seconds
    meter.end_step(step, 4, torch.tensor(loss, dtype=torch.float64), torch.tensor(3))


def test_resumed_sums_are_exact(ctx: DistributedContext, clock: SimpleNamespace) -> None:
    losses = [0.1, 0.2, 0.7, 1e-9, 3.3]
    whole = Meter(ctx.accelerator)
    for step, loss in enumerate(losses):
        update(whole, clock, step, loss)
    expected = whole.compute()
    first = Meter(ctx.accelerator)
    for step, loss in enumerate(losses[:2]):
        update(first, clock, step, loss)
    state, first_nonfinite_step = first.state()
    assert first_nonfinite_step is None
    assert state == MetricState(rows=((0.1 + 0.2, 6, 8),), seconds=6.0, compute_seconds=4.0)
    assert all(type(number) is int for number in state.rows[0][1:])
    clock.now += 1e6  # between two starts
    resumed = Meter(ctx.accelerator, state)
    assert resumed.state() == (state, None), "without an update, as after an interrupted evaluation"
    for step, loss in enumerate(losses[2:], start=2):
        update(resumed, clock, step, loss)
    assert resumed.compute() == expected
    assert expected.seconds == 15.0, "the time between the two starts does not count"


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_each_rank_resumes_its_own_sums_or_rank_0_their_total_if_the_world_size_changed(world_size: int) -> None:
    rows = ((0.1, 1, 2), (0.2, 2, 3), (0.4, 0, 2))
    earlier = MetricState(rows=rows, seconds=9.0, compute_seconds=4.0)
    sums = []
    for rank in range(world_size):  # `gather` returns that rank's tensor alone
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, num_processes=world_size, gather=lambda tensor: tensor
        )
        sums.append(Meter(accelerator, earlier).state()[0].rows[0])
    if world_size == 3:
        assert tuple(sums) == rows
    else:
        assert sums[0] == (sum(row[0] for row in rows), 3, 7)
        assert sums[1:] == [(0.0, 0, 0)] * (world_size - 1)


def test_the_first_nonfinite_step_is_reported(ctx: DistributedContext, clock: SimpleNamespace) -> None:
    meter = Meter(ctx.accelerator)
    for step, loss in enumerate([1.0, float("inf"), float("nan"), 1.0], start=6):
        update(meter, clock, step, loss)
    assert meter.state()[1] == meter.compute().first_nonfinite_step == 7

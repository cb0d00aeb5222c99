"""Tests of the choice of precision and memory layout by measuring."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trainer.distributed.precision import Execution
from trainer.optim import autotune as autotune_module
from trainer.optim.autotune import Measurement, autotune
from trainer.optim.core_wait import CoreWait

LABELS = torch.tensor([0, 1, 0, 1])
BATCHES = tuple(
    (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + LABELS.view(4, 1, 1, 1), LABELS)
    for seed in range(2)
)
FAST, SLOW = 1.0, 2.0
"""Seconds of a forward, on the clock of these tests."""
clock = SimpleNamespace(now=0.0)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(CoreWait, "fraction", lambda self: 0.0)


class Model(nn.Module):
    """A linear model whose speed and result depend on precision and layout."""

    def __init__(self, slow: Callable[[bool, bool], bool], change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.dropout = nn.Linear(3, 2), nn.Dropout(0.5)
        self._slow, self._change = slow, change

    def forward(self, images: Tensor) -> Tensor:
        assert self.training
        is_half = torch.is_autocast_enabled("cpu")
        is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
        seconds = SLOW if self._slow(is_half, is_channels_last) else FAST
        clock.now += seconds
        logits: Tensor = self.fc(self.dropout(images.mean(dim=(2, 3))))
        return self._change(logits) if is_half else logits


def measure(
    slow: Callable[[bool, bool], bool], change: Callable[[Tensor], Tensor] = lambda logits: logits
) -> list[Measurement]:
    torch.manual_seed(0)
    return autotune(Model(slow, change), BATCHES, batch_size=6, precisions=("fp32", "bf16"), layouts=(True, False))


@pytest.mark.parametrize(
    ("slow", "chosen"),
    [
        (lambda half, last: not half or not last, Execution("bf16", channels_last=True)),
        (lambda half, last: not half or last, Execution("bf16", channels_last=False)),
        (lambda half, last: half or not last, Execution("fp32", channels_last=True)),
        (lambda half, last: half or last, Execution("fp32", channels_last=False)),
        (lambda half, last: True, Execution("fp32", channels_last=True)),  # a small gain is not worth the rounding
    ],
)
def test_fastest_execution_is_first(slow: Callable[[bool, bool], bool], chosen: Execution) -> None:
    best, *others = measure(slow)
    assert best.execution == chosen
    # A precision that is far slower in the first layout is not measured in the other one.
    assert len({one.execution for one in others} - {chosen}) == len(others) in (2, 3)
    assert all(one.is_accurate for one in others), "dropout is turned off: its masks depend on the layout"


@pytest.mark.parametrize(("fraction", "chosen"), [(0.0, "fp32"), (1.0, "bf16")])
def test_a_short_disturbance_by_other_processes_decides_nothing(
    fraction: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreWait, "fraction", lambda self: fraction)
    in_bf16: list[bool] = []

    def slow(is_half: bool, _: bool) -> bool:
        in_bf16.extend([True] if is_half else [])
        clock.now += 10 if is_half and len(in_bf16) <= 3 else 0  # the third update is the first one that is timed
        return not is_half

    assert measure(slow)[0].execution.precision == chosen


@pytest.mark.parametrize(
    ("change", "accurate"),
    [
        (lambda logits: logits, True),
        (lambda logits: logits * 1.001, True),
        (lambda logits: -logits, False),
        (lambda logits: logits.detach(), None),
        (lambda logits: logits * torch.nan, False),
        (lambda logits: logits * torch.inf, False),
    ],
)
def test_precision_with_wrong_results_is_not_chosen(change: Callable[[Tensor], Tensor], accurate: bool | None) -> None:
    if accurate is None:  # without any gradient
        with pytest.raises(RuntimeError):
            measure(lambda half, last: not half, change)
        return
    best = measure(lambda half, last: not half, change)[0]
    assert best.execution.precision == ("bf16" if accurate else "fp32")
    assert best.is_accurate


def test_all_processes_decide_by_the_slowest() -> None:
    times: list[float] = []

    def maximum(value: float) -> float:
        times.append(value)
        return 4.0 if value == SLOW else value  # another process is slower still

    model = Model(lambda half, last: half, lambda logits: logits)
    best = autotune(
        model, BATCHES, batch_size=2, precisions=("fp32", "bf16"), layouts=(True,), max_across_ranks=maximum
    )
    assert [one.execution.precision for one in best] == ["fp32", "bf16"]
    assert [one.images_per_sec for one in best] == [2 / FAST, 2 / 4]
    assert set(times) >= {FAST, SLOW}, "errors are shared too"

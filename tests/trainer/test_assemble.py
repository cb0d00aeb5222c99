from typing import Any

import pytest

from trainer.assemble import make_plan
from trainer.config import Config, OptimConfig, TrainConfig
from trainer.data.loader import Order
from trainer.errors import UserError

ORDER = Order(examples=25, batch_size=10, seed=0)  # 3 steps an epoch


def plan(warmup: str) -> Any:
    return make_plan(
        Config(optim=OptimConfig(warmup=warmup, schedule="constant"), train=TrainConfig(epochs=2)),
        ORDER,
        start_epoch=0,
    )


def test_durations_become_steps_of_this_run() -> None:
    made = plan("1 epochs")
    assert made.batch_sizes == (10, 10, 5)
    assert [made.lr_factor(step) for step in range(6)] == [
        pytest.approx((step + 1) / 3) for step in range(3)
    ] + [1.0] * 3


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    assert plan("6 steps").lr_factor(5) == 1
    for warmup in ("7 steps", "100 epochs"):
        with pytest.raises(UserError, match=r"optim\.warmup .* the run has 6"):
            plan(warmup)

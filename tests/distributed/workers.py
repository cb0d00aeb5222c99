"""What the tests of several processes run in each of them: `workers.py NAME OUT`."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from trainer import runtime
from trainer.errors import UserError
from trainer.main import leave


def in_turn(machine: runtime.Runtime, out: Path) -> dict[str, Any]:
    """Rank 0 makes, the others find."""
    made = out.with_name("made")

    def make() -> bool:
        found = made.exists()
        made.touch()
        return found

    return {"found": runtime.in_turn(machine.accelerator, make)}


def error_of_one(machine: runtime.Runtime, out: Path) -> dict[str, Any]:
    """One process fails, each in its turn."""
    said = []
    for failing in range(machine.world):

        def fail(failing: int = failing) -> None:
            if machine.rank == failing:
                raise UserError(f"rank {failing} has failed")

        try:
            runtime.in_turn(machine.accelerator, fail)
        except UserError as error:
            said.append(str(error))
    return {"said": said}


def statistics(machine: runtime.Runtime, out: Path) -> dict[str, Any]:
    """Average BatchNorm's statistics; a frozen layer's stay."""
    import torch
    from torch import nn

    from trainer.model.batch_norm import average_statistics, freeze_batch_norm

    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(3), nn.BatchNorm2d(1))
    freeze_batch_norm(model[2])
    for number, layer in enumerate(model):
        layer.running_mean.fill_(10.0 * machine.rank + number)
        layer.running_var.fill_(1.0 + machine.rank)
    average_statistics(model, machine.world)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    return {
        "mean": [layer.running_mean.tolist() for layer in model],
        "var": [layer.running_var.tolist() for layer in model],
    }


def evaluation(machine: runtime.Runtime, out: Path) -> dict[str, Any]:
    """Evaluate 7 examples, so that shares are unequal, and with 5 processes one would be alone."""
    from functools import partial

    import torch
    from torch import nn

    from trainer.data.loader import Slices
    from trainer.evaluate import evaluate

    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator)
    slices = Slices(7, batch_size=2, rank=machine.rank, world=machine.world)
    batches = [
        (logits[where], labels[where], torch.tensor(where))
        for where in ([draw.example for draw in draws] for draws in slices)
    ]
    found = evaluate(
        nn.Identity(),
        batches,
        classes=3,
        expected=7,
        normalise=lambda images: images,
        reduce=partial(machine.accelerator.reduce, reduction="sum"),
        device=torch.device("cpu"),
    )
    return {
        "correct": list(found.correct),
        "support": list(found.support),
        "loss": found.loss,
        "mine": [draw.example for draws in slices for draw in draws],
    }


WORKERS: dict[str, Callable[[runtime.Runtime, Path], dict[str, Any]]] = {
    worker.__name__: worker for worker in (in_turn, error_of_one, statistics, evaluation)
}


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    machine = runtime.start(device="cpu", precision="fp32", threads=1)
    found = WORKERS[name](machine, out)
    out.with_name(f"{name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    runtime.shut_down()
    leave(0)


if __name__ == "__main__":
    main()

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.trainer.training import (
    SCHEDULE,
    Batches,
    RecordingCheckpoints,
    RecordingLogger,
    make_net,
    make_state,
    make_train_step,
    normalize,
    run_fit,
    same_tensors,
)
from trainer import loop
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Evaluations, Interrupted
from trainer.loop import StepDecision
from trainer.metrics import MetricState, Progress
from trainer.optim.train_step import LocalBatch

SAVE = StepDecision(save=True, stop=None)
STOP = StepDecision(save=False, stop="SIGTERM")


def nan_at(nan_step: int) -> Callable[[int, LocalBatch], LocalBatch]:
    """Return a change of the batches after which the loss of one step is NaN."""

    def change(step: int, batch: LocalBatch) -> LocalBatch:
        images, labels, examples = batch
        return images.float() * (float("nan") if step == nan_step else 1), labels, examples

    return change


def test_progress_counts_epochs_steps_and_examples(ctx: DistributedContext) -> None:
    net, initial = make_net().eval(), make_net()
    state = make_state(net, ctx)
    checkpoints = RecordingCheckpoints(state)
    schedule = replace(SCHEDULE, lr_multiplier=lambda step: 1 / (step + 1))
    evaluated: list[bool] = []

    def evaluate(model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
        evaluated.append(model is net and net.training)
        return {}

    log = run_fit(state, make_train_step(ctx), schedule, evaluate=evaluate, checkpoints=checkpoints)
    assert evaluated == [True, True], "unwrapped; training has set train mode"
    assert log.progress == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert [(p.epoch, p.epoch_step, p.step, p.metrics.seen) for p in log.steps] == [
        (1, 1, 1, 4), (1, 2, 2, 8), (1, 3, 3, 11), (2, 1, 4, 4), (2, 2, 5, 8), (2, 3, 6, 11),
    ]  # fmt: skip
    assert [p.metrics.seen for p in log.epochs] == [11, 11]
    assert (checkpoints.epochs, checkpoints.saved) == ([1, 2], [])
    assert checkpoints.synced == [1, 2, 4, 5], "the evaluation after an epoch's last step syncs the flags itself"
    for group, lr in (("backbone", 0.05), ("head", 0.1)):
        assert [p.lr[group] for p in log.steps] == pytest.approx([lr / (step + 1) for step in range(6)])
    images, labels, _ = next(Batches())
    loss = cross_entropy(initial(normalize(images)), labels).item()
    assert log.steps[0].metrics.loss == pytest.approx(loss, rel=1e-6), "of the forward pass before the update"
    metrics = log.epochs[0].metrics
    assert 0 < metrics.compute_seconds <= metrics.seconds
    assert metrics.rate <= metrics.compute_rate


def test_a_missing_example_raises(ctx: DistributedContext) -> None:
    batches = Batches(change=lambda step, batch: tuple(part[:-1] for part in batch))  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError, match="trained on 8 examples, expected 11"):
        run_fit(make_state(make_net(), ctx), make_train_step(ctx), batches=batches)


@pytest.mark.parametrize(("nan_step", "decisions"), [(5, {}), (1, {2: SAVE}), (1, {3: STOP})])
def test_a_nonfinite_loss_is_never_saved_and_stops_with_its_first_step_and_its_files(
    nan_step: int, decisions: dict[int, StepDecision], ctx: DistributedContext
) -> None:
    """The loss is read at the ends of epochs and before it is saved only."""
    schedule = replace(SCHEDULE, batch_sizes=(4, 4, 3, 4), logs_per_epoch=1)
    state, batches = make_state(make_net(), ctx), Batches(schedule, change=nan_at(nan_step))
    checkpoints = RecordingCheckpoints(state, decisions)
    with pytest.raises(UserError) as caught:
        run_fit(state, make_train_step(ctx), schedule, batches=batches, checkpoints=checkpoints)
    epoch, batch = divmod(nan_step, 4)
    position = f"step {nan_step + 1} (epoch {epoch + 1}, batch {batch + 1})"
    for text in (position, f"epoch{epoch}-batch{batch}.jpg", "optim.lr"):
        assert text in str(caught.value)
    assert checkpoints.saved == []
    assert not decisions or checkpoints.synced[-1] == max(decisions), "it stops at once"


def test_a_model_that_diverged_in_its_last_update_is_not_saved(ctx: DistributedContext) -> None:
    # Every loss was finite; the weights after the last update are not.
    nan = {"test": Evaluation(float("nan"), (0,), (1,), (1,))}
    state = make_state(make_net(), ctx)
    checkpoints = RecordingCheckpoints(state)
    with pytest.raises(UserError, match="step 3"):
        run_fit(state, make_train_step(ctx), evaluate=lambda model, interrupted: nan, checkpoints=checkpoints)
    assert (checkpoints.epochs, checkpoints.saved) == ([], [])


def evaluate_all_tensors(model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
    """Return an evaluation that every weight and statistic changes."""
    if interrupted():
        raise Interrupted
    total = sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())
    return {"test": Evaluation(total, (1, 1), (1, 2), (2, 1))}


def reported(*logs: RecordingLogger) -> dict[str, Any]:
    """Return all that was reported, without times."""

    def without_times(progress: Progress) -> Progress:
        return replace(progress, metrics=replace(progress.metrics, seconds=0.0, compute_seconds=0.0))

    steps, epochs = (
        [without_times(progress) for log in logs for progress in getattr(log, kind)] for kind in ("steps", "epochs")
    )
    evaluations = [evaluations for log in logs for evaluations in log.evaluations]
    return {"progress": [p for log in logs for p in log.progress], "steps": steps, "epochs": epochs, "val": evaluations}


POSITIONS = [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (1, 6), (2, 6), (2, 8), (2, 9)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("position", POSITIONS, ids=lambda position: "epoch {}, step {}".format(*position))
def test_resume_from_any_position_is_bit_identical(
    position: tuple[int, int], optimizer: Any, ctx: DistributedContext
) -> None:
    """The model has dropout, BatchNorm and a moving average; a position at an epoch's end is before its evaluation."""
    schedule = replace(SCHEDULE, epochs=3, logs_per_epoch=2, lr_multiplier=lambda step: 1 / (1 + step))
    train_step = make_train_step(ctx, grad_accum_steps=2, max_grad_norm=0.5, mixup=(0.3, 1.0))

    def new_state(seed: int) -> Any:
        net = make_net(seed, batch_norm=True, dropout=0.5)
        return make_state(net, ctx, optimizer=optimizer, momentum=0.9, ema=0.9)

    uninterrupted = new_state(0)
    expected = run_fit(uninterrupted, train_step, schedule, evaluate=evaluate_all_tensors)

    epoch, step = position
    is_end_of_epoch = step == 3 * epoch
    state = new_state(0)
    checkpoints = RecordingCheckpoints(
        state, {} if is_end_of_epoch else {step: STOP}, stop_after_epoch=epoch if is_end_of_epoch else None
    )
    first = RecordingLogger()
    with pytest.raises(Stopped) as stopped:
        run_fit(state, train_step, schedule, evaluate=evaluate_all_tensors, checkpoints=checkpoints, logger=first)
    assert stopped.value.reason == "SIGTERM"
    assert stopped.value.saved == (
        f"the end of epoch {epoch} of 3" if is_end_of_epoch else f"step {step} of 9, in epoch {epoch + 1} of 3"
    )
    assert checkpoints.epochs == list(range(1, epoch + 1))
    (saved,) = checkpoints.saved
    assert (saved["epoch"], saved["step"]) == position
    assert (saved["metrics"] is None) == is_end_of_epoch

    torch.rand(17)  # the global generator must not matter
    resumed = new_state(1)
    resumed.load_state_dict(saved, where="checkpoint")
    second = run_fit(resumed, train_step, schedule, evaluate=evaluate_all_tensors)
    for name in ("model", "optimizer", "ema"):
        assert same_tensors(uninterrupted.state_dict()[name], resumed.state_dict()[name]), name
    assert reported(first, second) == reported(expected)


def test_averaged_batch_norm_statistics_are_not_averaged_again_after_a_resume(
    ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The average of three equal float32 values need not be that value: (x + x + x) / 3 is rounded twice.
    x = torch.tensor(1.3333337306976318)
    assert (x + x + x) / 3 != x
    averaged: list[int] = []
    monkeypatch.setattr(loop, "average_batch_norm_statistics", lambda model, world_size: averaged.append(world_size))
    for step, seen, expected in ((6, 11, []), (5, 8, [1])):
        state = make_state(make_net(), ctx)
        state.epoch, state.step = 1, step
        state.metrics = MetricState(rows=((1.0, 1, seen),), seconds=1.0, compute_seconds=1.0)
        run_fit(state, make_train_step(ctx))
        assert averaged == expected


def test_a_save_continues_and_a_stop_saves_once(ctx: DistributedContext) -> None:
    state = make_state(make_net(), ctx)
    decisions = {2: SAVE, 4: StepDecision(save=True, stop="the file STOP")}
    checkpoints = RecordingCheckpoints(state, decisions)
    log = RecordingLogger()
    with pytest.raises(Stopped, match="the file STOP"):
        run_fit(state, make_train_step(ctx), checkpoints=checkpoints, logger=log)
    assert [(saved["epoch"], saved["step"]) for saved in checkpoints.saved] == [(0, 2), (1, 4)]
    for saved, progress in zip(checkpoints.saved, (log.steps[1], log.steps[3]), strict=True):
        metrics = progress.metrics
        assert saved["metrics"].rows == ((metrics.loss_sum, metrics.correct, metrics.seen),)


@pytest.mark.parametrize(("stop", "stop_early"), [(2, None), (1, 1)], ids=["a stop at the end", "early stopping"])
def test_a_finished_run_does_not_raise(stop: int, stop_early: int | None, ctx: DistributedContext) -> None:
    state = make_state(make_net(), ctx)
    checkpoints = RecordingCheckpoints(state, stop_after_epoch=stop, stop_early_after_epoch=stop_early)
    assert len(run_fit(state, make_train_step(ctx), checkpoints=checkpoints).epochs) == stop


def test_curves_are_drawn_after_the_epoch_is_saved(ctx: DistributedContext) -> None:
    state, log = make_state(make_net(), ctx), RecordingLogger()

    class Checking(RecordingCheckpoints):
        def end_epoch(self, evaluations: Evaluations) -> str | None:
            assert len(log.drawn_epochs) == len(log.epochs) - 1
            return super().end_epoch(evaluations)

    run_fit(state, make_train_step(ctx), checkpoints=Checking(state), logger=log)
    assert log.drawn_epochs == list(range(1, len(log.epochs))), "closing the logger draws the last epoch"

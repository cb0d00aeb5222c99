"""Resume: find the newest checkpoint of a run, check that it belongs to the run, and restore it."""

from collections.abc import Callable, Sequence

from regraft.contract import ATTEMPTS, CHECKPOINTS, METRICS, MODEL
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.state import RunMetadata
from trainer.checkpoint.store import LoadedCheckpoint
from trainer.errors import UserError
from trainer.optim.schedule import TrainSchedule
from trainer.report.metrics import Row, epoch_rows, parse_rows, restore_metrics
from trainer.run.atomic import remove_leftovers
from trainer.run.folder import OUR_FILES, archive_results, check_resumable, check_visible, write_config
from trainer.run.session import OpenRun
from trainer.state import TrainState
from trainer.text import escape_unprintable


class ResumePoint:
    """The newest checkpoint of a run, if there is one; the same on every rank."""

    def __init__(
        self,
        run: OpenRun,
        schedule: TrainSchedule,
        *,
        metadata: RunMetadata,
        early_stopping: EarlyStopping,
        config: str,
        order_digest: Callable[[int], str],
    ) -> None:
        """Find and check the newest checkpoint, and write the run's config. Every process must call it.

        Args:
            run: the open run folder.
            schedule: the updates of the run.
            metadata: what the checkpoints of this start say about the run.
            early_stopping: decides whether the run has stopped early.
            config: the resolved config as YAML, with `run.resume auto`.
            order_digest: epoch, from 0 -> SHA-256 of the order of its examples.

        Raises:
            UserError: the newest checkpoint belongs to another run, or the folder cannot be read or written.

        """
        self._run, self._schedule, self._metadata, self._early_stopping = (run, schedule, metadata, early_stopping)
        self._order_digest = order_digest
        self.checkpoint: LoadedCheckpoint | None = run.ctx.broadcast(
            run.ctx.main_process_first(lambda: self._find(config))
        )
        """The newest checkpoint; None if the run starts anew."""

    def _find(self, config: str) -> LoadedCheckpoint | None:
        folder, checkpoints = self._run.folder, self._run.folder / CHECKPOINTS
        if not self._run.ctx.is_main_process:
            check_visible(folder)
            return None  # every rank uses rank 0's checkpoint
        if folder != self._run.root:  # `open_run` has checked the run folder itself
            check_resumable(folder, config, resume="auto")
        try:
            store.clean_up(checkpoints)
            for name in OUR_FILES:
                remove_leftovers(folder, name)
            remove_leftovers(folder / ATTEMPTS, "*")
            checkpoint = store.load_latest(checkpoints, log=self._run.console.print)
            if checkpoint is not None:
                self._check(checkpoint)
            elif (message := archive_results(folder)) is not None:
                self._run.console.print(message)
            write_config(folder, config)  # last: a start that is refused does not change the config
        except OSError as error:
            raise UserError(
                f"{checkpoints}: cannot be read or cleaned up ({error}); fix that, or choose another run.dir"
            ) from None
        return checkpoint

    def _check(self, checkpoint: LoadedCheckpoint) -> None:
        """Raise a UserError for a checkpoint of another run, or a finished run without its model file."""
        state, current, path = checkpoint.state, self._metadata, checkpoint.path
        saved = state.run
        saved.identity.check_same(current.identity, str(path))
        if saved.seed != current.seed or state.order_digest != self._order_digest(state.epoch):
            raise UserError(
                f"{path}: the examples are drawn in another order than when it was written, by torch "
                f"{escape_unprintable(saved.versions.get('torch', '?'))}: resume with that version, or start anew with "
                "--run.resume never, which archives the run"
            )
        if state.epoch > self._schedule.epochs or saved.steps_per_epoch != self._schedule.steps_per_epoch:
            raise UserError(
                f"{path}: after {state.epoch} epochs of {saved.steps_per_epoch} steps, but this run has "
                f"{self._schedule.epochs} of {self._schedule.steps_per_epoch}: choose another run.dir, or --run.resume "
                "never"
            )
        model = self._run.folder / MODEL
        if not model.exists() and self._is_finished(checkpoint):
            raise UserError(
                f"{model} is gone, and the run is finished. Restore that file, or --run.resume never, which archives "
                "the run"
            )

    @property
    def is_finished(self) -> bool:
        """Return whether the run is finished: its last epoch is done, or early stopping has ended it.

        Raises:
            UserError: the checkpoint's metrics are damaged.

        """
        return self.checkpoint is not None and self._is_finished(self.checkpoint)

    def _is_finished(self, checkpoint: LoadedCheckpoint) -> bool:
        state = checkpoint.state
        if state.epoch == self._schedule.epochs:
            return True
        if self._early_stopping.patience is None or state.metrics is not None:
            return False
        return self._early_stopping.should_stop(_epochs(checkpoint))

    def finish(self) -> tuple[Row, ...]:
        """Print that the run is finished, restore its metrics.jsonl, and return the rows of its epochs."""
        assert self.checkpoint is not None  # for mypy: the caller has checked `is_finished`
        checkpoint, run = self.checkpoint, self._run
        state, rows = checkpoint.state, _epochs(checkpoint)
        if state.epoch < self._schedule.epochs:
            run.console.print(f"finished already: {self.describe_early_stop(rows)}")
        else:
            run.console.print(
                f"finished already, after epoch {state.epoch}: nothing to train. A larger train.epochs resumes from "
                "here; --run.resume never starts anew"
            )

        def restore() -> None:
            if run.lock is not None:
                end = {"step": state.step, "steps": state.step, "epoch": state.epoch, "epochs": state.epoch}
                run.lock.update(**end)
                restore_metrics(run.folder / METRICS, checkpoint.metrics)

        run.ctx.main_process_first(restore)
        return tuple(rows)

    def describe_early_stop(self, rows: Sequence[Row]) -> str:
        """Return why training ended before its last epoch; empty on ranks without metrics."""
        if not rows:
            return ""
        return (
            f"stopped early, after epoch {rows[-1]['epoch']} of {self._schedule.epochs}: none of the last "
            f"{self._early_stopping.patience} was better on {self._early_stopping.split} than epoch "
            f"{self._early_stopping.best_row(rows)['epoch']}. A larger regularization.early_stopping resumes "
            "from here"
        )

    def restore(self, state: TrainState) -> None:
        """Restore the state from the checkpoint, if there is one. Every process must call it.

        Parameters that trained when the checkpoint was written must require gradients.

        Raises:
            UserError: the checkpoint does not fit the model or the optimizer.

        """
        if self.checkpoint is None:
            return
        ctx, error = self._run.ctx, None
        try:
            state.load_state_dict(self.checkpoint.state_dict(), where=str(self.checkpoint.path))
            statistics = self.checkpoint.batch_norm_statistics()
            state.restore_batch_norm_statistics(statistics, rank=ctx.rank, world_size=ctx.world_size)
        except UserError as caught:
            error = caught
        ctx.raise_on_all_ranks(error)

    def describe(self, *, batch_norm: str) -> str:
        """Return where the run resumes, and what has changed since the checkpoint was written.

        `batch_norm` is the option transfer.batch_norm.
        """
        assert self.checkpoint is not None  # for mypy: the caller has checked it
        state, current, steps = self.checkpoint.state, self._metadata, self._schedule.steps_per_epoch
        saved = state.run
        epoch_step = state.step - state.epoch * steps
        position = f", in epoch {state.epoch + 1} after {epoch_step} of its {steps} steps" if epoch_step else ""
        lines = [f"resuming after epoch {state.epoch} of {self._schedule.epochs} (step {state.step}){position}"]
        if saved.world_size != current.world_size:
            is_local = batch_norm in ("train", "frozen-with-weights")
            exception = ", and BatchNorm, whose statistics are each process's own" if is_local else ""
            lines.append(
                f"  on {current.world_size} processes instead of {saved.world_size}: the same examples, crops and "
                f"learning rates; equal except for the order of sums and the masks of dropout{exception}"
            )
        total = saved.schedule.get("total_steps")
        if total != self._schedule.total_steps:
            lines.append(
                f"  for {self._schedule.total_steps} steps instead of {escape_unprintable(str(total))}: from here on, "
                "the learning rate is that of the longer run"
            )
        changed = [
            f"{name} {escape_unprintable(version)} then, {current.versions[name]} now"
            for name, version in saved.versions.items()
            if name in current.versions and current.versions[name] != version
        ]
        if changed:
            lines.append(f"  with other versions, which may change results: {', '.join(changed)}")
        return "\n".join(lines)


def _epochs(checkpoint: LoadedCheckpoint) -> list[Row]:
    return epoch_rows(parse_rows(checkpoint.metrics, str(checkpoint.path)))

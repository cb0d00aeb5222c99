"""Resume: find the newest checkpoint of this run, check that it belongs to the run, and restore it."""

from pathlib import Path

from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.state import CheckpointState, RunMetadata
from trainer.checkpoint.store import LoadedCheckpoint
from trainer.errors import UserError
from trainer.optim.schedule import TrainSchedule
from trainer.report.metrics import epoch_rows, parse_rows
from trainer.run.atomic import remove_leftovers
from trainer.run.folder import (
    ATTEMPTS,
    CHECKPOINTS,
    MODEL,
    OUR_FILES,
    archive_results,
    check_resumable,
    check_visible,
    write_config,
)
from trainer.run.session import OpenRun
from trainer.run.versions import versions
from trainer.state import TrainState
from trainer.text import escape_unprintable


def load_latest_checkpoint(
    run: OpenRun,
    config: str,
    metadata: RunMetadata,
    schedule: TrainSchedule,
    early_stopping: EarlyStopping,
    *,
    order_digest: str | None = None,
) -> LoadedCheckpoint | None:
    raise NotImplementedError

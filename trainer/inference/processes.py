"""Predict with several processes, each of which takes every n-th image."""

import multiprocessing
import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from regraft.startup_signals import blocked_signals
from trainer.data.workers import init_worker
from trainer.distributed.allocator import keep_freed_memory
from trainer.errors import UserError
from trainer.inference.answers import AnswerOptions
from trainer.inference.file_logits import BatchOptions, FileLogits
from trainer.inference.predictor import make_predictor
from trainer.inference.rows import Row
from trainer.inference.stream import FilePredictor
from trainer.model.file import load

_SECONDS_BETWEEN_CHECKS = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What each process needs to predict its images."""

    model: Path
    """The model file."""
    device: torch.device
    """A GPU without an index stands for all GPUs, which the processes share."""
    options: AnswerOptions
    batches: BatchOptions
    """Of each process."""

    def file_predictor(self, rank: int = 0) -> FilePredictor:
        """Load the model on this process's device.

        Raises:
            UserError: the model cannot be loaded.

        """
        device = self.device
        if device.type == "cpu":
            torch.set_num_threads(1)  # each thread of FileLogits computes its own batch
            keep_freed_memory(os.environ)
        elif device.index is None:
            device = torch.device(device.type, rank % torch.cuda.device_count())
        loaded = load(self.model)
        predictor = make_predictor(loaded, device, warn=_warn if rank == 0 else lambda _: None)
        logits = FileLogits(predictor, loaded.metadata, self.batches, tta=self.options.tta)
        return FilePredictor(logits, loaded.metadata.classes, self.options)


def predict_files(job: Job, paths: Sequence[str], *, num_processes: int) -> Generator[list[Row], None, None]:
    """Load the model, and return a generator of the rows of each batch.

    Rows of several processes, each of which loads the model, come in any order, with empty lists between them.

    Raises:
        UserError: the model cannot be loaded, or a process has ended.

    """
    return job.file_predictor()(paths) if num_processes == 1 else _predict_in_processes(job, paths, num_processes)


def _predict_in_processes(job: Job, paths: Sequence[str], num_processes: int) -> Generator[list[Row], None, None]:
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # otherwise the first start does it, and unblocks signals
    processes: dict[Connection, Any] = {}
    try:
        for rank in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, rank, paths[rank::num_processes], sender), daemon=True)
            with blocked_signals():  # an interrupt would be a traceback of the imports before `init_worker`
                process.start()
            sender.close()
            processes[receiver] = process
        running = dict(processes)
        while running:
            for connection in wait([*running], timeout=_SECONDS_BETWEEN_CHECKS):
                assert isinstance(connection, Connection)  # for mypy
                try:
                    result = connection.recv()
                except EOFError:
                    _check_exit(running.pop(connection))
                    continue
                if isinstance(result, UserError):
                    raise result
                yield result
            yield []  # the caller looks for signals
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _check_exit(process: Any) -> None:
    process.join()
    if process.exitcode:
        reason = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        raise UserError(
            f"one of the processes has ended ({reason}), maybe for lack of memory: choose a smaller --nproc. With "
            "--output, the same command goes on"
        )


def _work(job: Job, rank: int, paths: Sequence[str], sender: Connection) -> None:
    init_worker(rank, low_priority=False)
    try:
        for rows in job.file_predictor(rank)(paths):
            sender.send(rows)
    except UserError as error:
        sender.send(error)
    except BrokenPipeError:  # the command was killed, and its end has not reached this process yet
        os._exit(1)

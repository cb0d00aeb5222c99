"""Write a run folder with the writers of a run, without training: any number of classes, images and names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from regraft.contract import (
    CONFIG,
    CONFIG_HEADER,
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    PREDICTIONS,
    AttemptRecord,
    attempt_path,
)
from tests.folders import noise_image
from trainer.evaluation.calibration import calibrated_metrics
from trainer.evaluation.predictions import Predictions, write_predictions
from trainer.evaluation.report import make_report, to_json
from trainer.metrics import Metrics, Progress
from trainer.report.metrics import class_rows, epoch_row, start_row, train_row

STEPS = 4


def random_predictions(classes: int, examples: int, *, seed: int = 0, skill: float = 2.0) -> Predictions:
    """Return predictions of random logits, in which the label's is greater by `skill` on average."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(examples) % classes
    logits = torch.randn(examples, classes, generator=random)
    logits[torch.arange(examples), labels] += skill
    return Predictions(logits, labels)


def write_run(
    folder: Path,
    classes: Sequence[str],
    *,
    examples: int = 60,
    epochs: int = 3,
    finished: bool = True,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    images: Sequence[str] = (),
) -> Path:
    """Write a run folder, and return it.

    Args:
        folder: the run folder.
        classes: names of the classes.
        examples: number of test images.
        epochs: number of complete epochs.
        finished: whether the final evaluation is there.
        seed: of the predictions.
        options: of config.yaml, besides a few.
        images: names of the first test images, which are written below `folder/../images`; the others are missing.

    """
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    evaluation = None
    for epoch in range(1, epochs + 1):
        predictions = random_predictions(len(classes), examples, seed=seed, skill=0.8 * epoch)
        evaluation = {"test": predictions.evaluation()}
        if epoch == 1:
            rows.append(start_row(evaluation, 1.5))
        for step in range(1, STEPS + 1):
            metrics = Metrics(
                loss_sum=100 / (epoch + step / STEPS), correct=60 + 5 * epoch, seen=100, seconds=10.0,
                compute_seconds=7.0, first_nonfinite_step=None,
            )  # fmt: skip
            progress = Progress(
                epoch=epoch, epoch_step=step, step=(epoch - 1) * STEPS + step, metrics=metrics,
                lr={"backbone": 1e-4 / epoch, "head": 1e-3 / epoch},
            )  # fmt: skip
            rows.append(train_row(progress, STEPS, 1 << 30))
        rows.append(epoch_row(progress, evaluation, evaluation_seconds=2.0, memory=1 << 30))
        rows += class_rows(progress, evaluation, classes)
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "run": {"dir": str(folder)},
        "data": {"root": str(folder.parent / "data"), "image_size": 224, "augment": "basic"},
        "model": {"name": "resnet18", "head_init": "linear-probe"},
        "train": {"epochs": epochs if finished else epochs + 2, "batch_size": 32},
        **(options or {}),
    }
    (folder / CONFIG).write_text(CONFIG_HEADER + json.dumps(config), encoding="utf-8")
    if finished:
        report = make_report(predictions, classes)
        paths = [str(folder.parent / "images" / f"{number}.png") for number in range(examples)]
        (folder.parent / "images").mkdir(exist_ok=True)
        wrong = (~predictions.correct).nonzero().flatten().tolist()
        for number, name in zip(wrong, images, strict=False):
            paths[number] = str(folder.parent / "images" / name)
            if not Path(paths[number]).exists():
                noise_image(number, size=(320, 240)).save(paths[number], "PNG")
        write_predictions(folder / PREDICTIONS, {"test": (paths, predictions)}, classes)
        calibrated = {"test": asdict(calibrated_metrics(predictions, 1.2))}
        fields = {"epoch": epochs, "temperature": 1.2, "calibrated": calibrated}
        (folder / EVALUATION).write_text(to_json({**fields, "splits": {"test": report.to_fields()}}), encoding="utf-8")
    record = AttemptRecord(
        attempt=1, state="done" if finished else "running", began="2026-01-01T10:00:00+00:00",
        training_began="2026-01-01T10:00:08+00:00",
        ended="2026-01-01T10:01:00+00:00" if finished else None, host="node", pid=1, started=1, pid_namespace="x",
        lease_id="y",
    )  # fmt: skip
    attempt_path(folder, 1).parent.mkdir()
    attempt_path(folder, 1).write_text(record.to_json())
    environment = {
        "argv": ["python", "trainer/main.py", "--data.root", "a <b>"], "working_folder": str(folder.parent),
        "hosts": [{"host": "node", "cpu": "a CPU", "usable_cores": 8, "ranks": [0], "gpus": [], "platform": "Linux"}],
        "git": {"commit": "0123abc", "dirty": True}, "versions": {"torch": "2.11"},
    }  # fmt: skip
    (folder / ENVIRONMENT).mkdir()
    (folder / ENVIRONMENT / "0001.json").write_text(json.dumps(environment))
    return folder

"""regraft, by its command line; `--precision default` takes its default settings."""

import json
import os
from pathlib import Path

import trainer.pipeline  # noqa: F401 (imported here, so that its time is not counted as that of training)
from benchmarks.peers.common import Recorder, Settings, read_settings
from trainer.main import main as train

TRAINABLE = {"all": "all", "last": "layer4", "head": "head"}


def options_of(settings: Settings, folder: Path) -> dict[str, object]:
    """Return the options of regraft that make the same updates as the other programs."""
    options: dict[str, object] = {
        "run.dir": folder,
        "run.seed": settings.seed,
        "run.threads": settings.threads,
        "data.root": settings.data_root,
        "model.weights": settings.weights or "null",
    }
    if settings.config is not None:
        return {"config": settings.config, **options}
    options |= {
        "data.augment": "none" if settings.fixed_views else "basic",
        "model.name": settings.model,
        "transfer.trainable": TRAINABLE[settings.trainable],
        "optim.lr": settings.lr,
        "optim.weight_decay": 1e-3,
        "optim.momentum": 0.0,
        "optim.schedule": "constant",
        "optim.loss_reduction": settings.reduction,
        "train.epochs": settings.epochs,
        "train.batch_size": settings.batch_size,
        "checkpoint.every": "null",
        "checkpoint.keep_best": "false",
    }
    if settings.precision != "default":
        options["train.precision"] = settings.precision
    if settings.layout != "default":
        options["train.channels_last"] = str(settings.layout == "channels_last").lower()
    return options


def main() -> None:
    """Train, and record the epochs that metrics.jsonl tells."""
    settings = read_settings()
    folder = settings.record.parent / "run"
    words = [f"--{key}={value}" for key, value in options_of(settings, folder).items()]
    code = train([*words, *(f"--{option}" for option in settings.extra)])
    if code:
        raise SystemExit(code)
    if os.environ.get("RANK", "0") != "0":
        return
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epochs = [
        {"images": row["train_seen"], "seconds": row["seconds"], "accuracy": row["test_accuracy"]}
        for row in rows
        if row["kind"] == "epoch"
    ]
    Recorder(settings).write(epochs)


if __name__ == "__main__":
    main()

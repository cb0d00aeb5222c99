"""regraft, by its command line; `--precision default` takes its default settings."""

import json

from benchmarks.peers.common import Recorder, read_settings
from trainer.main import main as train

TRAINABLE = {"all": "all", "last": "layer4", "head": "head"}


def main() -> None:
    """Train, and record the epochs that metrics.jsonl tells."""
    settings = read_settings()
    folder = settings.record.parent / "run"
    options: dict[str, object] = {
        "run.dir": folder,
        "run.threads": settings.threads,
        "data.root": settings.data_root,
        "data.augment": "none" if settings.fixed_views else "basic",
        "model.name": settings.model,
        "model.weights": settings.weights or "null",
        "transfer.trainable": TRAINABLE[settings.trainable],
        "optim.lr": settings.lr,
        "optim.weight_decay": 1e-3,
        "train.epochs": settings.epochs,
        "train.batch_size": settings.batch_size,
        "checkpoint.every": "null",
        "checkpoint.keep_best": "false",
    }
    if settings.precision != "default":
        options["train.precision"] = settings.precision
    code = train([f"--{key}={value}" for key, value in options.items()])
    if code:
        raise SystemExit(code)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epochs = [
        {"images": row["train_seen"], "seconds": row["seconds"], "accuracy": row["test_accuracy"]}
        for row in rows
        if row["kind"] == "epoch"
    ]
    Recorder(settings).write(epochs)


if __name__ == "__main__":
    main()

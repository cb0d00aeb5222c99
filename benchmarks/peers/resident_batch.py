"""The model alone: repeated updates on one batch in memory, without any input. The upper limit of training speed."""

from benchmarks.peers.common import Recorder, read_settings
from benchmarks.resident import make_update


def main() -> None:
    """Train as many images per epoch as there are in the training folder."""
    settings = read_settings()
    images = sum(1 for path in (settings.data_root / "train").rglob("*") if path.is_file())
    update = make_update(
        settings.model,
        batch_size=settings.batch_size,
        bf16=settings.precision == "bf16",
        memory_format=settings.memory_format,
    )
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        recorder.start_epoch()
        updates = max(1, images // settings.batch_size)
        for _ in range(updates):
            update()
        recorder.end_training(updates * settings.batch_size)
        recorder.end_epoch(float("nan"))


if __name__ == "__main__":
    main()

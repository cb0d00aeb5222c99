"""timm's data pipeline and model in a plain loop, tuned as its documentation says for training.

bf16 autocast and channels_last (`--amp --amp-dtype bfloat16 --channels-last`), and its uint8 prefetching loader;
`--precision fp32` trains without autocast. timm's own `train.py` is not part of its wheel; this is the same loader,
model, loss and update without its logging. It augments as the other programs do: color jitter, which is on by default
in timm, is off.
"""

from dataclasses import replace

import timm
from timm.data import create_dataset, create_loader

from benchmarks.peers.common import (
    MEAN,
    STD,
    Recorder,
    accuracy,
    load_weights,
    read_settings,
    recipe_optimizer,
    select_parameters,
)

NAMES = {"mobilenet_v3_small": "mobilenetv3_small_100", "squeezenet1_1": None}
"""torchvision's name -> timm's; None: timm has no such model."""


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    if settings.precision == "default":
        settings = replace(settings, precision="bf16")
    name = NAMES.get(settings.model, settings.model)
    if name is None:
        raise SystemExit(f"timm has no {settings.model}")
    splits = {
        part: create_dataset("", root=str(settings.data_root), split=part, is_training=part == "train")
        for part in ("train", "val")
    }
    classes = len(splits["train"].reader.class_to_idx)
    model = timm.create_model(name, num_classes=classes)
    load_weights(model, settings)
    model.to(settings.device, memory_format=settings.memory_format)
    shared = {
        "input_size": (3, 224, 224), "batch_size": settings.batch_size, "mean": MEAN, "std": STD,
        "num_workers": settings.workers, "device": settings.device, "use_prefetcher": True,
        "persistent_workers": settings.workers > 0, "pin_memory": settings.device.type == "cuda",
    }  # fmt: skip
    train_batches = create_loader(
        splits["train"], is_training=True, no_aug=settings.fixed_views, color_jitter=None, **shared
    )
    val_batches = create_loader(splits["val"], is_training=False, crop_pct=0.875, **shared)
    optimizer = recipe_optimizer(settings, *select_parameters(model, settings))
    loss_of = settings.criterion
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        model.train()
        seen = 0
        recorder.start_epoch()
        for images, labels in train_batches:
            with settings.autocast:
                loss = loss_of(model(images.contiguous(memory_format=settings.memory_format)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(labels)
        recorder.end_training(seen)
        model.eval()
        with settings.autocast:
            recorder.end_epoch(accuracy(model, val_batches, settings))


if __name__ == "__main__":
    main()

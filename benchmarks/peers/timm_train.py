"""timm's data pipeline, model and optimizer in a plain loop, tuned as its documentation says for training.

bf16 autocast, channels_last and its uint8 prefetching loader; `--precision fp32` trains without autocast. timm's own
`train.py` is not part of its wheel; this is the same loader, model, loss and update without its logging.
"""

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch import nn

from benchmarks.peers.common import MEAN, STD, Recorder, accuracy, read_settings, select_parameters

NAMES = {"mobilenet_v3_small": "mobilenetv3_small_100", "squeezenet1_1": None}
"""torchvision's name -> timm's; None: timm has no such model."""


def main() -> None:
    """Train and evaluate."""
    settings = read_settings()
    name = NAMES.get(settings.model, settings.model)
    if name is None:
        raise SystemExit(f"timm has no {settings.model}")
    splits = {
        part: create_dataset("", root=str(settings.data_root), split=part, is_training=part == "train")
        for part in ("train", "val")
    }
    classes = len(splits["train"].reader.class_to_idx)
    model = timm.create_model(name, num_classes=classes).to(settings.device, memory_format=torch.channels_last)
    select_parameters(model, settings)
    use_bf16 = settings.precision != "fp32"
    autocast = torch.autocast(settings.device.type, torch.bfloat16, enabled=use_bf16)
    shared = {
        "input_size": (3, 224, 224), "batch_size": settings.batch_size, "mean": MEAN, "std": STD,
        "num_workers": settings.workers, "device": settings.device, "use_prefetcher": True,
        "persistent_workers": settings.workers > 0, "pin_memory": settings.device.type == "cuda",
    }  # fmt: skip
    train_batches = create_loader(splits["train"], is_training=True, no_aug=settings.fixed_views, **shared)
    val_batches = create_loader(splits["val"], is_training=False, crop_pct=0.875, **shared)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=settings.lr, weight_decay=1e-3, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()
    recorder = Recorder(settings)
    for _ in range(settings.epochs):
        model.train()
        seen = 0
        recorder.start_epoch()
        for images, labels in train_batches:
            with autocast:
                loss = loss_of(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(labels)
        recorder.end_training(seen)
        model.eval()
        with autocast:
            recorder.end_epoch(accuracy(model, val_batches, settings))


if __name__ == "__main__":
    main()

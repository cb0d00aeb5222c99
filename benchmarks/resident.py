"""The model alone: images per second of training on one batch in memory, in plain torch.

    python -m benchmarks resident --precision bf16

It is the upper limit of a machine's training throughput. Nothing of regraft is used.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torchvision import models


def make_update(
    model_name: str,
    *,
    batch_size: int,
    bf16: bool,
    memory_format: torch.memory_format = torch.channels_last,
    image_size: int = 224,
    classes: int = 2,
) -> Callable[[], None]:
    """Return a function that makes one update on the resident batch, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.get_model(model_name, num_classes=classes)
    model.to(device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, weight_decay=1e-4)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=memory_format)
    labels = torch.randint(classes, (batch_size,), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def update() -> None:
        with autocast:
            logits = model(images)
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--warmup", type=int, default=2, help="number of updates that are not counted")
    parser.add_argument("--updates", type=int, default=8)


def main(arguments: argparse.Namespace) -> None:
    """Measure and print the throughput."""
    torch.set_num_threads(arguments.threads)
    update = make_update(
        arguments.model,
        batch_size=arguments.batch_size,
        bf16=arguments.precision == "bf16",
        image_size=arguments.image_size,
        classes=arguments.classes,
    )

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(arguments.warmup):
        update()
    wait()
    began = time.perf_counter()
    for _ in range(arguments.updates):
        update()
    wait()
    print(arguments.updates * arguments.batch_size / (time.perf_counter() - began))

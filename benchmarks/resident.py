"""Train repeatedly on one batch in memory, in plain torch: the upper limit of a machine's training throughput.

    python benchmarks/resident.py --precision bf16

It imports nothing of regraft, and prints images per second.
"""

import argparse
import contextlib
import time

import torch
from torch.nn.functional import cross_entropy
from torchvision import models


def main() -> None:
    """Measure and print the throughput."""
    parser = argparse.ArgumentParser(description="Images per second of training on one resident batch.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="number of updates that are not counted")
    parser.add_argument("--updates", type=int, default=8)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.get_model(arguments.model, num_classes=arguments.classes)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    size = arguments.image_size
    images = torch.randn(arguments.batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(arguments.classes, (arguments.batch_size,), device=device)
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if arguments.precision == "bf16" else contextlib.nullcontext()
    )

    def update() -> None:
        with autocast:
            loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(arguments.warmup):
        update()
    wait()
    began = time.perf_counter()
    for _ in range(arguments.updates):
        update()
    wait()
    print(arguments.updates * arguments.batch_size / (time.perf_counter() - began))


if __name__ == "__main__":
    main()

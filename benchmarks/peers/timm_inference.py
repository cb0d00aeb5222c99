"""timm's inference: its dataset, prefetching loader and model in the loop of its `inference.py`, which no wheel has.

It predicts the best class of each image of a folder, and writes them as a CSV.
"""

import argparse
import csv
import json
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader

from benchmarks.peers.common import MEAN, STD


def read_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="image folder")
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--num-classes", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument(
        "--precision", choices=("fp32", "amp", "bf16"), required=True, help="amp, --amp; bf16, weights too"
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="--torchcompile")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    parser.add_argument("--record", type=Path, required=True, help="JSON to write")
    return parser.parse_args()


def main() -> None:
    """Predict."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = timm.create_model(
        arguments.model, num_classes=arguments.num_classes, checkpoint_path=str(arguments.checkpoint)
    )
    model = model.to(device=device, dtype=dtype).eval()
    if arguments.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if arguments.compile:
        model = torch.compile(model)
    autocast = torch.autocast(device.type, torch.bfloat16) if arguments.precision == "amp" else nullcontext()
    began = time.perf_counter()
    dataset = create_dataset("", root=str(arguments.data))
    loader = create_loader(
        dataset, input_size=(3, 224, 224), batch_size=arguments.batch_size, use_prefetcher=True, mean=MEAN, std=STD,
        interpolation="bilinear", crop_pct=0.875, num_workers=arguments.workers, device=device, img_dtype=dtype,
    )  # fmt: skip
    labels: list[int] = []
    scores: list[float] = []
    with torch.inference_mode():
        for images, _ in loader:
            with autocast:
                outputs = model(images)
            found, indices = outputs.softmax(-1).topk(1)
            scores += found.float().flatten().tolist()
            labels += indices.flatten().tolist()
    with arguments.output.open("w", newline="") as stream:
        csv.writer(stream).writerows(zip(dataset.filenames(absolute=True), labels, scores, strict=True))
    record = {"images": len(labels), "seconds": time.perf_counter() - began}
    arguments.record.write_text(json.dumps(record), encoding="ascii")


if __name__ == "__main__":
    main()

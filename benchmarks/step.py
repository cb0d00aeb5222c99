"""Where the time of a step goes: data wait, host to device, forward, backward, optimizer, logging and other.

    python -m benchmarks step --models resnet18 mobilenet_v3_small --precisions fp32 bf16 --output step.png
    python -m benchmarks step --options data.num_workers=2 train.channels_last=false

Trains by the command line of regraft, in a fresh process per model and precision, and measures the parts of its own
training loop from the second epoch on. Prints a table and draws it as stacked bars.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.images import write_photographs
from benchmarks.measure import REPOSITORY, cores, processor, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Mapping[str, Mapping[str, float]]
"""Model and precision -> part of a step -> milliseconds per image."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", default=["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="values of train.precision")
    parser.add_argument("--data-root", type=Path, help="image folder with train/ and val/; default: drawn photographs")
    parser.add_argument("--images", type=int, default=128, help="number of drawn training images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs; the first is not counted")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="more options of the trainer")
    parser.add_argument("--output", type=Path, default=Path("step.png"), help="picture to write")


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and draw it."""
    title = f"{processor()}, {arguments.threads} threads, batches of {arguments.batch_size}"
    print(f"{title}; {versions()}", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or write_photographs(Path(folder), train=arguments.images)
        for model in arguments.models:
            for precision in arguments.precisions:
                rows[f"{model}, {precision}"] = parts = measure(arguments, data.absolute(), model, precision)
                print(f"{model}, {precision}: {1000 / sum(parts.values()):.1f} images/s", flush=True)
    print(table(rows))
    from trainer.report.figures import write_figure  # noqa: PLC0415

    write_figure(arguments.output, partial(draw, rows, title=title), size=(9, 1.8 + 0.5 * len(rows)))
    print(f"picture: {arguments.output}")


def measure(arguments: argparse.Namespace, data: Path, model: str, precision: str) -> dict[str, float]:
    """Return the milliseconds per image of each part of a step."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        options = {
            "run.dir": Path(folder) / "run",
            "run.threads": arguments.threads,
            "data.root": data,
            "data.image_size": arguments.image_size,
            "model.name": model,
            "model.weights": "null",
            "train.precision": precision,
            "train.batch_size": arguments.batch_size,
            "train.epochs": max(2, arguments.epochs),
            "checkpoint.every": "null",
            "checkpoint.keep_best": "false",
        }
        words = [*(f"--{key}={value}" for key, value in options.items()), *(f"--{word}" for word in arguments.options)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step_times", str(record), *words],
            cwd=REPOSITORY,
            env=os.environ | {"REGRAFT_CACHE": str(Path(folder) / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{model}, {precision} failed:\n{done.stdout}{done.stderr}")
        measured = json.loads(record.read_text())
    return {part: 1000 * seconds / measured["images"] for part, seconds in measured["seconds"].items()}


def table(rows: Rows) -> str:
    """Return milliseconds per image and the share of each part as a Markdown table."""
    parts = list(next(iter(rows.values())))
    lines = [f"| ms per image (share) | {' | '.join(parts)} | total |", "| --- " * (len(parts) + 2) + "|"]
    for label, row in rows.items():
        total = sum(row.values())
        cells = [f"{row[part]:.2f} ({row[part] / total:.1%})" for part in parts]
        lines.append(f"| {label} | {' | '.join(cells)} | {total:.2f} |")
    return "\n".join(lines)


def draw(rows: Rows, figure: "Figure", *, title: str) -> None:
    """Draw one stacked bar per row, from left to right in the order of a step."""
    colors = ("tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:green", "tab:gray")
    axes = figure.add_subplot()
    lefts = dict.fromkeys(rows, 0.0)
    widest = max(sum(row.values()) for row in rows.values())
    for part, color in zip(next(iter(rows.values())), colors, strict=True):
        widths = [row[part] for row in rows.values()]
        bars = axes.barh(list(rows), widths, left=list(lefts.values()), color=color, label=part, height=0.7)
        for bar, row in zip(bars, rows.values(), strict=True):
            if row[part] > 0.05 * widest:
                axes.text(
                    bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2,
                    f"{row[part] / sum(row.values()):.0%}", ha="center", va="center", color="white", fontsize=8,
                )  # fmt: skip
        for label, width in zip(rows, widths, strict=True):
            lefts[label] += width
    for label, row in rows.items():
        total = sum(row.values())
        axes.text(total + 0.01 * widest, label, f"{1000 / total:.0f} images/s", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * widest)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per image")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)

"""Time and memory of listing a large folder, compared with torchvision's ImageFolder.

    python -m benchmarks index --files 1000000           # the index: first and second start
    python -m benchmarks index --files 100000 --run      # also the data of a run: its second start

The data of a run are its index and splits, the validation results, the entries of the image cache, and split.csv and
images.json. The first start of a run decodes every image, the second one reads what it has cached.

The folder has one tiny image per class, with many hard links to it, so that a million files need no space. Each
measurement runs in a fresh process, in turn. Memory is the growth of the process while the result is alive.
"""

import argparse
import io
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from PIL import Image

IMAGE_FOLDER = "ImageFolder"
RUN = "regraft, second start of a run"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Cost(NamedTuple):
    """What one call took."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    """Growth of the process while the result is alive."""


def write_files(root: Path, *, files: int, classes: int) -> int:
    """Write hard links to one image per class; return the number of bytes of all paths."""
    path_bytes = 0
    for label in range(classes):
        folder = root / f"class_{label:04}"
        folder.mkdir(parents=True)
        source = folder / "image_000000.png"
        image = Image.new("RGB", (2, 1), (label % 256, label // 256, 0))
        image.putpixel((0, 0), (255, 255, 255))
        image.save(source)
        count = files // classes + (label < files % classes)
        path_bytes += count * len(str(source))
        for number in range(1, count):
            os.link(source, f"{folder}/image_{number:06}.png")
    return path_bytes


def measure(name: str, root: Path, cache: Path) -> Cost:
    """Return the cost of a call in this process; imports are not measured."""
    call = _call(name, root, cache)
    memory, cpu, start = _memory_bytes(), _cpu_seconds(), time.perf_counter()
    result = call()
    cost = Cost(time.perf_counter() - start, _cpu_seconds() - cpu, _memory_bytes() - memory)
    assert result is not None
    return cost


def _call(name: str, root: Path, cache: Path) -> Callable[[], object]:
    if name == IMAGE_FOLDER:
        from torchvision.datasets import ImageFolder  # noqa: PLC0415 (not in the processes of the others)

        return lambda: ImageFolder(str(root))
    if name == RUN:
        return _start_run(root, cache)
    from trainer.config.sections.data import DataConfig  # noqa: PLC0415
    from trainer.data.prepare import prepare  # noqa: PLC0415

    data = DataConfig(root=str(root), cache=str(cache))
    return lambda: prepare(data, workers=os.cpu_count() or 1, check=False)


def _start_run(root: Path, cache: Path) -> Callable[[], object]:
    """Return what the start of a run does with its data."""
    from rich.console import Console  # noqa: PLC0415

    from regraft.contract import IMAGES, SPLIT  # noqa: PLC0415
    from trainer.config.build_data import load_run_data  # noqa: PLC0415
    from trainer.config.parse import parse  # noqa: PLC0415
    from trainer.config.resolve import resolve  # noqa: PLC0415
    from trainer.data.digests import write_digests  # noqa: PLC0415
    from trainer.data.index import write_split  # noqa: PLC0415
    from trainer.distributed.context import init_distributed  # noqa: PLC0415

    config = resolve(parse([f"--data.root={root}", f"--data.cache={cache}", "--model.weights=null"]))
    ctx = init_distributed(device="cpu", precision="fp32", threads=None)
    run, console = cache / "run", Console(file=io.StringIO())
    run.mkdir(parents=True, exist_ok=True)

    def start() -> object:
        data = load_run_data(config, ctx, console)
        write_digests(run / IMAGES, data.prepared.digests)
        write_split(data.index, run / SPLIT)
        return data

    return start


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, help="number of classes; default: one per 1,000 files, at least 2")
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    parser.add_argument("--run", action="store_true", help="also decode every image once, then start a run again")
    parser.add_argument("--folder", help="parent of the files; default: the system's temporary folder")


def main(arguments: argparse.Namespace) -> None:
    """Measure and print the medians, and the shortest of the rounds."""
    from trainer.data.folders.cache import MIN_AGE_SECONDS  # noqa: PLC0415

    files = arguments.files
    classes = arguments.classes or max(2, files // 1000)
    names = [IMAGE_FOLDER, "regraft, first start", "regraft, second start"]
    if arguments.run:
        names += [RUN]
    print(f"{files:,} files in {classes:,} classes; Python {platform.python_version()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, costs = Path(folder) / "data", {name: list[Cost]() for name in names}
        path_bytes = write_files(root, files=files, classes=classes) / files
        time.sleep(MIN_AGE_SECONDS)
        first = _in_fresh_process(RUN if arguments.run else "", root, Path(folder) / "second")
        if arguments.run:
            print(
                f"regraft, first start of a run: {first.seconds:.1f} s, {first.cpu_seconds / files:.1e} CPU s per file"
            )
        for number in range(arguments.rounds):
            for name in names:
                cache = Path(folder) / (f"first {number}" if "first" in name else "second")
                costs[name].append(_in_fresh_process(name, root, cache))
    print(f"{'median (minimum)':30} {'seconds':>15} {'CPU seconds':>15} {'bytes/file':>11} {'beyond its path':>16}")
    for name in names:
        columns = [*zip(*costs[name], strict=True)]
        seconds, cpu_seconds = (f"{statistics.median(column):.2f} ({min(column):.2f})" for column in columns[:2])
        each = statistics.median(columns[2]) / files
        print(f"{name:30} {seconds:>15} {cpu_seconds:>15} {each:11.0f} {each - path_bytes:16.0f}")


def _in_fresh_process(name: str, root: Path, cache: Path) -> Cost:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name, root, cache).result()

"""Export a model: `regraft export MODEL --to onnx | torch-export | hf | timm`.

The export is compared with the original on real images before it appears. See docs/serving.md.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
import re
from collections.abc import Sequence
from importlib.util import find_spec

from trainer.cli import exit_after, run_cli
from trainer.commands.model_arguments import add_model, positive_int
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError

_TARGETS = {"onnx": "model.onnx", "torch-export": "model.pt2", "hf": "hf", "timm": "timm"}
"""Format -> name of the file or folder that it is exported to."""
_FOLDERS = ("hf", "timm")
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("timm", "transformers"), "timm": ("timm",)}
"""Format -> packages that it needs; the extras of regraft have the names of the formats."""
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="regraft export",
        allow_abbrev=False,
        description="Export a model to another format, and compare the export with the original on real images. If "
        "they do not agree, nothing is written.",
        epilog="Exit codes: 0: done; 2: an error that can be fixed; 75: stopped by a signal.",
    )
    add_model(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(_TARGETS),
        help="onnx: an ONNX file; torch-export: a program for torch.export.load; hf: a folder for transformers; "
        "timm: a folder for timm",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help=f"file or folder to write (default: {', '.join(_TARGETS.values())} beside the model file)",
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="onnx: put the preprocessing into the graph, which then takes images of any size, uint8 [N, H, W, 3]",
    )
    parser.add_argument("--fp16", action="store_true", help="onnx: weights and arithmetic in fp16")
    parser.add_argument(
        "--verify-data",
        metavar="DATA",
        help="dataset to compare the export with the original on (default: the test split of the run's own data)",
    )
    parser.add_argument(
        "--verify-images",
        type=positive_int,
        default=256,
        metavar="N",
        help="number of images to compare on (default: 256)",
    )
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="hf, timm: license of the model card, as Hugging Face's hub spells it (default: unknown)",
    )
    return parser


def export(argv: Sequence[str], signals: StopSignals) -> None:
    """Export a model, and print how the export compares with the original.

    Raises:
        UserError: the model cannot be loaded or exported, the export does not agree, or it cannot be written.

    """
    options = make_parser().parse_args(argv)
    _check(options)
    # torch takes seconds to import: a wrong option is reported without it. Signals are deferred, since an interrupted
    # import would leave half a module behind.
    with signals.deferred():
        from trainer.commands.export_model import export_model  # noqa: PLC0415
        from trainer.model.file import find_model_file  # noqa: PLC0415
    signals.raise_if_received()
    file = find_model_file(options.model)
    output: Path = options.output or file.parent / _TARGETS[options.to]
    export_model(options, file, output, is_folder=options.to in _FOLDERS)


def _check(options: argparse.Namespace) -> None:
    for name in ("preprocess", "fp16"):
        if getattr(options, name) and options.to != "onnx":
            raise UserError(f"--{name} is for --to onnx, not for --to {options.to}")
    suffix = Path(_TARGETS[options.to]).suffix
    if suffix and options.output is not None and options.output.suffix != suffix:
        raise UserError(f"--output {options.output}: expected the name of a file that ends in {suffix}")
    if not _LICENSE.fullmatch(options.license):
        raise UserError(f"--license is {options.license!r}: expected an identifier such as apache-2.0 or cc-by-4.0")
    missing = [name for name in _PACKAGES.get(options.to, ()) if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {options.to} needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"pip install 'regraft[{options.to}]'"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda signals: export(words, signals), on_restart="Nothing was written")


if __name__ == "__main__":
    exit_after(main)

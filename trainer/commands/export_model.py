"""Export a model file to one format, compare the export with the original, and write the model card."""

import argparse
from pathlib import Path

from trainer.commands.verification_data import read_verification_data
from trainer.export.model_card import model_card
from trainer.export.output import check_output, staged
from trainer.export.verification import FP16_TOLERANCE, TOLERANCE, RunExported, verify
from trainer.model.file import LoadedModel, load
from trainer.text import escape_unprintable


def export_model(options: argparse.Namespace, file: Path, output: Path, *, is_folder: bool) -> None:
    """Export the model in a file, and print how the export compares with the original.

    Args:
        options: of the command line of `regraft export`.
        file: the model file.
        output: file or folder to write.
        is_folder: whether the export is a folder.

    Raises:
        UserError: see `commands.export.export`.

    """
    original = load(file)
    metadata = original.metadata
    check_output([output] if options.to != "onnx" else [output, output.with_suffix(".json")])
    data = read_verification_data(options.verify_data, file.parent, metadata.classes, count=options.verify_images)
    tolerance = FP16_TOLERANCE if options.fp16 else TOLERANCE
    shown = escape_unprintable(str(output))
    with staged(output, is_folder=is_folder) as path:
        print(f"exporting {metadata.architecture} to {shown} ({_describe(options)})", flush=True)
        run_exported = _export(options, original, path)
        verification = verify(original, run_exported, data.examples, tolerance=tolerance)
        if is_folder:
            text = model_card(metadata, data.training, verification, target=options.to, license_id=options.license)
            (path / "README.md").write_text(text, encoding="utf-8")
    print(f"verified on {data.name}: {verification}")
    print(f"wrote {shown}")


def _describe(options: argparse.Namespace) -> str:
    if options.to != "onnx":
        return f"for {options.to}"
    from trainer.export.onnx_model import OPSET  # noqa: PLC0415 (an extra)

    precision = "fp16" if options.fp16 else "fp32"
    return f"ONNX opset {OPSET}, {precision}, {'with' if options.preprocess else 'without'} preprocessing"


def _export(options: argparse.Namespace, original: LoadedModel, path: Path) -> RunExported:
    # Each needs packages that are extras.
    if options.to == "onnx":
        from trainer.export.onnx_model import export_onnx  # noqa: PLC0415

        return export_onnx(original, path, preprocess=options.preprocess, fp16=options.fp16)
    if options.to == "torch-export":
        from trainer.export.torch_program import export_program  # noqa: PLC0415

        return export_program(original, path)
    from trainer.export.timm_folder import export_hf, export_timm  # noqa: PLC0415

    export_folder = export_hf if options.to == "hf" else export_timm
    return export_folder(original, path, license_id=options.license)

"""`regraft export`: wrong exports, arguments, packages and disks are errors that leave no file."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import completion
from tests.disks import disk
from tests.trainer.export.command import export
from tests.trainer.inference.models import write_images, write_model_file
from trainer.commands.export import main, make_parser
from trainer.export import onnx_model, onnx_preprocessing, timm_folder, torch_program


def other_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = dict(zip(("bicubic", "bilinear"), onnx_preprocessing.FILTERS.values(), strict=True))
    monkeypatch.setattr(onnx_preprocessing, "FILTERS", filters)


def other_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_folder, "crop_fraction", lambda image_size, resize_size: 1.0)


def other_class_order(monkeypatch: pytest.MonkeyPatch) -> None:
    write = timm_folder.save_for_hf

    def reverse(*arguments: Any, model_config: dict[str, Any], **options: Any) -> None:
        write(*arguments, model_config=model_config | {"label_names": model_config["label_names"][::-1]}, **options)

    monkeypatch.setattr(timm_folder, "save_for_hf", reverse)


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.export.export

    def export_(module: torch.nn.Module, *arguments: Any, **options: Any) -> object:
        program = original(module, *arguments, **options)
        name = next(name for name in program.state_dict if name.endswith("fc.bias"))
        program.state_dict[name] = torch.nn.Parameter(program.state_dict[name] + 1e-2)
        return program

    monkeypatch.setattr(torch_program.torch.export, "export", export_)


def fixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.onnx.export

    def export_(*arguments: Any, **options: Any) -> object:
        return original(*arguments, **options | {"dynamic_shapes": None})

    monkeypatch.setattr(onnx_model.torch.onnx, "export", export_)


DISAGREES = "does not agree with the original: on 12 images, logits differ"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "options", "fault", "message"),
    [
        ("onnx", ["--preprocess"], other_interpolation, DISAGREES),
        ("onnx", [], fixed_batch, "cannot be run on a batch of "),
        ("torch-export", [], other_weights, DISAGREES),
        ("timm", [], other_crop, DISAGREES),
        ("hf", [], other_class_order, DISAGREES),
    ],
)
def test_a_wrong_export_is_an_error_and_leaves_no_file(
    to: str,
    options: list[str],
    fault: Callable[[pytest.MonkeyPatch], None],
    message: str,
    model_file: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    suffix = {"onnx": ".onnx", "torch-export": ".pt2"}.get(to, "")
    assert export(model_file, to, tmp_path / f"export{suffix}", dataset, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "othing was written" in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_errors(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.onnx").touch()
    (tmp_path / "described.json").touch()
    write_images(tmp_path / "other" / "dog", 2)
    write_images(tmp_path / "other" / "ant", 2)
    out = str(tmp_path / "x.onnx")
    for options, message in (
        (["--to", "timm", "--fp16"], "--fp16 is for --to onnx, not for --to timm"),
        (["--to", "hf", "--preprocess"], "--preprocess is for --to onnx, not for --to hf"),
        (["--to", "onnx", "--output", "model.pt"], "model.pt: expected the name of a file that ends in .onnx"),
        (["--to", "torch-export", "--output", "x"], "x: expected the name of a file that ends in .pt2"),
        (["--to", "hf", "--license", "a b\n"], "--license is 'a b\\n': expected an identifier such as apache-2.0"),
        (["--to", "onnx", "--output", str(tmp_path / "taken.onnx")], "taken.onnx exists already: remove it"),
        (["--to", "onnx", "--output", str(tmp_path / "described.onnx")], "described.json exists already: remove it"),
        (["--to", "onnx", "--output", f"{model_file}/x.onnx"], "its folder cannot be created (File exists)"),
        (["--to", "onnx", "--output", out], "is not a run folder, so there are no images to verify the export on"),
        (
            ["--to", "onnx", "--output", out, "--verify-data", "/no"],
            "--verify-data is '/no': there is no such folder or CSV file",
        ),
        (
            ["--to", "onnx", "--output", out, "--verify-data", str(tmp_path / "other")],
            "has classes that the model lacks: dog. Its classes are ant, bee, ",
        ),
    ):
        assert main([str(model_file), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["described.json", "other", "taken.onnx"]
    with pytest.raises(SystemExit):
        main([str(model_file), "--to", "onnx", "--verify-images", "0"])
    assert "argument --verify-images: '0': expected a whole number, 1 or more" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--to", "onnx"]) == 2
    assert "none: there is no such file; expected a run folder" in capsys.readouterr().err


def test_a_model_that_timm_lacks_is_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architecture in ("shufflenet_v2_x0_5", "mobilenet_v3_small"):  # of no or of another model of timm
        model = write_model_file(tmp_path / f"{architecture}.safetensors", architecture)
        assert export(model, "timm", tmp_path / "timm", dataset) == 2
        refused = f"error: {architecture} of torchvision cannot be exported for timm or transformers: timm has no model"
        assert capsys.readouterr().err.startswith(refused)
        assert not (tmp_path / "timm").exists()


def test_completion_knows_the_options() -> None:
    assert {*completion.parser_options(make_parser())} == {*completion.EXPORT, "--help"}


def test_a_missing_package_is_named(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.commands.export.find_spec", lambda name: None)
    for to, message in (
        ("onnx", "needs the packages onnx, onnxscript, onnxruntime: pip install 'regraft[onnx]'"),
        ("timm", "needs the package timm: pip install 'regraft[timm]'"),
        ("hf", "needs the packages timm, transformers: pip install 'regraft[hf]'"),
    ):
        assert main([str(model_file), "--to", to]) == 2
        assert capsys.readouterr().err == f"error: --to {to} {message}\n"


def test_a_full_disk_is_an_error_and_leaves_no_file(
    model_file: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with disk(tmp_path / "disk", "4m") as root:
        assert export(model_file, "timm", root / "timm", dataset) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert list(root.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_leaves_no_file(
    number: signal.Signals,
    model_file: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.commands.export_model.verify", lambda *_, **__: os.kill(os.getpid(), number))
    assert export(model_file, "torch-export", tmp_path / "model.pt2", dataset) == 75
    message = f"stopped by {number.name}: there was nothing new to save. Nothing was written\n"
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []

"""`regraft export`: each export is loaded by the foreign library in a fresh process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from regraft.contract import ATTEMPTS, CONFIG, CONFIG_HEADER, ENVIRONMENT
from tests.launching import run
from tests.trainer.export.command import export
from tests.trainer.inference.models import CLASSES, write_images, write_model_file
from trainer.commands.export import main
from trainer.config.parse import dump, parse
from trainer.export import onnx_model
from trainer.export.timm_folder import crop_fraction
from trainer.export.torch_program import METADATA

ONNX = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1])
(input,) = session.get_inputs()
inputs = np.load(sys.argv[2]) if sys.argv[2:3] and sys.argv[2].endswith(".npy") else None
if inputs is None:
    batches = [np.asarray(Image.open(path).convert("RGB"))[None] for path in sys.argv[2:]]
else:
    batches = [inputs[:1], inputs[1:]]
logits = np.concatenate([session.run(["logits"], {input.name: batch})[0] for batch in batches])
print(json.dumps([input.name, input.type, input.shape, session.get_modelmeta().custom_metadata_map, logits.tolist()]))
"""
TORCH_EXPORT = """
import json, sys
import numpy as np, torch
files = {"regraft.json": ""}
module = torch.export.load(sys.argv[1], extra_files=files).module()
inputs = torch.from_numpy(np.load(sys.argv[2]))
logits = torch.cat([module(inputs[:1]), module(inputs[1:])])
print(json.dumps([json.loads(files["regraft.json"]), logits.tolist()]))
"""
TIMM = """
import json, sys
import timm, torch
from PIL import Image
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in sys.argv[2:]]))
print(json.dumps([model.pretrained_cfg["label_names"], logits.tolist()]))
"""
HF = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1])
print(json.dumps([classify(path, top_k=99, function_to_apply="none") for path in sys.argv[2:]]))
"""


def fresh(program: str, *arguments: object) -> Any:
    """Return what a program prints that imports nothing of regraft."""
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    output = run([sys.executable, "-c", program, *arguments], cwd=Path("/"), environment=environment)
    return json.loads(next(line for line in output.splitlines() if line.startswith(("[", "{"))))


def reference(model_file: Path, paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the original's input and its logits."""
    model = regraft.load(model_file)
    inputs = model.preprocess(list(paths))
    with torch.inference_mode():
        return inputs, model.module(inputs)


def check_close(logits: object, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=tolerance)
    assert (expected[:, None] - expected[None]).abs().max() > 10 * tolerance, "the images must differ"


def save_inputs(path: Path, inputs: torch.Tensor) -> Path:
    import numpy as np

    np.save(path, inputs.numpy())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--preprocess"], ["--fp16"], ["--preprocess", "--fp16"]], ids=" ".join)
def test_onnxruntime_runs_an_onnx_export(
    options: list[str],
    model_file: Path,
    dataset: Path,
    image_paths: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "model.onnx"
    assert export(model_file, "onnx", output, dataset, *options) == 0
    printed = capsys.readouterr().out
    assert f"ONNX opset {onnx_model.OPSET}" in printed
    assert "on 12 images, logits differ by at most" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == [".regraft", "model.json", "model.onnx"]

    inputs, expected = reference(model_file, image_paths)
    preprocess = "--preprocess" in options
    arguments = image_paths if preprocess else [save_inputs(tmp_path / "inputs.npy", inputs)]
    name, type_, shape, metadata, logits = fresh(ONNX, output, *arguments)
    assert (name, type_, shape) == (
        ("images", "tensor(uint8)", ["batch", "height", "width", 3])
        if preprocess
        else ("pixel_values", "tensor(float)", ["batch", 3, 64, 64])
    )
    check_close(logits, expected, 1e-2 if "--fp16" in options else 1e-4)
    description = json.loads(output.with_suffix(".json").read_text())
    for source in (description, {key: json.loads(metadata[key]) for key in ("classes", "preprocessing", "input")}):
        assert tuple(source["classes"]) == CLASSES
        assert source["preprocessing"]["resize_size"] == 72
        assert source["input"]["name"] == name
    assert description["fp16"] is ("--fp16" in options)
    weights = sum(tensor.nbytes for tensor in regraft.load(model_file).module.state_dict().values())
    assert (output.stat().st_size < 0.7 * weights + 200_000) is ("--fp16" in options)


@pytest.mark.slow
def test_torch_loads_an_exported_program(
    model_file: Path, dataset: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "model.pt2"
    assert export(model_file, "torch-export", output, dataset) == 0
    inputs, expected = reference(model_file, image_paths)
    metadata, logits = fresh(TORCH_EXPORT, output, save_inputs(tmp_path / "inputs.npy", inputs))
    assert tuple(metadata["classes"]) == CLASSES
    check_close(logits, expected)
    assert METADATA == "regraft.json"


@pytest.mark.slow
def test_timm_loads_the_exported_folder_of_a_run_which_is_verified_on_the_runs_own_data(
    model_file: Path, dataset: Path, image_paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "a run"
    (run_folder / ATTEMPTS).mkdir(parents=True)
    (run_folder / ENVIRONMENT).mkdir()
    shutil.copy(model_file, run_folder)
    config = parse(["--model.name=resnet18", f"--data.root={dataset}", "--data.test_fraction=0.34"])
    (run_folder / CONFIG).write_text(CONFIG_HEADER + dump(config), encoding="utf-8")
    (run_folder / ATTEMPTS / "0001.json").touch()
    command = {
        "argv": ["python", "-u", "/somewhere/trainer/main.py", "--data.root", "my pictures", "--run.dir=/my/runs/x"]
    }
    (run_folder / ENVIRONMENT / "0001.json").write_text(json.dumps(command))

    assert main([str(run_folder), "--to", "timm"]) == 0
    assert "(a split of 34 %): on 4 images, logits differ by at most" in capsys.readouterr().out
    labels, logits = fresh(TIMM, run_folder / "timm", *image_paths)
    assert tuple(labels) == CLASSES
    check_close(logits, reference(model_file, image_paths)[1])
    assert regraft.load(run_folder / "timm").classes == CLASSES
    card = (run_folder / "timm" / "README.md").read_text(encoding="utf-8")
    assert "license: unknown\nlibrary_name: timm\n" in card
    assert "regraft train --data.root 'my pictures'\n" in card
    assert f"Data: {dataset.name}: 4 classes, 8 images to train on, 4 to report on (a split of 34 %)." in card


@pytest.mark.slow
def test_timm_and_transformers_load_a_model_of_timm_for_another_image_size(
    dataset: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    model_file = write_model_file(tmp_path / "model.safetensors", "timm/test_vit")  # for 64 px instead of 160
    assert export(model_file, "timm", tmp_path / "timm", dataset) == 0
    assert export(model_file, "hf", tmp_path / "hf", dataset) == 0
    expected = reference(model_file, image_paths)[1]
    check_close(fresh(TIMM, tmp_path / "timm", *image_paths)[1], expected)
    check_close(fresh(TIMM, tmp_path / "hf", *image_paths)[1], expected)
    assert [max(answer, key=lambda a: a["score"])["label"] for answer in fresh(HF, tmp_path / "hf", *image_paths)] == [
        CLASSES[label] for label in expected.argmax(1)
    ]


@pytest.mark.slow
def test_transformers_loads_an_exported_folder(
    model_file: Path, dataset: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "hf"
    assert export(model_file, "hf", output, dataset, "--license", "apache-2.0") == 0
    answers = fresh(HF, output, *image_paths)
    logits = [[next(a["score"] for a in answer if a["label"] == name) for name in CLASSES] for answer in answers]
    check_close(logits, reference(model_file, image_paths)[1])
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: image-classification\n")
    for text in (
        "it, is\\n'quoted'",
        "猫",
        "on 12 images, logits differ",
        "| `epoch` | `1` |",
        "not recorded",
        "0.1.0 from scratch.",
    ):
        assert text in card


@pytest.mark.slow
def test_the_example_of_a_model_card_runs(model_file: Path, dataset: Path, tmp_path: Path) -> None:
    (image,) = write_images(tmp_path / "images", 1)
    image.rename(tmp_path / "image.jpg")
    (prediction,) = regraft.load(model_file).predict(tmp_path / "image.jpg")
    for target in ("hf", "timm"):
        output = tmp_path / target
        assert export(model_file, target, output, dataset) == 0
        card = (output / "README.md").read_text(encoding="utf-8")
        program = card.split("```python\n")[1].split("```")[0].replace("FOLDER", target)
        assert prediction.label in run([sys.executable, "-c", program], cwd=tmp_path)


def test_the_crop_of_timm_is_that_of_the_model_file() -> None:
    for image_size in range(1, 400, 7):
        for resize_size in range(image_size, image_size + 300, 13):
            assert int(image_size / crop_fraction(image_size, resize_size)) == resize_size


def test_unreadable_images_are_left_out_and_counted(
    model_file: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    for name in CLASSES[:2]:
        write_images(root / name, 2)
    (root / CLASSES[0] / "000.png").write_bytes(b"no image")
    assert export(model_file, "torch-export", tmp_path / "model.pt2", root) == 0
    assert "on 3 images (1 more cannot be read), logits differ" in capsys.readouterr().out

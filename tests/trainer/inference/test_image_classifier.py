"""The object that `regraft.load` returns."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file as load_state
from torch import nn
from torchvision.models import get_model

import regraft
from tests.trainer.inference.models import CLASSES, write_model_file
from trainer.distributed.context import init_distributed
from trainer.distributed.precision import Execution
from trainer.errors import UserError
from trainer.inference import predictor
from trainer.inference.predictor import Predictor, eval_execution, make_predictor
from trainer.model.file import load
from trainer.model.metadata import read_metadata


def test_predictions_are_the_softmax_of_the_model(model_file: Path, image_paths: list[Path]) -> None:
    model = regraft.load(model_file)
    module, preprocess, classes = model
    assert (module, preprocess, classes) == (model.module, model.preprocess, CLASSES)
    assert model.metadata == read_metadata(model_file)
    predictions = model.predict(image_paths, topk=3, batch_size=2)
    with torch.no_grad():
        scores, indices = module(preprocess(image_paths)).softmax(1).topk(3)
    assert [p.labels for p in predictions] == [tuple(CLASSES[i] for i in row) for row in indices.tolist()]
    assert len({p.label for p in predictions}) > 1, "the images must differ"
    torch.testing.assert_close(torch.tensor([p.scores for p in predictions]), scores)
    (single,) = model.predict(image_paths[0])
    assert (single.label, single.labels) == (predictions[0].label, predictions[0].labels[:1])
    assert single.score == pytest.approx(predictions[0].score)
    assert len(model.predict(image_paths[0], topk=99)[0].labels) == len(CLASSES)
    assert model.predict([]) == []


def test_images_of_every_form_are_predicted_alike(model_file: Path, image_paths: list[Path]) -> None:
    model, path = regraft.load(model_file), image_paths[0]
    image = Image.open(path)
    forms: list[Any] = [path, str(path), path.read_bytes(), image, image, np.asarray(image)]
    assert len({prediction.scores for prediction in model.predict(forms, batch_size=1)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 0}, "topk is 0: expected a whole number, 1 or more"),
        ({"batch_size": True}, "batch_size is True: expected a whole number, 1 or more"),
        ({"calibrated": True}, "the model is not calibrated"),
        ({"images": ["missing.jpg"]}, "missing.jpg: no such file; expected an image file"),
        ({"images": 3}, "the image is of type int: expected a path"),
        ({"images": [3]}, r"images\[0\] is of type int: expected a path"),
    ],
)
def test_wrong_arguments_are_errors(
    arguments: dict[str, Any], message: str, model_file: Path, image_paths: list[Path]
) -> None:
    with pytest.raises(UserError, match=message):
        regraft.load(model_file).predict(**{"images": image_paths[:1], **arguments})


def test_a_wrong_device_is_an_error(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device, message in (("gpu", "expected auto, cpu or cuda"), ("cuda", "torch finds 0 GPUs"), ("mps", "expected")):
        with pytest.raises(UserError, match=message):
            regraft.load(model_file, device=device)
    assert regraft.load(model_file, device="auto").device.type in ("cpu", "cuda")


def test_calibration_divides_the_logits_and_tta_averages_them(tmp_path: Path, image_paths: list[Path]) -> None:
    model = regraft.load(write_model_file(tmp_path / "model.safetensors", temperature=2.5))
    inputs = model.preprocess(image_paths)
    with torch.no_grad():
        logits, mirrored = model.module(inputs), model.module(inputs.flip(3))
    expected = {(False, False): logits, (True, False): logits / 2.5, (True, True): (logits + mirrored) / 5}
    for (calibrated, tta), values in expected.items():
        predictions = model.predict(image_paths, calibrated=calibrated, tta=tta)
        actual = torch.tensor([prediction.score for prediction in predictions])
        torch.testing.assert_close(actual, values.softmax(1).amax(1))


@pytest.mark.parametrize("architecture", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_features_are_the_input_of_the_output_layer(architecture: str, tmp_path: Path, image_paths: list[Path]) -> None:
    path = write_model_file(tmp_path / "model.safetensors", architecture)
    head = load(path).heads[0]
    model = regraft.load(path)
    features = model.features(image_paths[:3], batch_size=2)
    layer = model.module.get_submodule(head)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    with torch.no_grad():
        logits = model.module(model.preprocess(image_paths[:3]))
    assert features.device.type == "cpu"
    assert layer.bias is not None
    torch.testing.assert_close(features @ layer.weight.flatten(1).T + layer.bias, logits, rtol=1e-4, atol=1e-4)
    (features * layer.weight.flatten(1)[0]).sum().backward()  # not an inference tensor
    assert model.features([]).shape == (0, features.shape[1])


def test_a_model_file_opens_by_torchvision_alone(model_file: Path, image_paths: list[Path]) -> None:
    alone = get_model("shufflenet_v2_x0_5", num_classes=len(CLASSES)).eval()
    alone.load_state_dict(load_state(model_file))
    model = regraft.load(model_file)
    inputs = model.preprocess(image_paths)
    with torch.no_grad():
        assert torch.equal(alone(inputs), model.module(inputs))


def test_threads_share_a_model(model_file: Path, image_paths: list[Path]) -> None:
    model = regraft.load(model_file)
    expected = [model.predict(path)[0] for path in image_paths], [model.features(path) for path in image_paths]
    for _ in range(3):
        model = regraft.load(model_file)
        with ThreadPoolExecutor(8) as pool:
            features = pool.map(model.features, image_paths)
            predictions = pool.map(lambda path: model.predict(path)[0], image_paths)  # noqa: B023 (finished below)
            assert [p.labels for p in predictions] == [p.labels for p in expected[0]]
            torch.testing.assert_close(torch.cat([*features]), torch.cat(expected[1]))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_equal_those_of_the_model_that_accelerate_prepares(
    precision: Any, channels_last: bool, model_file: Path, image_paths: list[Path]
) -> None:
    threads = torch.get_num_threads()
    ctx = init_distributed(device="cpu", precision=precision, threads=threads)
    module = load(model_file).module
    if channels_last:
        module.to(memory_format=torch.channels_last)
    prepared = ctx.accelerator.prepare_model(module, evaluation_mode=True)
    execution = Execution(precision, channels_last)
    tested = Predictor(load(model_file), torch.device("cpu"), execution)
    preprocess = regraft.load(model_file).preprocess
    images = torch.from_numpy(np.stack([preprocess.pixels(path) for path in image_paths])).permute(0, 3, 1, 2)
    inputs = preprocess(image_paths).contiguous(memory_format=execution.memory_format)
    with torch.inference_mode():
        assert torch.equal(tested.logits(images), prepared(inputs).float())


def test_the_execution_is_that_of_the_evaluation_if_the_device_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cpu = tmp_path / "model.safetensors", torch.device("cpu")
    cases = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp32"}
    for precision, expected in cases.items():
        metadata = read_metadata(write_model_file(path, execution=Execution(precision, channels_last=True)))
        assert metadata is not None
        assert eval_execution(metadata, cpu) == Execution(expected, channels_last=True)
    metadata = read_metadata(write_model_file(path, execution=Execution("bf16", channels_last=False)))
    assert metadata is not None
    for is_supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            predictor.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda value=is_supported: value, raising=False
        )
        assert eval_execution(metadata, cpu) == Execution(precision, channels_last=False)
    metadata = read_metadata(write_model_file(path))
    assert metadata is not None
    assert eval_execution(metadata, cpu) == Execution("fp32", channels_last=False)


def raise_other_dtype(*_: object) -> nn.Module:
    raise RuntimeError("expected mat1 and mat2 to have the same dtype\ndetails")


def with_other_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    other = copy.deepcopy(model)
    nn.init.zeros_(next(other.parameters()))
    return other


@pytest.mark.parametrize(
    ("precision", "cast", "message"),
    [
        ("bf16", None, None),
        ("bf16", raise_other_dtype, "(expected mat1 and mat2 to have the same dtype)"),
        ("bf16", with_other_weights, "(weights that are cast once change the logits)"),
        ("fp16", None, "the run was evaluated in fp16, which this CPU lacks: the model is computed in fp32"),
    ],
)
def test_another_or_a_slower_execution_is_not_silent(
    precision: Any, cast: Any, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model_file(tmp_path / "model.safetensors", execution=Execution(precision, channels_last=False))
    monkeypatch.setattr(predictor.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    if cast is not None:
        monkeypatch.setattr(predictor, "with_cast_weights", cast)
    messages: list[str] = []
    made = make_predictor(load(path), torch.device("cpu"), warn=messages.append)
    assert len(messages) == (message is not None)
    assert all(message in text for text in messages if message)
    if cast is not None:
        assert {parameter.dtype for parameter in made.module.parameters()} == {torch.float32}
        with pytest.warns(UserWarning, match="weights are cast in each forward pass"):
            regraft.load(path)

"""Batches of image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.data.augment import EvalTransform, Normalize
from trainer.data.dataset import ImageDataset
from trainer.data.loader import Collate
from trainer.data.preprocessing import Preprocessing
from trainer.data.sampler import EvalBatchSampler
from trainer.distributed.precision import Execution
from trainer.errors import UserError
from trainer.evaluate import evaluate
from trainer.inference import file_logits
from trainer.inference.answers import AnswerOptions
from trainer.inference.file_logits import BatchOptions, FileLogits
from trainer.inference.predictor import Predictor
from trainer.inference.rows import Row
from trainer.inference.stream import FilePredictor
from trainer.model.create import build_model
from trainer.model.file import LoadedModel, load
from trainer.model.metadata import ModelMetadata

CPU = torch.device("cpu")


class Recorder(nn.Module):
    """Records the inputs and outputs of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images)
        self.outputs.append(self.model(images))
        return self.outputs[-1]


def make(model_file: Path, execution: Execution, *, threads: int = 1, **options: Any) -> tuple[FilePredictor, Recorder]:
    loaded = load(model_file)
    predictor = Predictor(loaded, CPU, execution)
    predictor.module = recorder = Recorder(predictor.module)
    batches = BatchOptions(
        batch_size=options.pop("batch_size", 8), threads=threads, one_forward_at_a_time=options.pop("together", False)
    )
    logits = FileLogits(predictor, loaded.metadata, batches)
    return FilePredictor(logits, loaded.metadata.classes, AnswerOptions(**options)), recorder


def predict(predictor: FilePredictor, paths: Sequence[Path]) -> list[Row]:
    return [row for rows in predictor([str(path) for path in paths]) for row in rows]


@pytest.mark.parametrize("channels_last", [True, False])
def test_inputs_and_logits_equal_those_of_the_evaluation_bit_for_bit(
    channels_last: bool, model_file: Path, image_paths: list[Path]
) -> None:
    execution = Execution("fp32", channels_last)
    predictor, ours = make(model_file, execution)
    rows = predict(predictor, image_paths)
    # As trainer/config/build_loaders.py makes the batches of an evaluation.
    metadata = load(model_file).metadata
    preprocessing = metadata.preprocessing
    dataset = ImageDataset([(str(path), 0) for path in image_paths], EvalTransform(preprocessing), seed=0)
    collate = Collate(preprocessing.image_size, channels_last)
    batches = [collate(dataset.__getitems__(keys)) for keys in EvalBatchSampler(len(dataset), batch_size=8)]
    theirs = Recorder(load(model_file).module.to(memory_format=execution.memory_format))
    evaluation = evaluate(
        theirs, batches, classes=4, expected=21, normalize=Normalize(preprocessing, CPU), reduce=lambda sums: sums,
        device=CPU, num_batches=3, interrupted=lambda: False,
    )  # fmt: skip
    assert [len(images) for images in ours.inputs] == [8, 8, 5]
    for kind in ("inputs", "outputs"):
        for a, b in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
            assert torch.equal(a, b), kind
            assert a.stride() == b.stride()
    labels = [row.prediction.label for row in rows if row.prediction is not None]
    assert evaluation.predicted == tuple(labels.count(name) for name in metadata.classes)
    assert len(set(labels)) > 1


def test_threads_and_batch_sizes_do_not_change_the_rows(model_file: Path, image_paths: list[Path]) -> None:
    execution = Execution("fp32", channels_last=True)
    expected = predict(make(model_file, execution)[0], image_paths)
    assert [row.path for row in expected] == [str(path) for path in image_paths]
    for threads, batch_size, together in ((3, 8, False), (3, 8, True), (2, 1, False), (4, 100, True)):
        predictor, _ = make(model_file, execution, threads=threads, batch_size=batch_size, together=together)
        rows = predict(predictor, image_paths)
        for row, other in zip(rows, expected, strict=True):
            assert row.prediction is not None
            assert other.prediction is not None
            assert (row.path, row.prediction.labels) == (other.path, other.prediction.labels)
            assert row.prediction.scores == pytest.approx(other.prediction.scores, abs=1e-6)


def test_unreadable_images_have_an_error_and_the_others_are_predicted(
    model_file: Path, image_paths: list[Path], tmp_path: Path
) -> None:
    broken = [tmp_path / name for name in ("text.jpg", "empty.jpg", "missing.jpg", "folder.jpg")]
    broken[0].write_text("hello")
    broken[1].touch()
    broken[3].mkdir()
    predictor, _ = make(model_file, Execution("fp32", channels_last=True), batch_size=4)
    rows = predict(predictor, [*broken, *image_paths[:2], *broken[:1]])
    errors = ["a text file, not an image", "an empty file (0 bytes)", "no such file", "a folder, not a file"]
    assert [row.error for row in rows] == [*errors, None, None, errors[0]]
    assert [row.prediction is None for row in rows] == [True] * 4 + [False] * 2 + [True]
    assert predict(predictor, []) == []


def test_a_batch_that_does_not_fit_in_memory_is_halved(
    model_file: Path, image_paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = Execution("fp32", channels_last=True)
    expected = predict(make(model_file, execution)[0], image_paths)
    sizes: list[int] = []

    def limited(logits: Any) -> Any:
        def compute(self: Predictor, images: Tensor, *, tta: bool) -> Tensor:
            sizes.append(len(images))
            if len(images) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits(self, images, tta=tta)

        return compute

    monkeypatch.setattr(Predictor, "logits", limited(Predictor.logits))
    monkeypatch.setattr(file_logits, "choose_eval_batch_size", lambda device, *, threads: 8)
    rows = predict(make(model_file, execution, batch_size=None)[0], image_paths)
    assert [row.path for row in rows] == [row.path for row in expected]
    assert sizes == [8, 4, *[2] * 4, *[2] * 4, 2, 2, 1]
    predictor, _ = make(model_file, execution, batch_size=4)
    with pytest.raises(UserError, match="--batch-size 4: a batch does not fit in the memory of cpu; choose a smaller"):
        predict(predictor, image_paths)


def test_logits_that_are_not_finite_are_an_error(model_file: Path, image_paths: list[Path]) -> None:
    predictor, recorder = make(model_file, Execution("fp32", channels_last=True))
    with torch.no_grad():
        next(recorder.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="the model's outputs are not finite: its weights are damaged"):
        predict(predictor, image_paths)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("shufflenet_v2_x0_5", {"Conv2d", "Linear"}),
        ("vit_b_16", {"Conv2d", "Linear"}),
        ("timm/test_vit", {"Conv2d", "Linear"}),
        # Its other convolutions compute with their weights before: they standardize them.
        ("timm/nf_regnet_b0", {"Conv2d", "Linear"}),
    ],
)
def test_weights_are_cast_once_and_the_logits_equal_those_of_autocast(architecture: str, layers: set[str]) -> None:
    torch.manual_seed(0)
    built = build_model(architecture, image_size=64, num_classes=2, weights=None, head_init="torch")
    preprocessing = Preprocessing(
        image_size=64, resize_size=64, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    metadata = ModelMetadata(
        version="0", architecture=architecture, classes=("a", "b"), preprocessing=preprocessing, source="", metrics={}
    )
    loaded = LoadedModel(built.model.eval(), built.heads, metadata)
    predictor = Predictor(loaded, CPU, Execution("bf16", channels_last=True))
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = built.model(Normalize(preprocessing, CPU)(images.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(predictor.logits(images), expected.float())
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.float32}
    cast = {
        type(module).__name__
        for module in predictor.module.modules()
        if any(parameter.dtype == torch.bfloat16 for parameter in module.parameters(recurse=False))
    }
    assert cast == layers

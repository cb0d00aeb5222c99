"""The preprocessing in an ONNX graph gives the pixels of the run's evaluation."""

from itertools import product

import numpy as np
import onnxruntime
import pytest
import torch

from tests.folders import noise_image
from trainer.data.augment import EvalTransform, Normalize
from trainer.data.preprocessing import Preprocessing
from trainer.export.onnx_preprocessing import INPUT, OUTPUT, preprocessing_model

SIZES = [
    *((40, 30), (37, 37), (101, 57), (20, 33), (32, 400), (611, 37)),
    *((100, 401), (150, 263), (150, 264), (70, 103), (70, 104)),
]
"""Width and height: smaller, equal, odd margins; and about the limit from which Pillow starts with the height."""


@pytest.mark.parametrize(
    ("resize", "interpolation", "resize_size"),
    [*product(("squash", "shorter"), ("bilinear", "bicubic"), (37,)), ("shorter", "bicubic", 32)],
)
def test_pixels_equal_those_of_the_evaluation(resize: str, interpolation: str, resize_size: int) -> None:
    preprocessing = Preprocessing(
        image_size=32,
        resize_size=resize_size,
        resize=resize,  # type: ignore[arg-type]
        interpolation=interpolation,  # type: ignore[arg-type]
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    content = preprocessing_model(preprocessing).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    transform, normalize = EvalTransform(preprocessing), Normalize(preprocessing, torch.device("cpu"))
    for number, size in enumerate(SIZES):
        images = [np.asarray(noise_image(2 * number + item, size=size)) for item in range(2)]
        pixels = np.stack([transform(image) for image in images])
        expected = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        (actual,) = session.run([OUTPUT], {INPUT: np.stack(images)})
        # A gray level is at least 0.017 here; PyTorch rounds once in a multiplication and addition, onnxruntime twice.
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=1e-6)

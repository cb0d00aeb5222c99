# mypy: ignore-errors
# The functions under @script are ONNX Script, which Python's types do not describe.
"""ONNX graph of the preprocessing: from images of any size, uint8 [N, H, W, 3], to the model's input.

ONNX's own Resize computes its weights in float32: some pixels differ from Pillow's by one gray level, which changes the
logits. This graph does Pillow's arithmetic (src/libImaging/Resample.c) instead, so its pixels are those of the run's
evaluation, bit for bit: weights in float64, rounded to 22 binary places, and sums in int32, first along one axis and
then along the other. Only the pixels that the central crop keeps are computed.
"""

import onnx
import PIL
from onnx import TensorProto
from onnx.inliner import inline_local_functions
from onnxscript import FLOAT, UINT8, script
from onnxscript import opset18 as op
from packaging.version import Version

from trainer.data.preprocessing import Preprocessing

INPUT, OUTPUT = "images", "preprocessed"
_UINT8, _FLOAT, _INT32, _INT64, _DOUBLE = (
    TensorProto.UINT8,
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.DOUBLE,
)
_MAY_START_WITH_HEIGHT = Version(PIL.__version__) >= Version("13")
"""Whether Pillow may resize the height first; earlier versions always start with the width."""
_ONE = 1 << 22
"""The weight 1 in fixed point."""


@script(default_opset=op)
def bilinear(distance):
    """Return the weight of a pixel at a distance from the center of the filter."""
    return op.Max(1.0 - distance, op.CastLike(0.0, distance))


@script(default_opset=op)
def bicubic(distance):
    """Return the weight of a pixel at a distance from the center of the filter."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    return op.Where(distance < 1.0, near, op.Where(distance < 2.0, far, op.CastLike(0.0, distance)))


FILTERS = {"bilinear": (bilinear, 1.0), "bicubic": (bicubic, 2.0)}
"""Interpolation -> filter, and the distance from which its weights are 0."""


def preprocessing_model(preprocessing: Preprocessing) -> onnx.ModelProto:  # noqa: PLR0915 (functions of the graph)
    """Return a model from RGB images, uint8 [N, H, W, 3], to float32 [N, 3, image_size, image_size].

    Args:
        preprocessing: its resize_size must be at least its image_size, as in every run.

    """
    size, resize_size, squash = preprocessing.image_size, preprocessing.resize_size, preprocessing.resize == "squash"
    weight_at, support = FILTERS[preprocessing.interpolation]
    scale = [1 / (255 * std) for std in preprocessing.std]
    shift = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]

    @script(default_opset=op)
    def resized_sizes(sizes):
        """Return the sizes [height, width] after the resize."""
        return sizes * resize_size / op.ReduceMin(sizes)

    @script(default_opset=op)
    def squashed_sizes(sizes):
        """Return the sizes [height, width] after the resize."""
        return op.Expand(op.Constant(value_int=resize_size), op.Shape(sizes))

    @script(default_opset=op)
    def resize_width(images, width):
        """Resize images [N, H, W, 3] to a width, and return its central pixels, uint8 [N, H, image_size, 3]."""
        old_width = op.Gather(op.Shape(images), 2)
        left = op.Round(op.Cast(width - size, to=_DOUBLE) * 0.5)  # half to even, as Python does
        ratio = op.Cast(old_width, to=_DOUBLE) / op.Cast(width, to=_DOUBLE)
        center = (op.Cast(op.Range(0, size, 1), to=_DOUBLE) + left + 0.5) * ratio
        filter_scale = op.Max(ratio, op.CastLike(1.0, ratio))
        radius = filter_scale * support
        start = op.Max(op.Cast(center - radius + 0.5, to=_INT64), op.Constant(value_int=0))
        end = op.Min(op.Cast(center + radius + 0.5, to=_INT64), old_width)
        # One row per pixel under the filter, one column per output pixel.
        count = op.Cast(op.Ceil(radius), to=_INT64) * 2 + 1
        index = op.Unsqueeze(op.Range(0, count, 1), [1]) + start
        distance = op.Abs((op.Cast(index, to=_DOUBLE) - center + 0.5) * (1.0 / filter_scale))
        weight = op.Where(index < end, weight_at(distance), op.CastLike(0.0, distance))
        weight = weight / op.ReduceSum(weight, [0]) * _ONE
        fixed = op.Cast(weight + op.Sign(weight) * 0.5, to=_INT32)
        index = op.Min(index, old_width - 1)
        half = op.Cast(op.Constant(value_int=_ONE // 2), to=_INT32)
        total = op.Expand(half, op.Shape(op.Gather(images, start, axis=2)))
        for row in range(count):
            pixels = op.Cast(op.Gather(images, op.Gather(index, row), axis=2), to=_INT32)
            total = total + pixels * op.Unsqueeze(op.Gather(fixed, row), [1])
        zero = op.CastLike(op.Constant(value_int=0), total)
        white = op.CastLike(op.Constant(value_int=255), total)
        return op.Cast(op.Min(op.Max(total, zero) / _ONE, white), to=_UINT8)

    @script(default_opset=op)
    def width_first(images, sizes):
        """Resize and crop images [N, H, W, 3] to [N, image_size, image_size, 3], width before height."""
        narrow = resize_width(images, op.Gather(sizes, 1))
        transposed = resize_width(op.Transpose(narrow, perm=[0, 2, 1, 3]), op.Gather(sizes, 0))
        return op.Transpose(transposed, perm=[0, 2, 1, 3])

    @script(default_opset=op)
    def height_first(images, sizes):
        """Resize and crop images [N, H, W, 3] to [N, image_size, image_size, 3], height before width."""
        low = resize_width(op.Transpose(images, perm=[0, 2, 1, 3]), op.Gather(sizes, 0))
        return resize_width(op.Transpose(low, perm=[0, 2, 1, 3]), op.Gather(sizes, 1))

    @script(default_opset=op)
    def larger_reduction_first(images, sizes):
        """Resize and crop images as Pillow 13, which starts with the height if it is reduced far more."""
        lost = op.Shape(images, start=1, end=3) - sizes
        lost_height, lost_width = op.Gather(lost, 0), op.Gather(lost, 1)
        if lost_height > op.Max(lost_width * 2, op.Constant(value_int=0)):
            resized = height_first(images, sizes)
        else:
            resized = width_first(images, sizes)
        return resized

    sizes_after = squashed_sizes if squash else resized_sizes
    resize = larger_reduction_first if _MAY_START_WITH_HEIGHT else width_first

    @script(default_opset=op)
    def preprocess(images: UINT8["batch", "height", "width", 3]) -> FLOAT["batch", 3, "size", "size"]:  # noqa: F821
        sizes = sizes_after(op.Shape(images, start=1, end=3))
        values = op.Cast(resize(images, sizes), to=_FLOAT)
        normalized = values * op.Constant(value_floats=scale) + op.Constant(value_floats=shift)
        preprocessed = op.Transpose(normalized, perm=[0, 3, 1, 2])
        return preprocessed

    model = inline_local_functions(preprocess.to_model_proto())
    del model.opset_import[:]  # that of the functions, which are inlined
    model.opset_import.append(onnx.helper.make_opsetid("", op.version))
    return model

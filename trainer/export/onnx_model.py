"""Export a model to ONNX by PyTorch's dynamo exporter, with its preprocessing if asked for; run it by onnxruntime."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnxruntime
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.export import onnx_preprocessing
from trainer.export.description import as_texts, describe
from trainer.export.exporting import exporting
from trainer.export.verification import RunExported
from trainer.model.file import LoadedModel
from trainer.model.metadata import ModelMetadata

OPSET = 18
"""The opset that the exporter's operators are written in: later ones need a conversion."""
INPUT, OUTPUT = "pixel_values", "logits"
_MAX_BYTES = 2**31 - 2**20
"""Protocol Buffers cannot hold more than 2 GiB."""


class _Half(nn.Module):
    """A model in fp16 whose input and output are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values.half())
        return logits.float()


def export_onnx(loaded: LoadedModel, path: Path, *, preprocess: bool = False, fp16: bool = False) -> RunExported:
    """Write a model as ONNX, and its description as JSON beside it; return how to run it.

    Args:
        loaded: the model.
        path: file to write; the description has the same name with the suffix .json.
        preprocess: whether the model takes images of any size, uint8 [N, H, W, 3], instead of preprocessed ones,
            float32 [N, 3, S, S].
        fp16: whether weights and arithmetic are in fp16; input and output stay in float32 or uint8.

    Raises:
        UserError: the model cannot be exported, or is larger than ONNX allows in one file.

    """
    metadata = loaded.metadata
    exported = _Half(loaded.module) if fp16 else loaded.module
    size = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict().values())
    if size > _MAX_BYTES:
        raise UserError(
            f"{metadata.architecture} has {size / 1e9:.1f} GB of weights, and an ONNX file holds at most 2 GB: "
            "use --fp16, or --to torch-export"
        )
    side = metadata.preprocessing.image_size
    with exporting(metadata.architecture, "ONNX"):
        program = torch.onnx.export(
            exported,
            (torch.zeros(2, 3, side, side),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert program is not None  # for mypy: it is None without dynamo
        proto: onnx.ModelProto = program.model_proto
        if preprocess:
            proto = _with_preprocessing(proto, metadata)
    description = describe(metadata, input=_describe_input(side, preprocess=preprocess), opset=OPSET, fp16=fp16)
    onnx.helper.set_model_props(proto, as_texts(description))
    path.write_bytes(proto.SerializeToString())
    path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return _runner(path, preprocess=preprocess)


def _with_preprocessing(proto: onnx.ModelProto, metadata: ModelMetadata) -> onnx.ModelProto:
    first = onnx_preprocessing.preprocessing_model(metadata.preprocessing)
    first = onnx.compose.add_prefix(first, "preprocess/", rename_inputs=False, rename_outputs=False)
    first.ir_version = proto.ir_version
    io_map = [(onnx_preprocessing.OUTPUT, INPUT)]
    return onnx.compose.merge_models(
        first, proto, io_map, producer_name=proto.producer_name, producer_version=proto.producer_version
    )


def _describe_input(side: int, *, preprocess: bool) -> dict[str, object]:
    if preprocess:
        content = "RGB images, upright; all images of a batch have one size"
        return {
            "name": onnx_preprocessing.INPUT,
            "type": "uint8",
            "shape": ["batch", "height", "width", 3],
            "content": content,
        }
    content = "RGB images, resized, cropped and normalized as `preprocessing` says"
    return {"name": INPUT, "type": "float32", "shape": ["batch", 3, side, side], "content": content}


def _runner(path: Path, *, preprocess: bool) -> RunExported:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    is_first = True

    def run_preprocessed(images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: inputs.numpy()})
        return torch.from_numpy(logits)

    def run_images(images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
        nonlocal is_first
        rows = []
        for image in images:
            # Images differ in size: the first is tried in a batch of two, the others alone.
            batch = np.stack([image] * (2 if is_first else 1))
            is_first = False
            (logits,) = session.run([OUTPUT], {onnx_preprocessing.INPUT: batch})
            rows.append(torch.from_numpy(logits)[-1])
        return torch.stack(rows)

    return run_images if preprocess else run_preprocessed

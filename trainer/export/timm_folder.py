"""Export a model as a folder, with model.safetensors and config.json, that timm or Hugging Face's transformers loads.

transformers loads timm's models by its TimmWrapper classes. It has no classes for torchvision's models, and timm has
few of them with the same names of weights: those are exported, and the others refused.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn

from regraft.contract import MODEL
from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.export.verification import RunExported
from trainer.model.architectures import is_timm
from trainer.model.build import build
from trainer.model.encoder_classifier import EncoderClassifier
from trainer.model.file import LoadedModel
from trainer.model.metadata import ModelMetadata, write_model


def export_timm(loaded: LoadedModel, folder: Path, *, license_id: str) -> RunExported:
    """Write the folder for timm's `create_model("local-dir:FOLDER", pretrained=True)`; return how to run it.

    Raises:
        UserError: timm has no such model.

    """
    _write(loaded, folder, license_id=license_id, extra={})
    exported = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(exported), is_training=False)

    def run(images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
        logits: Tensor = exported(pixels)
        return logits

    return run


def export_hf(loaded: LoadedModel, folder: Path, *, license_id: str) -> RunExported:
    """Write the folder for transformers' `pipeline("image-classification", FOLDER)`; return how to run it.

    Raises:
        UserError: timm has no such model, so that transformers cannot load it.

    """
    extra = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    _write(loaded, folder, license_id=license_id, extra=extra)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported; the folder has all that is needed
    import transformers  # noqa: PLC0415 (slow)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipeline: Any = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    label_of = {name: label for label, name in enumerate(loaded.metadata.classes)}

    def run(images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
        logits = torch.full((len(images), len(label_of)), torch.nan)
        for row, image in zip(logits, images, strict=True):
            answers = pipeline(Image.fromarray(image), top_k=len(label_of), function_to_apply="none")
            for answer in answers:
                row[label_of[answer["label"]]] = answer["score"]
        return logits

    return run


def _write(loaded: LoadedModel, folder: Path, *, license_id: str, extra: dict[str, Any]) -> None:
    metadata = loaded.metadata
    own = _timm_model(metadata)
    try:
        own.load_state_dict(loaded.module.state_dict(), strict=True)
    except RuntimeError:
        raise UserError(_refusal(metadata.architecture)) from None
    save_for_hf(
        own,
        str(folder),
        safe_serialization=True,
        model_config={
            "label_names": list(metadata.classes),
            "pretrained_cfg": {"tag": "regraft", "license": license_id},
            **extra,
        },
        data_config=_data_config(metadata.preprocessing),
    )
    _remove_num_classes(folder / "config.json")
    # The same weights, with a header that makes the file a model file of regraft and that transformers expects.
    write_model(folder / MODEL, own.state_dict(), metadata)


def _remove_num_classes(path: Path) -> None:
    """Remove the number of classes from timm's arguments: it has its own entry, and transformers rejects a second."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _timm_model(metadata: ModelMetadata) -> nn.Module:
    name, classes = metadata.architecture, len(metadata.classes)
    if is_timm(name):
        model = build(name, image_size=metadata.preprocessing.image_size, num_classes=classes)
        if isinstance(model, EncoderClassifier):
            raise UserError(
                f"{name} is an encoder without a classifier in timm, which cannot load the one that regraft has added. "
                "Use --to onnx or --to torch-export"
            )
        return model
    if not timm.is_model(name):
        raise UserError(_refusal(name))
    return timm.create_model(name, pretrained=False, num_classes=classes)


def _refusal(architecture: str) -> str:
    return (
        f"{architecture} of torchvision cannot be exported for timm or transformers: timm has no model whose weights "
        "have the same names and shapes. Use --to onnx or --to torch-export, or train one of timm's models "
        "(model.name timm/NAME)"
    )


def _data_config(preprocessing: Preprocessing) -> dict[str, Any]:
    size = preprocessing.image_size
    return {
        "input_size": (3, size, size),
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "crop_pct": crop_fraction(size, preprocessing.resize_size),
        "crop_mode": "squash" if preprocessing.resize == "squash" else "center",
    }


def crop_fraction(image_size: int, resize_size: int) -> float:
    """Return the fraction of which timm computes the resize size: floor(image_size / fraction)."""
    fraction = image_size / resize_size
    return fraction if math.floor(image_size / fraction) == resize_size else math.nextafter(fraction, 0)

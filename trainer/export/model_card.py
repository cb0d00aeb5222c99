"""The model card of an exported folder: README.md with what Hugging Face's hub reads at its head."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from trainer.export.verification import Verification
from trainer.model.metadata import ModelMetadata
from trainer.text import escape_unprintable

_USAGE = {
    "hf": """\
from transformers import pipeline

classifier = pipeline("image-classification", "FOLDER")
print(classifier("image.jpg", top_k=1))
""",
    "timm": """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax().item()])
""",
}
_RESULTS = ("epoch", "selected_on", "test_", "val_")
"""Start of the names of the metrics that are results, not times or memory."""
LIBRARIES = {"hf": "transformers", "timm": "timm"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run folder says about the training; empty if there is no run folder."""

    data: str = ""
    """Name of the dataset and number of its images."""
    command: str = ""
    """Command line of the training."""


def model_card(
    metadata: ModelMetadata, training: Training, verification: Verification, *, target: str, license_id: str
) -> str:
    """Return the text of README.md."""
    preprocessing = metadata.preprocessing
    resize = "both sides" if preprocessing.resize == "squash" else "the shorter side"
    lines = [
        "---",
        f"license: {license_id}",
        f"library_name: {LIBRARIES[target]}",
        "pipeline_tag: image-classification",
        "tags:",
        "- image-classification",
        "- timm",
        "- regraft",
        "---",
        "",
        f"# {metadata.architecture} for {len(metadata.classes)} classes",
        "",
        f"An image classifier, trained by regraft {metadata.version} {_source(metadata.source)}.",
        "",
        "## Classes",
        "",
        *(f"{number}. {_code(name)}" for number, name in enumerate(metadata.classes, start=1)),
        "",
        "## Results",
        "",
        *_table(metadata.metrics),
        "",
        f"The export was compared with the original: {verification}.",
        "",
        "## Training",
        "",
        f"Data: {escape_unprintable(training.data) or 'not recorded'}.",
        "",
        *(["```sh", escape_unprintable(training.command), "```"] if training.command else ["Command: not recorded."]),
        "",
        "## Preprocessing",
        "",
        f"Images are RGB and upright; {resize} resized to {preprocessing.resize_size} pixels "
        f"({preprocessing.interpolation}), then the central {preprocessing.image_size} x {preprocessing.image_size} "
        f"pixels; mean {list(preprocessing.mean)}, standard deviation {list(preprocessing.std)}.",
        "",
        "## Usage",
        "",
        "```python",
        _USAGE[target].rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _source(source: str) -> str:
    """Return where the weights came from; of a file, its name alone."""
    path = source.removeprefix("file ")
    if source == "from scratch":
        return source
    return escape_unprintable(f"from {source}" if path == source else f"from the file {PurePath(path).name}")


def _table(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        (key, f"{value:.4f}" if isinstance(value, float) else value)
        for key, value in metrics.items()
        if key.startswith(_RESULTS) and isinstance(value, str | int | float)
    ]
    if not rows:
        return ["None are recorded in the model file."]
    return ["| metric | value |", "| --- | --- |", *(f"| {_code(key)} | {_code(str(value))} |" for key, value in rows)]


def _code(text: str) -> str:
    """Return a text as code in Markdown, whatever it contains."""
    shown = escape_unprintable(text).replace("|", "\\|")
    longest = max((len(run) for run in _backticks(shown)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest else ""
    return f"{fence}{padding}{shown}{padding}{fence}"


def _backticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]

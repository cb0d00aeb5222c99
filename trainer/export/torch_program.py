"""Export a model as a program of torch.export (.pt2), and run it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.export.description import describe
from trainer.export.exporting import exporting
from trainer.export.verification import RunExported
from trainer.model.file import LoadedModel

METADATA = "regraft.json"
"""Extra file of the program: classes, preprocessing and the other fields of the model file's header, as JSON."""


def export_program(loaded: LoadedModel, path: Path) -> RunExported:
    """Write a model as a program from float32 [N, 3, S, S], normalized, to logits; return how to run it.

    Raises:
        UserError: the model cannot be exported.

    """
    metadata = loaded.metadata
    size = metadata.preprocessing.image_size
    with exporting(metadata.architecture, "a program of torch.export"):
        program = torch.export.export(
            loaded.module, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA: json.dumps(describe(metadata))})
    path.write_bytes(content.getbuffer())
    with exporting(metadata.architecture, "a program of torch.export"):
        program_module: Any = torch.export.load(path).module()

    def run(images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
        logits: Tensor = program_module(inputs)
        return logits

    return run

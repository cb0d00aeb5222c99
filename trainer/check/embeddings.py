"""Embeddings of the images of a dataset: the features before the output layer of a pretrained or trained model."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from regraft.contract import available_cores, own_version, physical_cores
from trainer.distributed.allocator import keep_freed_memory
from trainer.errors import UserError
from trainer.inference.file_logits import BatchOptions, FileLogits
from trainer.inference.predictor import Predictor, eval_execution, find_device
from trainer.model.architectures import architectures, is_timm
from trainer.model.build import preset
from trainer.model.create import build_model
from trainer.model.file import LoadedModel, load
from trainer.model.metadata import ModelMetadata
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable


@dataclass(frozen=True)
class Embedder:
    """A model whose features describe images."""

    predictor: Predictor
    metadata: ModelMetadata
    """Of a published model, its classes are placeholders."""
    digest: str
    """Hash of the weights before the output layer, the preprocessing and the arithmetic."""


def load_embedder(
    model: str, *, weights: str = "DEFAULT", device: str = "auto", on_progress: Callable[[str], None] | None = None
) -> Embedder:
    """Return a model that computes embeddings.

    Args:
        model: a model of torchvision, or of timm as `timm/NAME`, or a run folder or its model file.
        weights: pretrained weights of a model that is given by its name: DEFAULT, another name, or a file.
        device: auto, cpu or cuda.
        on_progress: called with one line before a download.

    Raises:
        UserError: there is no such model, its weights do not fit, or there is no such device.

    """
    chosen = find_device(device)
    is_name = is_timm(model) or model in architectures() or not os.path.lexists(Path(model).expanduser())
    loaded = _load_pretrained(model, weights, on_progress) if is_name else load(model)
    execution = eval_execution(loaded.metadata, chosen)
    if chosen.type == "cpu":
        torch.set_num_threads(physical_cores())
        keep_freed_memory(os.environ)
    digest = hashlib.sha256(repr((asdict(loaded.metadata.preprocessing), execution, torch.__version__)).encode())
    heads = tuple(f"{head}." for head in loaded.heads)  # random in a published model, and not used
    for name, tensor in loaded.module.state_dict().items():
        if not name.startswith(heads):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return Embedder(Predictor(loaded, chosen, execution), loaded.metadata, digest.hexdigest()[:24])


def _load_pretrained(name: str, weights: str, on_progress: Callable[[str], None] | None) -> LoadedModel:
    preprocessing = preset(name, weights)
    built = build_model(
        name,
        image_size=preprocessing.image_size,
        num_classes=2,  # the output layer is not used
        weights=weights,
        head_init="torch",
        on_progress=on_progress,
    )
    metadata = ModelMetadata(
        version=own_version(),
        architecture=name,
        classes=("0", "1"),
        preprocessing=preprocessing,
        source=built.source,
        metrics={},
    )
    return LoadedModel(built.model.eval(), built.heads, metadata)


class _Features:
    """Gives features where `FileLogits` expects logits."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self.device = predictor, predictor.device

    def logits(self, images: Tensor, *, tta: bool) -> Tensor:
        assert not tta
        return self._predictor.features(images)


def embed(
    embedder: Embedder,
    paths: Sequence[str],
    digests: Sequence[str],
    *,
    cache: Path,
    on_progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """Return the embeddings of readable images, float32 [N, D].

    They are kept in one array for each model and dataset folder, and found by the hash of a file's content, so that
    only new and changed images are computed. What was computed is kept if the command is stopped.

    Args:
        embedder: the model.
        paths: the images.
        digests: SHA-256 of each file, in hexadecimal digits.
        cache: cache folder.
        on_progress: called with (images done, total images).

    Raises:
        UserError: an image cannot be read, or a feature is not finite.

    """
    folder = os.path.commonpath([Path(path).absolute().parent for path in paths])
    name = hashlib.sha256(f"{embedder.digest}\0".encode() + os.fsencode(folder)).hexdigest()[:24]
    file = cache / "embeddings" / f"{name}.safetensors"
    known = _read(file)
    missing = {digest: path for path, digest in zip(paths, digests, strict=True) if digest not in known}
    new = dict(zip(missing.values(), missing.keys(), strict=True))
    # While a thread computes a batch, the others decode the next ones.
    options = BatchOptions(batch_size=None, threads=available_cores() + 1, one_forward_at_a_time=True)
    errors: dict[str, str] = {}
    total = len(known) + len(new)
    try:
        for batch in FileLogits(_Features(embedder.predictor), embedder.metadata, options)([*new]):
            rows = iter(batch.logits.numpy())
            for path, error in zip(batch.paths, batch.errors, strict=True):
                if error is None:
                    known[new[path]] = next(rows)
                else:
                    errors[path] = error
            if on_progress is not None:
                on_progress(len(known) + len(errors), total)
    finally:
        if new:
            _write(file, {digest: known[digest] for digest in dict.fromkeys(digests) if digest in known})
    if errors:
        path, error = next(iter(errors.items()))
        raise UserError(
            f"{escape_unprintable(path)}: {error}; it has changed since it was checked. Check the data again"
        )
    return np.stack([known[digest] for digest in digests])


def _read(file: Path) -> dict[str, np.ndarray]:
    """Return SHA-256 -> embedding; empty if the file is missing or damaged."""
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError):
        content = load_file(file)
        digests, features = content["digests"], content["features"]
        if digests.dtype == np.uint8 and digests.shape == (len(features), 32) and features.dtype == np.float32:
            return dict(zip((bytes(row).hex() for row in digests), features, strict=True))
    return {}


def _write(file: Path, known: dict[str, np.ndarray]) -> None:
    if not known:
        return
    digests = np.frombuffer(bytes.fromhex("".join(known)), dtype=np.uint8).reshape(len(known), 32)
    content = save({"digests": digests.copy(), "features": np.stack([*known.values()])})
    with suppress(OSError):  # without the cache, the next check computes them again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda temporary: temporary.write_bytes(content))

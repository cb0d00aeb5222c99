"""Find timm's published weights: in the caches of the Hugging Face Hub and torch.hub, or by a download."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from trainer.errors import UserError

_SAFE_NAMES = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
"""File of a repository -> the file with the same tensors that is preferred."""


@dataclass(frozen=True)
class PublishedWeights:
    """Where timm's weights of a model are published."""

    name: str
    """Name of the model, `timm/NAME`."""
    repo_id: str
    """Repository on the Hugging Face Hub; empty if the weights are published at `url` alone."""
    revision: str | None
    files: tuple[str, ...]
    """Names of the file in the repository, the preferred one first."""
    url: str

    @property
    def label(self) -> str:
        """Return where the weights are published."""
        return f"Hugging Face Hub {self.repo_id}" if self.repo_id else self.url

    @property
    def local_path(self) -> Path:
        """Return the path at which a file is found that was copied there by hand, or by torch.hub."""
        if self.repo_id:  # many repositories have a file of the same name
            name = f"{self.repo_id.replace('/', '--')}--{Path(self.files[0]).name}"
        else:
            name = Path(urlparse(self.url).path).name
        return Path(torch.hub.get_dir()) / "checkpoints" / name

    def cached(self) -> Path | None:
        """Return the file in one of the caches; None if it has to be downloaded."""
        if self.local_path.exists():
            return self.local_path
        if self.repo_id:
            from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (a requirement of timm)

            for file in self.files:
                path = try_to_load_from_cache(self.repo_id, file, revision=self.revision)
                if isinstance(path, str):
                    return Path(path)
        return None

    def download(self, on_progress: Callable[[str], None] | None) -> Path:
        """Return the file, downloaded into the cache.

        Raises:
            UserError: the download fails.

        """
        if on_progress is not None:
            on_progress(f"downloading the weights of {self.name} from {self.label}")
        try:
            return self._download_from_hub() if self.repo_id else self._download_url()
        except Exception as error:  # the hub's client raises errors of several libraries
            raise UserError(self._explain(error)) from error

    def _download_from_hub(self) -> Path:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 (a requirement of timm)
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415

        with _without_progress_bars():
            for file in self.files[:-1]:
                try:
                    return Path(hf_hub_download(self.repo_id, file, revision=self.revision))
                except LocalEntryNotFoundError:  # there is no network
                    raise
                except EntryNotFoundError:
                    continue
            return Path(hf_hub_download(self.repo_id, self.files[-1], revision=self.revision))

    def _download_url(self) -> Path:
        self.local_path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(self.url, str(self.local_path), progress=False)
        return self.local_path

    def _explain(self, error: Exception) -> str:
        from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415 (a requirement of timm)

        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        where = f"https://huggingface.co/{self.repo_id}, file {self.files[0]}" if self.repo_id else self.url
        license_advice = ""
        if isinstance(error, GatedRepoError):
            license_advice = (
                f"  Accept their license at https://huggingface.co/{self.repo_id}, and log in: hf auth login\n"
            )
        return (
            f"could not download the weights of {self.name} ({reason}).\n"
            f"  from: {where}\n{license_advice}"
            f"  Either put that file at {self.local_path}, name a local file in model.weights, or set model.weights to "
            "null for random weights"
        )


def find_published(name: str, cfg: Any) -> PublishedWeights:
    """Return where timm's weights of `timm/NAME` are published, by timm's description of them, a `PretrainedCfg`.

    Raises:
        UserError: timm has none, or they have a format that only their own code reads.

    """
    repo_id, _, revision = (cfg.hf_hub_id or "").partition("@")
    file = cfg.hf_hub_filename or "pytorch_model.bin"
    files = (_SAFE_NAMES[file], file) if file in _SAFE_NAMES else (file,)
    url = cfg.url if isinstance(cfg.url, str) else ""
    if not repo_id and not url:
        raise UserError(
            f"model.weights is DEFAULT, but timm has no weights of {name}: set model.weights to a local file, or to "
            "null for random weights"
        )
    if (file if repo_id else url).endswith((".npz", ".npy")):
        raise UserError(
            f"the weights of {name} are published as {file if repo_id else url}, which is not a PyTorch file: convert "
            "them with timm, and name the file in model.weights"
        )
    return PublishedWeights(name, repo_id, revision or None, files, url)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from huggingface_hub import utils  # noqa: PLC0415 (a requirement of timm)

    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()

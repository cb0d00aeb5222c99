from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.data import registry, synthetic
from trainer.data.download import RemoteDataset
from trainer.data.registry import REGISTRY, cache_folder, dataset_names, is_known, resolve_root
from trainer.errors import UserError


def error_of(root: str, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        resolve_root(root, cache=tmp_path / "cache", seed=0)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_dataset_names_are_those_in_the_config() -> None:
    assert dataset_names() == ("hotdog", "synthetic-source", "synthetic-target")
    assert all(is_known(name) for name in dataset_names())
    assert not is_known("Hotdog")


def test_existing_folder_takes_precedence_over_a_dataset_name() -> None:
    Path("hotdog").mkdir()
    assert not is_known("hotdog")
    assert resolve_root("hotdog", cache=Path("cache"), seed=0) == Path("hotdog")


def test_path_is_returned_with_the_home_folder_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "图 片.csv").touch()
    assert resolve_root("~/图 片.csv", cache=tmp_path / "cache", seed=0) == tmp_path / "图 片.csv"
    assert not (tmp_path / "cache").exists()


def test_registered_dataset_is_fetched_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch_dataset(dataset: RemoteDataset, cache: Path, *, on_progress: Callable[..., None] | None = None) -> Path:
        calls.append((dataset, cache, on_progress))
        return cache / "there"

    def on_progress(done: int, total: int | None) -> None:
        pass

    monkeypatch.setattr(registry, "fetch_dataset", fetch_dataset)
    assert resolve_root("hotdog", cache=tmp_path, seed=3, on_progress=on_progress) == tmp_path / "there"
    assert calls == [(REGISTRY["hotdog"], tmp_path, on_progress)]


def test_synthetic_dataset_is_cached_by_version_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Mapping[str, object]] = []
    monkeypatch.setattr(
        synthetic,
        "generate",
        lambda task, folder, *, seed: calls.append({"task": task, "folder": folder, "seed": seed}),
    )
    monkeypatch.setattr(synthetic, "VERSION", 7)
    cache = tmp_path / "not yet" / "there"
    folder = resolve_root("synthetic-target", cache=cache, seed=5)
    assert folder == cache / "synthetic-target-v7-seed5"
    assert calls == [{"task": "target", "folder": folder, "seed": 5}]
    assert cache.is_dir()


@pytest.mark.parametrize(
    ("root", "meant"),
    [
        *((root, "hotdog") for root in ("hotdogs", "Hotdog", "hot-dog", "/somewhere/hotdog")),
        ("synthetic_target", "synthetic-target"),
        ("data/flowers", None),
    ],
)
def test_similar_dataset_name_is_suggested(root: str, meant: str | None, tmp_path: Path) -> None:
    text = error_of(root, tmp_path)
    assert f"data.root is {root!r}: there is no such folder or CSV file" in text
    assert "(hotdog, synthetic-source, synthetic-target)" in text
    assert text.endswith(f"Did you mean {meant}?" if meant else "(hotdog, synthetic-source, synthetic-target).")


@pytest.mark.parametrize("root", ["", "  "])
def test_empty_root_is_an_error(root: str, tmp_path: Path) -> None:
    assert "data.root is empty" in error_of(root, tmp_path)


@pytest.mark.parametrize("root", ["x" * 5000, "~nobody-of-this-name/images", "a\0b"])
def test_invalid_path_is_an_error(root: str, tmp_path: Path) -> None:
    assert "data.root is " in error_of(root, tmp_path)


def test_unusable_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    text = error_of("synthetic-source", tmp_path)
    assert f"the cache {tmp_path / 'cache'} cannot be used (File exists" in text


def test_cache_folder_comes_from_the_option_the_environment_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REGRAFT_CACHE", "~/mine")
    assert cache_folder("option") == tmp_path / "here" / "option"
    assert cache_folder(None) == tmp_path / "mine"
    monkeypatch.setenv("REGRAFT_CACHE", "")
    assert cache_folder(None) == tmp_path / ".cache" / "regraft"


def test_cache_in_a_missing_home_folder_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no such home folder"):
        cache_folder("~nobody-of-this-name/cache")

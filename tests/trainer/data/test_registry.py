from pathlib import Path
from typing import Any

import pytest

from trainer.data import registry, synthetic
from trainer.data.registry import REGISTRY, cache_folder, dataset_names, is_known, resolve_root
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_existing_path_takes_precedence_over_a_dataset_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "图 片.csv").touch()
    assert resolve_root("~/图 片.csv", cache=Path("cache"), seed=0) == tmp_path / "图 片.csv"
    assert dataset_names() == ("hotdog", "synthetic-source", "synthetic-target")
    assert all(is_known(name) for name in dataset_names())
    Path("hotdog").mkdir()
    assert not is_known("hotdog")
    assert resolve_root("hotdog", cache=Path("cache"), seed=0) == Path("hotdog")
    assert not Path("cache").exists()


def test_registered_dataset_is_fetched_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch_dataset(*arguments: object, on_progress: object) -> Path:
        calls.append((*arguments, on_progress))
        return tmp_path / "there"

    def on_progress(done: int, total: int | None) -> None:
        pass

    monkeypatch.setattr(registry, "fetch_dataset", fetch_dataset)
    assert resolve_root("hotdog", cache=tmp_path, seed=3, on_progress=on_progress) == tmp_path / "there"
    assert calls == [(REGISTRY["hotdog"], tmp_path, on_progress)]


def test_synthetic_dataset_is_cached_by_version_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Path, int]] = []
    monkeypatch.setattr(synthetic, "generate", lambda task, folder, *, seed: calls.append((task, folder, seed)))
    monkeypatch.setattr(synthetic, "VERSION", 7)
    cache = tmp_path / "not yet" / "there"
    folder = resolve_root("synthetic-target", cache=cache, seed=5)
    assert calls == [("target", cache / "synthetic-target-v7-seed5", 5)]
    assert folder == calls[0][1]
    assert cache.is_dir()


NOT_A_PATH = r"there is no such folder or CSV file.*\(hotdog, synthetic-source, synthetic-target\)\."


@pytest.mark.parametrize(
    ("root", "message"),
    [
        *((root, NOT_A_PATH + r" Did you mean hotdog\?$") for root in ("hotdogs", "Hotdog", "/somewhere/hot-dog")),
        ("synthetic_target", NOT_A_PATH + r" Did you mean synthetic-target\?$"),
        ("data/flowers", NOT_A_PATH + "$"),
        ("  ", "data.root is empty"),
        ("x" * 5000, "it cannot be accessed"),
        ("~nobody-of-this-name/images", "it cannot be accessed"),
        ("a\0b", "data.root is "),
        ("synthetic-source", r"the cache .*/occupied cannot be used \(File exists"),
    ],
)
def test_invalid_root_or_cache_is_an_error(root: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "occupied").touch()
    with pytest.raises(UserError, match=message):
        resolve_root(root, cache=tmp_path / "occupied", seed=0)


def test_cache_folder_is_the_option_the_environment_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REGRAFT_CACHE", "~/mine")
    assert cache_folder("option") == tmp_path / "here" / "option"
    assert cache_folder(None) == tmp_path / "mine"
    monkeypatch.setenv("REGRAFT_CACHE", "")
    assert cache_folder(None) == tmp_path / ".cache" / "regraft"
    with pytest.raises(UserError, match="there is no such home folder"):
        cache_folder("~nobody-of-this-name/cache")

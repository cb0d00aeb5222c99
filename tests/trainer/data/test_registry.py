from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.data import registry, synthetic
from trainer.data.download import KNOWN, KnownDataset
from trainer.data.registry import cache_folder, is_known, known_names, locate
from trainer.errors import UserError


def error_of(root: str, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        locate(root, cache=tmp_path / "cache", seed=0)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_the_names_are_those_that_the_config_promises() -> None:
    assert known_names() == ("hotdog", "synthetic-source", "synthetic-target")
    assert all(is_known(name) for name in known_names())
    assert not is_known("Hotdog")


def test_a_folder_of_a_known_name_wins() -> None:
    Path("hotdog").mkdir()
    assert not is_known("hotdog")
    assert locate("hotdog", cache=Path("cache"), seed=0) == Path("hotdog")


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "图 片.csv").touch()
    assert locate("~/图 片.csv", cache=tmp_path / "cache", seed=0) == tmp_path / "图 片.csv"
    assert not (tmp_path / "cache").exists()


def test_a_known_name_is_fetched_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(dataset: KnownDataset, cache: Path, *, on_progress: Callable[..., None] | None = None) -> Path:
        asked.append((dataset, cache, on_progress))
        return cache / "there"

    def on_progress(done: int, total: int | None) -> None:
        pass

    monkeypatch.setattr(registry, "fetch", fetch)
    assert locate("hotdog", cache=tmp_path, seed=3, on_progress=on_progress) == tmp_path / "there"
    assert asked == [(KNOWN["hotdog"], tmp_path, on_progress)]


def test_a_drawn_data_set_lies_in_the_cache_by_version_and_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Mapping[str, object]] = []
    monkeypatch.setattr(
        synthetic,
        "draw",
        lambda task, folder, *, seed: drawn.append({"task": task, "folder": folder, "seed": seed}),
    )
    monkeypatch.setattr(synthetic, "VERSION", 7)
    cache = tmp_path / "not yet" / "there"
    folder = locate("synthetic-target", cache=cache, seed=5)
    assert folder == cache / "synthetic-target-v7-seed5"
    assert drawn == [{"task": "target", "folder": folder, "seed": 5}]
    assert cache.is_dir()


def test_a_drawn_data_set_is_drawn_once(tmp_path: Path) -> None:
    folder = locate("synthetic-target", cache=tmp_path, seed=0)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert before
    assert locate("synthetic-target", cache=tmp_path, seed=0) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == before


@pytest.mark.parametrize(
    ("root", "meant"),
    [
        ("hotdogs", "hotdog"),
        ("Hotdog", "hotdog"),
        ("hot-dog", "hotdog"),
        ("/somewhere/hotdog", "hotdog"),
        ("synthetic_target", "synthetic-target"),
    ],
)
def test_a_near_miss_is_told_what_was_meant(root: str, meant: str, tmp_path: Path) -> None:
    text = error_of(root, tmp_path)
    assert f"data.root is {root!r}: there is no such folder or CSV file" in text
    assert "(hotdog, synthetic-source, synthetic-target)" in text
    assert text.endswith(f"Did you mean {meant}?")


def test_a_far_miss_has_no_hint(tmp_path: Path) -> None:
    assert error_of("data/flowers", tmp_path).endswith("(hotdog, synthetic-source, synthetic-target).")


@pytest.mark.parametrize("root", ["", "  "])
def test_an_empty_root_is_not_the_folder_one_stands_in(root: str, tmp_path: Path) -> None:
    assert "data.root is empty" in error_of(root, tmp_path)


@pytest.mark.parametrize("root", ["x" * 5000, "~nobody-of-this-name/images", "a\0b"])
def test_what_cannot_be_a_path_is_an_error_like_any_other(root: str, tmp_path: Path) -> None:
    assert "data.root is " in error_of(root, tmp_path)


def test_an_unusable_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    text = error_of("synthetic-source", tmp_path)
    assert f"the cache {tmp_path / 'cache'} cannot be used (File exists" in text


def test_the_cache_is_where_it_is_asked_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("REGRAFT_CACHE", "~/mine")
    assert cache_folder("asked") == tmp_path / "here" / "asked"
    assert cache_folder(None) == tmp_path / "mine"
    monkeypatch.setenv("REGRAFT_CACHE", "")
    assert cache_folder(None) == tmp_path / ".cache" / "regraft"


def test_a_cache_in_nobodys_home_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no such home folder"):
        cache_folder("~nobody-of-this-name/cache")

import hashlib
import threading
from pathlib import Path

import pytest
from PIL import Image

from trainer.data import synthetic
from trainer.data.synthetic import PATTERNS, SHAPES, TASKS, Task, generate, make_image


@pytest.fixture(autouse=True)
def _small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task((("plain", "ring"), ("striped", "star")), {"train": 3, "test": 2})
    monkeypatch.setattr(synthetic, "TASKS", {"small": task})


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tasks_share_shapes_and_patterns_but_no_class() -> None:
    source, target = TASKS["source"], TASKS["target"]
    assert not set(source.classes) & set(target.classes)
    assert {p for p, _ in source.classes} == set(PATTERNS) == {p for p, _ in target.classes}
    assert {s for _, s in source.classes} == set(SHAPES) > {s for _, s in target.classes}
    assert len(source.classes) > 4 * len(target.classes)
    assert source.images_per_class["train"] > 4 * target.images_per_class["train"]


def test_images_are_jpeg_files_that_depend_on_the_seed_only(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate("small", tmp_path / name, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert "train/plain-ring/0002.jpg" in a
    assert len({*a.values(), *c.values()}) == 20, "no image appears twice"
    generate("small", tmp_path / "a", seed=2)
    assert contents(tmp_path / "a") == a, "an existing folder is not changed"
    with Image.open(tmp_path / "a" / "test" / "striped-star" / "0000.jpg") as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated = 0

    def interrupted(*arguments: object) -> Image.Image:
        nonlocal generated
        generated += 1
        if generated == 7:
            raise KeyboardInterrupt
        return make_image(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "make_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate("small", tmp_path / "x", seed=1)
    assert not list(tmp_path.iterdir())


def test_concurrent_generation_is_safe(tmp_path: Path) -> None:
    threads = [threading.Thread(target=generate, args=("small", tmp_path / "x"), kwargs={"seed": 1}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert len(contents(tmp_path / "x")) == 10

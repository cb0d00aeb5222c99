import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import image_folder, noise_image
from trainer.config.sections.data import DataConfig
from trainer.data import validation
from trainer.data.decode import decode
from trainer.data.prepare import ProgressHooks, prepare
from trainer.data.read_index import read_index
from trainer.errors import UserError


def config(root: Path, **options: object) -> DataConfig:
    return replace(DataConfig(root=str(root)), **options)  # type: ignore[arg-type]


def make_small_folder(root: Path) -> Path:
    return image_folder(root, {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})


def make_dirty_folder(root: Path) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Write a typical dataset folder; return its valid images, and its invalid files with the reason."""
    latin1 = os.fsdecode(b"caf\xe9")
    names = [
        f"{part}/{name}"
        for part in ("train", "val")
        for name in ("猫 猫/照片 1.png", f"猫 猫/{latin1}.png", "b/a (1).PNG")
    ]
    good = {name: noise_image(number, size=(48, 32)) for number, name in enumerate(names)}
    good["train/b/really a gif.jpe.Jpg"] = noise_image(9).quantize(8)
    for name, image in good.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, format="GIF" if "gif" in name else None)
    whole = (root / names[0]).read_bytes()
    bad = {
        "train/b/truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "val/b/empty.jpg": (b"", "an empty file (0 bytes)"),
        "train/b/text.jpg": (b"<html>404</html>", "text"),
        f"train/b/{os.fsdecode(bytes([0xFF]))}.jpg": (b"\0" * 99, "not an image"),
    }
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    for name in (".hidden.jpg", "._1.jpeg", "Thumbs.db", "notes.txt", "animation.mp4"):
        (root / "train" / "b" / name).write_bytes(b"ignored")
    return good, {name: reason for name, (_, reason) in bad.items()}


def test_each_image_of_a_dirty_folder_is_decoded_or_listed(tmp_path: Path) -> None:
    good, bad = make_dirty_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path), workers=2)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(bad)} of {len(good) + len(bad)} images cannot be read:"
    assert len(lines) == len(bad) + 2
    for name, reason in bad.items():
        shown = name.replace("\udcff", r"\xff")
        assert any(line.startswith(f"  {tmp_path}/{shown}: ") and reason in line for line in lines), name
    assert str(caught.value).encode("utf-8")

    prepared = prepare(config(tmp_path, on_unreadable="skip"), workers=2)
    index = prepared.index
    examples = {os.path.relpath(path, tmp_path): label for path, label in (*index.train, *index.test)}
    assert examples.keys() == good.keys()
    for name, label in examples.items():
        assert name.split("/")[1] == index.classes[label]
        assert np.array_equal(decode(tmp_path / name), good[name].convert("RGB")), name
    notes = "\n".join(prepared.notes)
    assert notes.encode("utf-8")
    assert any(note.startswith("4 of ") and note.count("\n") == 4 for note in prepared.notes)
    assert "1 .mp4, 1 .txt" in notes
    assert "hidden files and folders ignored: 3" in notes


def test_conversions_and_images_of_one_color_are_reported(tmp_path: Path) -> None:
    root = make_small_folder(tmp_path)
    for name in ("a/000.png", "b/000.png"):
        Image.fromarray(np.linspace(0, 4095, 12).astype(np.uint16).reshape(3, 4)).save(root / "train" / name)
    for number in range(4):
        Image.new("RGB", (3, 3), (number, 2, 3)).save(root / "train" / "b" / f"one color {number}\n.png")
    *_, conversion, one_color = prepare(config(root), workers=1).notes
    scaled = "gray values scaled from 0..4095, judged by the largest value of each image"
    assert conversion == f"images with {scaled}: 2, such as {root}/train/a/000.png"
    names = ", ".join(rf"{root}/train/b/one color {number}\n.png" for number in range(4))
    assert one_color == f"images of one color only: 4 ({names})"


def test_the_content_digest_depends_on_the_contents_alone(tmp_path: Path) -> None:
    root = make_small_folder(tmp_path)
    image = root / "train" / "a" / "000.png"
    content = image.read_bytes()
    digests = []
    for changed in (content, noise_image(99), content):
        image.write_bytes(changed) if isinstance(changed, bytes) else changed.save(image)
        digests.append(prepare(config(root), workers=1).content_digest)
    assert digests[0] == digests[2] != digests[1]


def test_images_are_not_decoded_without_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "decode_file", pytest.fail)
    make_small_folder(tmp_path)
    (tmp_path / "train" / "a" / "bad.jpg").write_bytes(b"")
    assert len(prepare(config(tmp_path), workers=1, check=False).index.train) == 9


def test_progress_is_reported_and_results_are_saved_in_the_configured_cache(tmp_path: Path) -> None:
    events: list[object] = []

    @contextmanager
    def show() -> Iterator[Callable[[int, int], None]]:
        events.append("open")
        yield lambda done, total: events.append((done, total))
        events.append("closed")

    data = config(make_small_folder(tmp_path / "data"), cache=str(tmp_path / "cache"))
    prepare(data, workers=1, displays=ProgressHooks(checking=show))
    assert (events[0], *events[-2:]) == ("open", (12, 12), "closed")
    assert len(list((tmp_path / "cache" / "validation").iterdir())) == 1


def test_options_are_passed_to_the_index(tmp_path: Path) -> None:
    image_folder(tmp_path, {"": {"a": 10, "b": 10}})
    options = {"val_fraction": 0.25, "test_fraction": 0.2, "seed": 3, "extensions": (".png",)}
    index = read_index(tmp_path, **options)  # type: ignore[arg-type]
    assert prepare(config(tmp_path, **options), workers=1).index == index


def test_fingerprint_depends_on_the_examples_but_not_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_folder(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "other")
    make_small_folder(tmp_path / "one")

    def fingerprint(root: Path | str) -> str:
        return prepare(config(Path(root)), workers=1).fingerprint

    first = fingerprint(tmp_path / "one")
    assert first == fingerprint(tmp_path / "other")
    for folder, root in ((tmp_path, "one"), (tmp_path / "one", ".")):
        monkeypatch.chdir(folder)
        assert first == fingerprint(root)
    image = tmp_path / "other" / "train" / "a" / "000.png"
    image.rename(image.with_name("9.png"))
    assert first != fingerprint(tmp_path / "other")
    image.with_name("9.png").rename(image.with_name(os.fsdecode(b"\xff\xe9.png")))
    assert first != fingerprint(tmp_path / "other")
    (tmp_path / "one" / "val" / "a" / "000.png").unlink()
    assert first != fingerprint(tmp_path / "one"), "the best epoch is selected on these"


def test_images_of_two_splits_or_classes_are_named(tmp_path: Path) -> None:
    root = make_small_folder(tmp_path)
    assert not any("content of" in note for note in prepare(config(root), workers=1).notes)
    (root / "val/a/again.png").write_bytes((root / "train/a/000.png").read_bytes())
    (root / "train/b/as a.png").write_bytes((root / "train/a/001.png").read_bytes())
    repeated, conflict = [note for note in prepare(config(root), workers=1).notes if "content of" in note]
    assert repeated.startswith("WARNING: images to report on with the content of a training image")
    assert repeated.endswith(f": 1 of 5, such as {root}/val/a/again.png and {root}/train/a/000.png")
    assert conflict.endswith(f"another class: 1, such as {root}/train/b/as a.png (b) and {root}/train/a/001.png (a)")

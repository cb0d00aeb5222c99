import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import image_folder, noise_image
from trainer.config.schema import DataConfig
from trainer.data import validation
from trainer.data.decode import decode
from trainer.data.index import read_index
from trainer.data.prepare import Prepared, ProgressHooks, prepare
from trainer.errors import UserError


def config(root: Path, **options: object) -> DataConfig:
    return replace(DataConfig(root=str(root)), **options)  # type: ignore[arg-type]


def make_small_folder(root: Path) -> Path:
    return image_folder(root, {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}})


def make_dirty_folder(root: Path) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Write a typical dataset folder; return its valid images, upright, and its invalid files with the reason."""
    good: dict[str, Image.Image] = {}
    number = 0

    def put(name: str, image: Image.Image, upright: Image.Image | None = None, **options: object) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)  # type: ignore[arg-type]
        good[name] = upright or image

    def new_image() -> Image.Image:
        nonlocal number
        number += 1
        return noise_image(number, size=(48, 32))

    for part in ("train", "val"):
        put(f"{part}/猫 猫/照片 1.png", new_image())
        put(f"{part}/猫 猫/{os.fsdecode(b'caf' + bytes([0xE9]))}.png", new_image())
        put(f"{part}/not a cat/a b (1).PNG", new_image())
    exact = "train/not a cat"
    jpeg = Image.new("RGB", (48, 32), (220, 60, 20))  # without noise, so that JPEG hardly changes it
    jpeg.paste((10, 90, 200), (0, 0, 16, 32))
    for name in ("1.jpeg", "2.JPG", "3.jpe.Jpg"):
        put(f"{exact}/{name}", jpeg, quality=95, format="JPEG")
    put(f"{exact}/palette.png", new_image().quantize(8))
    half = new_image().convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 24, 32))
    over_white = half.convert("RGB")
    over_white.paste((255, 255, 255), (0, 0, 24, 32))
    put(f"{exact}/alpha.png", half, over_white)
    put(f"{exact}/alpha.webp", half, over_white, lossless=True)
    put(f"{exact}/cmyk.jpg", Image.new("RGB", (48, 32), (200, 40, 90)).convert("CMYK"), quality=100)
    ramp = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 42
    gray = Image.fromarray(np.rint(ramp / 257).astype(np.uint8))
    put(f"{exact}/16 bits.png", Image.fromarray(ramp), gray)
    put(f"{exact}/16 bits.tif", Image.fromarray(ramp), gray)
    put(f"{exact}/gray.png", gray)
    put(f"{exact}/gray.jpg", gray, quality=100)
    put(f"{exact}/really a gif.png", new_image().quantize(8), format="GIF")
    turned = new_image()
    exif = Image.Exif()
    exif[0x0112] = 6
    put(f"{exact}/turned.png", turned, turned.transpose(Image.Transpose.ROTATE_270), exif=exif)

    whole = (root / f"{exact}/1.jpeg").read_bytes()
    bad = {
        f"{exact}/truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "val/not a cat/empty.jpg": (b"", "an empty file (0 bytes)"),
        f"{exact}/text.jpg": (b"<html>404</html>", "text"),
        f"{exact}/{os.fsdecode(bytes([0xFF]))}.jpg": (b"\0" * 99, "not an image"),
    }
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    for name in (".hidden.jpg", "._1.jpeg", "Thumbs.db", "notes.txt", "animation.gif"):
        (root / exact / name).write_bytes(b"ignored")
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
    examples = [*index.train, *index.test]
    assert {os.path.relpath(path, tmp_path) for path, _ in examples} == set(good)
    for path, label in examples:
        name = os.path.relpath(path, tmp_path)
        assert name.split("/")[1] == index.classes[label]
        found, expected = np.asarray(decode(path)).astype(int), np.asarray(good[name].convert("RGB"))
        lossy = name.lower().endswith((".jpg", ".jpeg"))
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).mean() <= (3 if lossy else 0), name
    assert any(note.startswith("4 of ") and note.count("\n") == 4 for note in prepared.notes)
    assert any("1 .gif, 1 .txt" in note for note in prepared.notes)
    assert any("hidden files and folders ignored: 3" in note for note in prepared.notes)
    assert "\n".join(prepared.notes).encode("utf-8")


def test_images_are_not_decoded_without_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        pytest.fail(f"{path} was decoded")

    monkeypatch.setattr(validation, "decode", fail)
    make_small_folder(tmp_path)
    (tmp_path / "train" / "a" / "bad.jpg").write_bytes(b"")
    assert len(prepare(config(tmp_path), workers=1, check=False).index.train) == 9


def test_validation_results_are_saved_in_the_configured_cache(tmp_path: Path) -> None:
    prepare(config(make_small_folder(tmp_path / "data"), cache=str(tmp_path / "cache")), workers=1)
    assert len(list((tmp_path / "cache" / "verdicts").iterdir())) == 1


def test_progress_is_reported_while_images_are_checked(tmp_path: Path) -> None:
    events: list[object] = []

    @contextmanager
    def show() -> Iterator[Callable[[int, int], None]]:
        events.append("open")
        yield lambda done, total: events.append((done, total))
        events.append("closed")

    prepare(config(make_small_folder(tmp_path)), workers=1, displays=ProgressHooks(checking=show))
    assert events[0] == "open"
    assert events[-2:] == [(12, 12), "closed"]


def test_options_are_passed_to_the_index(tmp_path: Path) -> None:
    image_folder(tmp_path, {"": {"a": 10, "b": 10}})
    data = config(tmp_path, val_fraction=0.25, test_fraction=0.2, seed=3, extensions=(".png",))
    assert prepare(data, workers=1).index == read_index(
        tmp_path, val_fraction=0.25, test_fraction=0.2, seed=3, extensions=(".png",)
    )


def test_fingerprint_depends_on_the_examples_but_not_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small_folder(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "other")
    make_small_folder(tmp_path / "one")

    def fingerprint(root: Path | str) -> str:
        return prepare(config(Path(root)), workers=1).fingerprint

    monkeypatch.chdir(tmp_path)
    first = fingerprint(tmp_path / "one")
    assert first == fingerprint(tmp_path / "other") == fingerprint("one")
    monkeypatch.chdir(tmp_path / "one")
    assert first == fingerprint(".")
    image = tmp_path / "other" / "train" / "a" / "000.png"
    image.rename(image.with_name("9.png"))
    assert first != fingerprint(tmp_path / "other")
    image.with_name("9.png").rename(image)
    assert first == fingerprint(tmp_path / "other")
    (tmp_path / "other" / "val" / "a" / "000.png").unlink()
    assert first != fingerprint(tmp_path / "other"), "the best epoch is selected on these"


def test_fingerprint_accepts_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    index = prepare(config(make_small_folder(tmp_path)), workers=1).index
    odd = replace(index, train=(*index.train, index.train[0]._replace(path=os.fsdecode(b"/\xff\xe9"))))
    assert Prepared(odd, ()).fingerprint != Prepared(index, ()).fingerprint

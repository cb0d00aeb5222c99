"""`regraft evaluate`: its answers are those of the run's own evaluation, and what it does with other data."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.contract import EVALUATION, MODEL, PREDICTIONS
from tests.folders import image_folder, noise_image
from tests.trainer.phases import train, with_options
from trainer.commands import evaluate
from trainer.config.resolve import resolve
from trainer.config.schema import Config
from trainer.model.metadata import UnknownThreshold, read_metadata, update_metadata
from trainer.report.metrics import epoch_rows, read_rows

PICTURES = {"reliability.png", "classes.png", "confusion.png"}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a finished run; its data are in `images` beside it."""
    folder, threads = tmp_path_factory.mktemp("evaluate"), torch.get_num_threads()
    splits = {"train": {"a": 4, "b": 4, "c": 4}, "val": {"a": 5, "b": 5, "c": 5}, "test": {"a": 3, "b": 9, "c": 5}}
    config = with_options(
        Config(),
        run={"dir": str(folder / "run"), "device": "cpu"},
        data={"root": str(image_folder(folder / "images", splits)), "image_size": 64, "num_workers": 0},
        model={"name": "shufflenet_v2_x0_5", "weights": None},
        train={"epochs": 3, "batch_size": 4, "precision": "fp32"},
        checkpoint={"select_by": "log_loss"},
    )
    train(resolve(config))
    yield folder / "run"
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with one thread, as the run did: kernels may round differently for another number."""
    monkeypatch.setattr("trainer.evaluation.evaluate_files.physical_cores", lambda: 1)


@pytest.fixture
def evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Return what evaluates the run with arguments, and returns `evaluation.json`; the output is in `printed`."""

    def evaluated(*arguments: object, model: Path = run) -> dict[str, Any]:
        words = [str(model), *map(str, arguments), f"--output={tmp_path / 'output'}"]
        assert evaluate.main(words) == 0, capsys.readouterr().err
        fields: dict[str, Any] = json.loads((tmp_path / "output" / EVALUATION).read_text())
        return fields | {"printed": capsys.readouterr().out}

    return evaluated


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the model file, which a test may change."""
    return Path(shutil.copy(run / MODEL, tmp_path / MODEL))


def test_the_answers_are_those_of_the_run(run: Path, evaluated: Evaluate, tmp_path: Path) -> None:
    expected = json.loads((run / EVALUATION).read_text())
    by_default = evaluated()
    assert by_default["splits"] == {"test": expected["splits"]["test"]}
    assert by_default["temperature"] == expected["temperature"]
    table = (tmp_path / "output" / PREDICTIONS).read_text()
    assert table.splitlines()[1:] == (run / PREDICTIONS).read_text().splitlines()[16:]
    for name in PICTURES:
        assert (tmp_path / "output" / name).read_bytes().startswith(b"\x89PNG")
    for arguments in (("--split", "val"), (run.parent / "images", "--split", "val")):
        assert evaluated(*arguments)["splits"] == {"val": expected["splits"]["val"]}
    for arguments in ((run.parent / "images",), (run.parent / "images" / "test",), ("--batch-size", 3)):
        (report,) = evaluated(*arguments)["splits"].values()
        assert report["per_class"]["predicted"] == expected["splits"]["test"]["per_class"]["predicted"]
        assert report["log_loss"] == pytest.approx(expected["splits"]["test"]["log_loss"], rel=1e-5)


def test_the_model_file_is_of_the_epoch_with_the_best_metric(run: Path) -> None:
    metadata, epochs = read_metadata(run / MODEL), epoch_rows(read_rows(run))
    assert metadata is not None
    best = min(epochs, key=lambda row: row["val_loss"])
    assert metadata.metrics["epoch"] == best["epoch"]


def test_a_missing_class_shifts_no_index(run: Path, evaluated: Evaluate) -> None:
    expected = json.loads((run / EVALUATION).read_text())["splits"]["test"]
    shutil.copytree(run.parent / "images" / "test", run.parent / "others", dirs_exist_ok=True)
    shutil.rmtree(run.parent / "others" / "a")
    (run.parent / "others" / "c").rename(run.parent / "others" / "aa")  # sorts before b
    fields = evaluated(run.parent / "others", "--map", "aa=c")
    (report,) = fields["splits"].values()
    assert fields["map"] == {"aa": "c"}
    assert report["per_class"]["support"] == [0, 9, 5]
    assert report["confusion_matrix"][1:] == expected["confusion_matrix"][1:]
    assert report["balanced_accuracy"] == pytest.approx(sum(expected["per_class"]["recall"][1:]) / 2)
    assert (
        "1 of 3 classes of the model have no image: a. Images may still be predicted as one of them"
        in fields["printed"]
    )
    fields = evaluated(run.parent / "others", "--map", "aa=")
    assert fields["left_out"] == {"aa": 5}
    assert "left out by --map: 5 images of aa" in fields["printed"]
    shutil.rmtree(run.parent / "others")


def test_images_that_cannot_be_read_are_named_and_left_out(run: Path, evaluated: Evaluate, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"": {"a": 2, "b": 1}})
    (folder / "a" / "broken.png").write_bytes(b"no image")
    fields = evaluated(folder)
    assert fields["unreadable"] == [str(folder / "a" / "broken.png")]
    assert fields["splits"]["all"]["examples"] == 3
    assert "1 of 4 images cannot be read and are left out:" in fields["printed"]


def test_calibration_and_threshold_are_stored_on_request(
    run: Path, evaluated: Evaluate, copy: Path, tmp_path: Path
) -> None:
    update_metadata(copy, temperature=None)
    original, images = copy.read_bytes(), run.parent / "images"
    for seed in range(4):
        (tmp_path / "none").mkdir(exist_ok=True)
        noise_image(seed, size=(9, 9)).save(tmp_path / "none" / f"{seed}.png")
    arguments = (images, "--split", "val", "--calibrate", "--unknown", tmp_path / "none")
    fields = evaluated(*arguments, model=copy)
    assert copy.read_bytes() == original
    assert "--store writes temperature and unknown into the header" in fields["printed"]
    assert fields["calibrated"]["val"]["log_loss"] < fields["splits"]["val"]["log_loss"]
    assert evaluated(*arguments, "--store", model=copy)["temperature"] == fields["temperature"]
    metadata, best = read_metadata(copy), fields["unknown"][0]
    assert metadata is not None
    assert metadata.temperature == fields["temperature"]
    assert metadata.unknown == UnknownThreshold(score=best["score"], threshold=best["threshold"])
    assert f"{best['score']}: AUROC {best['auroc']:.4f}; threshold" in fields["printed"]
    assert evaluated(images, model=copy)["temperature"] == fields["temperature"], "that of the header"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "missing"], "missing: there is no such folder or CSV file"),
        (["MODEL", "x.jpg"], "x.jpg: an image without a label; expected a folder with one folder per class"),
        (["missing", "DATA"], "missing: there is no such file; expected a run folder or its model.safetensors"),
        (["DATA", "DATA"], "model.safetensors: there is no such file"),
        (["COPY"], "model.safetensors: is not in a run folder, so the images to evaluate on are not known: give DATA"),
        (["MODEL", "DATA", "--split", "dev"], "has no image of the split dev; it has the splits test, train, val"),
        (["MODEL", "OTHER"], "1 of 1 classes of the data are not classes of the model:"),
        (["MODEL", "DATA", "--map", "x=a"], "--map x=a: the data have no class x; their classes are a, b, c"),
        (["MODEL", "--store"], "--store writes the result of --calibrate or --unknown"),
        (["MODEL", "--unknown", "missing"], "missing: there is no such folder"),
        (["MODEL", "--data.image_size", "32"], "--data.image_size: does not apply; expected csv_columns"),
        (["MODEL", "DATA", "--data.csv_columns={nothing: x}"], "data.csv_columns has"),
        (["MODEL", "DATA", "--device", "tpu"], "device is 'tpu': expected auto, cpu or cuda"),
        (["MODEL", "DATA", "--output", "MODEL"], "is a run folder, whose own evaluation.json would be replaced"),
        (["MODEL", "DATA", "--output", "/proc/x"], "--output /proc/x: cannot be written to"),
    ],
)
def test_wrong_arguments_are_an_error_of_one_sentence(
    arguments: list[str], message: str, run: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "other", {"": {"elsewhere": 1}})
    places = {"MODEL": run, "DATA": run.parent / "images", "COPY": copy, "OTHER": tmp_path / "other"}
    assert evaluate.main([str(places.get(word, word)) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not (run / "evaluation").exists()


def test_a_full_disk_is_an_error_and_changes_no_header(
    run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = copy.read_bytes()
    arguments = [str(copy), str(run.parent / "images"), "--calibrate", "--store", f"--output={tmp_path / 'output'}"]
    for place in ("output.write_predictions", "output.write_text_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(f"trainer.evaluation.{place}", full_disk)
            assert evaluate.main(arguments) == 2
        assert "output: cannot be written to (No space left on device); make room" in capsys.readouterr().err
    monkeypatch.setattr("trainer.model.metadata.write_model", full_disk)
    assert evaluate.main(arguments) == 2
    assert "its header cannot be rewritten (No space left on device); the file is unchanged" in capsys.readouterr().err
    assert copy.read_bytes() == original


def test_class_names_with_line_breaks_and_commas(run: Path, evaluated: Evaluate, copy: Path, tmp_path: Path) -> None:
    names = ("a,b", "c\nd", 'e "f" \udcff')
    update_metadata(copy, classes=names)
    with (tmp_path / "data.csv").open("w", newline="") as file:
        rows = [(run.parent / "images" / "test" / "a" / f"00{n}.png", names[n % 2]) for n in range(3)]
        csv.writer(file).writerows([("path", "label"), *rows])
    fields = evaluated(tmp_path / "data.csv", model=copy)
    assert fields["splits"]["all"]["per_class"]["classes"] == list(names)
    assert r"c\nd" in fields["printed"]
    with (tmp_path / "output" / PREDICTIONS).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["a,b", "a,b", "c\nd"]

"""`regraft predict`: its output, and what it says if it cannot start. tests/e2e/test_predict.py interrupts it."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import regraft
from launch import completion
from tests.folders import image_folder, noise_image
from tests.trainer.inference.models import write_images, write_model_file
from trainer.commands.predict import main, parser
from trainer.commands.predict_images import working_folder
from trainer.model.metadata import UnknownThreshold


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    return write_model_file(path, temperature=2.0, unknown=UnknownThreshold(score="max_logit", threshold=1e6))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 21 images and one that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "sub", 20)
    noise_image(99).save(folder / "a, b.png")
    (folder / "broken.jpg").write_text("hello")
    return folder


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdin", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def predict(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    """Run the command; return the rows of its standard output, and its standard error."""
    returned = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert returned == code, printed.err
    assert "Traceback" not in printed.err
    return list(csv.DictReader(io.StringIO(printed.out))), printed.err


def test_a_csv_is_printed_in_the_order_of_the_images(
    model_file: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, messages = predict(capsys, model_file.parent, photos)
    paths = [photos / "a, b.png", photos / "broken.jpg", *sorted((photos / "sub").iterdir())]
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert rows[1] == {"path": str(paths[1]), "label": "", "score": "", "error": "a text file, not an image"}
    paths.pop(1)
    predictions = regraft.load(model_file).predict(paths)
    rows.pop(1)
    assert [row["label"] for row in rows] == [prediction.label for prediction in predictions]
    assert [float(row["score"]) for row in rows] == pytest.approx([p.score for p in predictions], abs=1e-6)
    assert f"1 of 22 images cannot be read:\n  {photos}/broken.jpg: a text file, not an image\n" in messages
    assert "21 images predicted: " in messages


def test_options_change_the_answers(model_file: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = photos / "a, b.png"
    model = regraft.load(model_file)
    for words, options in (
        (["--topk", "9", "--calibrated"], {"topk": 9, "calibrated": True}),
        (["--topk=2", "--tta", "--batch-size", "1"], {"topk": 2, "tta": True}),
    ):
        (row,), _ = predict(capsys, model_file, image, *words)
        (expected,) = model.predict(image, **options)  # type: ignore[arg-type]
        ranks = range(1, len(expected.labels) + 1)
        assert tuple(row[f"label_{rank}"] for rank in ranks) == expected.labels
        assert [float(row[f"score_{rank}"]) for rank in ranks] == pytest.approx(expected.scores)
    (plain,), _ = predict(capsys, model_file, image)
    for threshold in ("saved", "1"):
        (row,), _ = predict(capsys, model_file, image, "--threshold", threshold)
        assert (row["label"], row["label_1"], row["score"]) == ("unknown", plain["label"], plain["score"])
    (row,), _ = predict(capsys, model_file, image, "--threshold=0")
    assert row["label"] == plain["label"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_output_has_a_row_for_each_image_and_is_not_overwritten(
    num_processes: int, model_file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, _ = predict(capsys, model_file, photos, "--topk=2")
    words = [model_file, photos, "--topk=2", "--nproc", num_processes, "--output"]
    for name in ("x.csv", "x.jsonl", "x.parquet")[: 3 if num_processes == 1 else 1]:
        assert predict(capsys, *words, tmp_path / name)[0] == []
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as stream:
        saved = list(csv.DictReader(stream))
    assert [row["label_2"] for row in saved] == [row["label_2"] for row in printed]
    assert [row["path"] for row in saved] == [row["path"] for row in printed]
    if num_processes == 1:
        lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        table = pq.read_table(tmp_path / "x.parquet").to_pylist()
        for row, line, entry in zip(saved, lines, table, strict=True):
            assert row["path"] == line["path"] == entry["path"]
            assert (row["label"] or None) == line.get("label") == entry["label"]
    before = (tmp_path / "x.csv").read_bytes()
    _, messages = predict(capsys, *words, tmp_path / "x.csv", code=2)
    assert "x.csv: exists, and is not overwritten" in messages
    assert (tmp_path / "x.csv").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_images_are_sorted_and_not_predicted_again(
    model_file: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos / "sorted"
    for _ in range(2):  # the second time, DIR is in the folder of the images
        rows, _ = predict(capsys, model_file, photos, "--sort-into", folder)
        assert len(rows) == 22
        counts = Counter(path.parent.name for path in folder.rglob("*") if path.is_file())
        labels = Counter(row["label"] for row in rows if row["label"])
        assert sorted(counts.values()) == sorted(labels.values())
        assert counts.total() == 21
    assert {path.name for path in folder.iterdir()} <= {"ant", "bee", "it, is_'quoted'", "猫"}


ERRORS: dict[str, tuple[list[str], str]] = {
    "no run": (["nowhere", "photos"], "nowhere: there is no such file; expected a run folder or its model.safetensors"),
    "an image as the model": (["photos/a, b.png", "photos"], "not a readable safetensors file"),
    "another safetensors file": (["other.safetensors", "photos"], "holds weights but no regraft header"),
    "no image": (["MODEL", "nothing.jpg"], "nothing.jpg: No such file or directory; expected images"),
    "a folder without images": (["MODEL", "empty"], "empty: no images; expected"),
    "no readable image": (["MODEL", "photos/broken.jpg"], "none of the 1 images can be read"),
    "another format": (["MODEL", "photos", "--output", "x.txt"], "x.txt: expected a name that ends in .csv"),
    "a folder as output": (["MODEL", "photos", "--output", "folder.csv"], "folder.csv: this is a folder"),
    "no folder for the output": (["MODEL", "photos", "--output", "a/x.csv"], "a/x.csv: cannot be written (No such"),
    "no calibration": (["PLAIN", "photos", "--calibrated"], "the model is not calibrated"),
    "no threshold": (["PLAIN", "photos", "--threshold", "saved"], "plain.safetensors holds no threshold"),
    "another device": (["MODEL", "photos", "--device", "tpu"], "device is 'tpu': expected auto, cpu or cuda"),
    "a file to sort into": (["MODEL", "photos", "--sort-into", "other.safetensors"], "the folder cannot be created"),
    "standard input": (["MODEL", "-"], "-: no images; expected"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_start_is_one_sentence(
    case: str,
    model_file: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    Path("empty").mkdir()
    Path("folder.csv").mkdir()
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    words, message = ERRORS[case]
    if "PLAIN" in words:
        write_model_file(tmp_path / "plain.safetensors")
    before = sorted(tmp_path.iterdir())
    names = {"MODEL": str(model_file), "PLAIN": "plain.safetensors"}
    _, messages = predict(capsys, *(names.get(word, word) for word in words), code=2)
    errors = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [["--topk", "0"], ["--batch-size=-1"], ["--threshold", "2"], ["--threshold", "nan"], ["--nproc=x"], ["--outptu=x"]],
    ids=str,
)
def test_wrong_options_are_errors_without_torch(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["model", "images", *words])
    assert error.value.code == 2
    assert words[0].partition("=")[0] in capsys.readouterr().err


def test_the_completion_has_all_options() -> None:
    assert {*completion.parser_options(parser())} == {*completion.PREDICT, "--help"}


def test_hostile_class_names_are_quoted_and_become_one_folder_each(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("../up", 'two\nlines, "quoted"', "/etc/passwd", "broken \udcff", "unknown")
    path = write_model_file(tmp_path / "hostile.safetensors", classes=names)
    words = [path, photos / "sub", "--output", tmp_path / "x.csv", "--sort-into", tmp_path / "sorted" / "in"]
    assert "the model has a class unknown" in predict(capsys, *words, "--threshold", "0")[1]
    with (tmp_path / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        labels = {row["label"] for row in csv.DictReader(stream)}
    assert labels <= set(names)
    folders = {path.name for path in (tmp_path / "sorted" / "in").iterdir()}
    assert folders <= {"__up", 'two_lines, "quoted"', "_etc_passwd", "broken \udcff", "unknown"}
    assert [entry.name for entry in (tmp_path / "sorted").iterdir()] == ["in"]


@pytest.mark.slow
def test_predictions_of_a_run_are_those_of_its_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.main import main as train

    root = image_folder(tmp_path / "images", {"train": {"a": 12, "b": 12}, "val": {"a": 20, "b": 17}})
    options = [
        f"--data.root={root}", f"--run.dir={tmp_path / 'run'}", "--data.image_size=32", "--run.device=cpu",
        "--model.name=shufflenet_v2_x0_5", "--model.weights=null", "--train.epochs=3", "--train.batch_size=8",
    ]  # fmt: skip
    assert train(options) == 0
    capsys.readouterr()
    metrics = regraft.load(tmp_path / "run").metadata.metrics
    rows, _ = predict(capsys, tmp_path / "run", root / "val")
    correct = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert (correct, len(rows)) == (metrics["test_correct"], metrics["test_seen"])
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        evaluated = {row["path"]: row for row in csv.DictReader(stream)}
    assert len(evaluated) == len(rows)
    for row in rows:
        other = evaluated[row["path"]]
        assert row["label"] == other["prediction"]
        assert float(row["score"]) == pytest.approx(float(other["probability"]), rel=2e-6)


def test_relative_paths_belong_to_a_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, found = [tmp_path / "a", tmp_path / "b"], []
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        found.append(
            [working_folder(["x"], Path(output)) for output in ("../out/p.csv", tmp_path / "out/p.csv", "p.csv")]
        )
        assert working_folder([str(tmp_path)], Path("p.csv")) == {}
    assert found[0] == [{"working folder": "../a"}, {"working folder": "../a"}, {"working folder": "."}]
    assert found[1] == [{"working folder": "../b"}, {"working folder": "../b"}, {"working folder": "."}]

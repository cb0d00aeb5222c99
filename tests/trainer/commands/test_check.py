"""`regraft check`: its output, files and exit codes."""

import errno
import json
import os
from pathlib import Path

import pytest

from launch import completion
from tests.folders import image_folder, noise_image
from trainer.check import outputs
from trainer.commands import check
from trainer.data.csv import write as csv_write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with a leak, an unreadable file and hostile names."""
    root = image_folder(
        tmp_path_factory.mktemp("check") / "data",
        {"train": {"a": 12, "<b>bold [red]": 12}, "val": {"a": 2, "<b>bold [red]": 2}},
    )
    (root / "val/a/copy.png").write_bytes((root / "train/a/000.png").read_bytes())
    (root / "train/a/broken.png").write_bytes(b"\x89PNG")
    noise_image(77).save(root / "train/a" / os.fsdecode(b"\xff\x1b[31m<img src=x onerror=alert(1)>.png"))
    noise_image(77).save(root / "val/a/other.png")
    return root


def test_the_output_is_plain_and_narrow(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(data)]) == 1
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert "\x1b" not in output
    flat = " ".join(output.split())
    for text in (
        "<b>bold [red] 12 2",
        "all 26 6",
        "error leakage: 2 of 6 test images (33.3 %)",
        "1 of 32 images cannot",
    ):
        assert text in flat, text
    assert output.rstrip().endswith("2 errors, no warnings, 2 notes"), output


def test_exit_codes(data: Path, tmp_path: Path) -> None:
    clean = image_folder(tmp_path / "clean", {"train": {"a": 5, "b": 12}, "val": {"a": 2, "b": 2}}, seed=3)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.csv").write_text("path\ntrain/a/000.png\n")
    for words, code in (
        ([tmp_path / "empty", "--html", tmp_path / "x.html", "--json", tmp_path / "x.json"], 1),
        ([data, "--fail-on", "never"], 0),
        ([data, "--duplicates", "exact"], 1),
        ([clean], 0),
        ([clean, "--fail-on", "warning"], 1),  # a class of 5 images
        ([tmp_path / "nowhere"], 2),
        ([], 2),
        ([clean, "--json", tmp_path / "nowhere" / "x.json"], 2),
        ([clean, "--html", tmp_path], 2),
        ([clean, "--json", tmp_path / "pipe"], 2),
        ([clean, "--data.sede", "3"], 2),
        ([clean, "--data.exclude", tmp_path / "list.csv", "--exclude-csv", tmp_path / "list.csv"], 2),
        ([clean, "--exclude-csv", tmp_path / "x.csv", "--groups-csv", tmp_path / "x.csv"], 2),
        ([clean, "--json", tmp_path / "list.csv"], 2),
        ([clean, "--exclude-csv", tmp_path / "model.safetensors"], 2),
        ([tmp_path / "list.csv", "--groups-csv", tmp_path / "list.csv"], 2),
        ([clean, "--model", "resnet17"], 2),
    ):
        assert check.main(list(map(str, words))) == code, words
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "list.csv").read_text().startswith("path"), "an input is not replaced"


def test_the_result_is_printed_if_a_file_cannot_be_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (outputs, csv_write):
        monkeypatch.setattr(module, "write_atomically", fail)
    for option, name in (
        ("--json", "x.json"),
        ("--html", "x.html"),
        ("--exclude-csv", "x.csv"),
        ("--groups-csv", "x.csv"),
    ):
        assert check.main([str(data), option, str(tmp_path / name), "--duplicates=exact"]) == 2
        out, err = capsys.readouterr()
        assert "leakage: 2 of 6 test images" in out
        assert err.endswith(f"/{name}: cannot be written (No space left on device)\n")


def test_a_full_standard_output_is_an_error(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(check, "print_result", fail)
    assert check.main([str(data), "--duplicates=exact"]) == 2
    assert capsys.readouterr().err == "error: standard output cannot be written (No space left on device)\n"


def test_the_shell_completes_its_options() -> None:
    assert {*completion.parser_options(check.parser())} == {*completion.CHECK, "--help"}


def test_json_and_html(data: Path, tmp_path: Path) -> None:
    report, page = tmp_path / "check.json", tmp_path / "check.html"
    assert check.main([str(data), "--json", str(report), "--html", str(page), "--fail-on=never"]) == 0
    result = json.loads(report.read_text(encoding="ascii"))
    assert result["counts"] == {"train": {"<b>bold [red]": 12, "a": 14}, "test": {"<b>bold [red]": 2, "a": 4}}
    assert {finding["kind"] for finding in result["findings"]} >= {"leakage", "unreadable", "small"}
    (exact,) = (group for group in result["duplicates"] if group["images"][1]["path"].endswith("copy.png"))
    assert [image["split"] for image in exact["images"]] == ["train", "test"]
    hostile = next(
        image["path"] for group in result["duplicates"] for image in group["images"] if "img" in image["path"]
    )
    assert Path(hostile).is_file(), "JSON keeps the bytes of a name"
    text = page.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "<b>bold" not in text
    assert "\\xff\\x1b[31m&lt;img src=x onerror=alert(1)&gt;.png" in text
    assert text.count("data:image/webp") == 12, "four images of duplicates, and eight beside the findings"

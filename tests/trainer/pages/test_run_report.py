"""`report.html`: what it says, and what it does with hostile names and damaged run folders."""

import errno
import json
import os
import signal
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from scipy.stats import binomtest

from regraft.contract import CONFIG, EVALUATION, METRICS, MODEL, PREDICTIONS, REPORT, STOPPED, attempt_path
from tests.trainer.pages.example_run import random_predictions, write_run
from tests.trainer.pages.test_pages import HOSTILE, Elements
from trainer.commands import report
from trainer.errors import UserError
from trainer.evaluation.report import make_report
from trainer.pages import run_report
from trainer.pages.advice import make_advice
from trainer.pages.paired_test import PairedTest, paired_test
from trainer.pages.run_comparison import render_comparison
from trainer.pages.run_record import read_run
from trainer.pages.run_report import render_report, try_write_report
from trainer.pages.run_time import time_parts

PLAIN = tuple(f"class {number}" for number in range(len(HOSTILE)))


def test_the_page_has_the_result_of_the_run_and_names_what_is_missing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", ("cat", "dog", "owl"), images=["a.png"]))
    result, page = run.reported, render_report(read_run(tmp_path / "run"))
    expected = make_report(random_predictions(3, 60, skill=2.4), ("cat", "dog", "owl"))
    assert result is not None
    assert (result.accuracy, result.correct) == (expected.evaluation.accuracy, sum(expected.evaluation.correct))
    assert [list(row) for row in result.matrix or ()] == [list(row) for row in expected.confusion or ()]
    top = result.confusions()[0]
    for text in (
        f"<strong>{result.accuracy:.1%}".replace("%", " %"), f"{top.count} of {top.support} images", "learning rate",
        "a &lt;b&gt;", "node: a CPU, 8 cores", "finished after epoch 3 of 3", "the picture cannot be read",
        "with changes", "The temperature 1.20", "with the temperature 1.20: ",
    ):  # fmt: skip
        assert text in page, text
    assert run.problems == []
    assert len(page) < 300_000


def test_the_time_has_training_waiting_evaluation_start_up_and_the_rest(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"))
    parts = {part.name.split(" ")[0]: part.seconds for part in time_parts(read_run(folder))}
    assert parts == pytest.approx(
        {"updates": 21, "waiting": 9, "evaluation": 6, "fitting": 1.5, "start:": 6.5, "checkpoints,": 16}
    )
    record = json.loads(attempt_path(folder, 1).read_text())
    attempt_path(folder, 1).write_text(json.dumps({**record, "state": "running", "ended": None}))  # killed
    began = datetime.fromisoformat(record["began"]).timestamp()
    os.utime(attempt_path(folder, 1), (began + 50, began + 50))
    assert sum(part.seconds for part in time_parts(read_run(folder))) == pytest.approx(50)


@pytest.mark.parametrize("finished", [True, False])
def test_hostile_names_add_no_elements(finished: bool, tmp_path: Path) -> None:
    for name, classes in (("plain", PLAIN), ("hostile", HOSTILE)):
        images = [f"{number}.png" for number in range(6)] if name == "plain" else ["<b>.png", '"on.png', "\udce9.png"]
        write_run(tmp_path / name / "run", classes, finished=finished, images=images)
    pages = [render_report(read_run(tmp_path / name / "run")) for name in ("plain", "hostile")]
    plain, hostile = (Elements(page) for page in pages)
    assert {*hostile.tags} == {*plain.tags}
    assert hostile.attributes == plain.attributes
    assert hostile.tags.count("script") == 1
    pages[1].encode("utf-8")
    assert "&lt;script&gt;alert(1)" in pages[1]
    assert "caf\\xe9" in pages[1]


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "half a line": (METRICS, lambda path: path.write_text(path.read_text()[:-30]), "1 of "),
    "no rows": (METRICS, lambda path: path.write_text("x\n[1]\n{}\n"), "3 of 3 lines"),
    "metrics missing": (METRICS, lambda path: path.unlink(), ""),
    "half an evaluation": (EVALUATION, lambda path: path.write_text(path.read_text()[:500]), EVALUATION),
    "a list": (EVALUATION, lambda path: path.write_text("[]"), EVALUATION),
    "deep": (EVALUATION, lambda path: path.write_text("[" * 100_000), EVALUATION),
    "wrong types": (EVALUATION, lambda path: path.write_text('{"splits": {"test": {"per_class": 3}}}'), EVALUATION),
    "infinite": (
        EVALUATION,
        lambda path: path.write_text(path.read_text().replace('"correct": ', '"correct": 1e999')),
        EVALUATION,
    ),
    "no columns": (PREDICTIONS, lambda path: path.write_text("a,b\n1,2\n"), PREDICTIONS),
    "half a table": (PREDICTIONS, lambda path: path.write_text(path.read_text()[:-12]), PREDICTIONS),
    "binary": (PREDICTIONS, lambda path: path.write_bytes(os.urandom(1000)), PREDICTIONS),
    "no YAML": (CONFIG, lambda path: path.write_text("a: [b"), CONFIG),
    "a pipe": (METRICS, lambda path: (path.unlink(), os.mkfifo(path)), METRICS),
    "a model without header": (MODEL, lambda path: path.write_bytes(b"x" * 20), MODEL),
    "of an earlier version": (
        EVALUATION, lambda path: path.write_text(path.read_text().replace("reliability", "unknown")), "",
    ),
    "an earlier attempt": (
        "attempts/0001.json", lambda path: path.write_text(path.read_text().replace("training_began", "reason")), "",
    ),
    "another check": ("check.json", lambda path: path.write_text('{"findings": [1, {"severity": {}}]}'), ""),
    "environment": ("environment/0001.json", lambda path: path.write_text('{"hosts": 3, "git": [], "argv": {}}'), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_left_out_and_named(damage: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"))
    name, change, message = DAMAGES[damage]
    change(folder / name)
    warnings: list[str] = []
    try_write_report(folder, pictures=True, warn=warnings.append)
    assert warnings == []
    problems = " ".join(read_run(folder).problems)
    assert message in problems
    assert bool(problems) == bool(message)
    assert ("left out" in (folder / REPORT).read_text(encoding="utf-8")) == bool(message)


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"), epochs=0, finished=False)
    warnings: list[str] = []
    try_write_report(folder, pictures=False, warn=warnings.append)
    assert warnings == []
    assert "No epoch is complete yet" in (folder / REPORT).read_text(encoding="utf-8")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_report, "write_page", full_disk)
    try_write_report(folder, pictures=False, warn=warnings.append)
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert "regraft report" in warnings[0]


def test_1000_pictures_of_many_classes_make_a_small_page(tmp_path: Path) -> None:
    classes = [f"species {number}" for number in range(120)]
    folder = write_run(tmp_path / "run", classes, examples=1000, images=[f"{number % 9}.png" for number in range(1000)])
    page = render_report(read_run(folder))
    assert len(page.encode()) < 5_000_000
    assert "The classes that are confused most often" in page
    assert page.count("data:image/webp") >= 12


@pytest.mark.parametrize(
    ("options", "epochs", "expected"),
    [
        ({}, 3, "still falling"),
        ({}, 3, "dog"),  # the most frequent confusion
        (
            {"check.json": {"findings": [{"severity": "error", "message": "3 test images are copies"}]}},
            3,
            "3 test images are copies",
        ),
    ],
)
def test_advice_states_its_evidence(options: dict, epochs: int, expected: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"), epochs=epochs)
    for name, content in options.items():
        (folder / name).write_text(json.dumps(content))
    advice = make_advice(read_run(folder))
    assert any(expected in entry.reason for entry in advice), advice
    assert [entry.severity for entry in advice] == sorted(
        (entry.severity for entry in advice), key=["error", "warning", "note", "good"].index
    )


@pytest.mark.parametrize(("root", "word"), [("my images", "'my images'"), ("/elsewhere/images", "/elsewhere/images")])
def test_commands_name_paths_as_seen_from_the_working_folder(root: str, word: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"), options={"data": {"root": str(tmp_path / root)}})
    assert read_run(folder).words == (word, "run")
    commands = [entry.command for entry in make_advice(read_run(folder))]
    assert any("--config run/config.yaml" in command for command in commands), commands


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (9, 2), (40, 31), (1500, 1400)])
def test_the_paired_test_agrees_with_scipy(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert PairedTest(5000, first, second).p_value == pytest.approx(expected, rel=1e-2)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        write_run(tmp_path / name, ("cat", "dog"), seed=seed, options={"optim": {"lr": 0.1 * (seed + 1)}})
        for path in (tmp_path / name).glob(PREDICTIONS):  # the same images
            path.write_text(path.read_text().replace(str(tmp_path / "images"), "images"))
    runs = [read_run(tmp_path / name) for name in "abc"]
    test = paired_test(runs[0], runs[2])
    assert test == PairedTest(60, 0, 0)
    page = render_comparison(runs)
    assert "optim.lr" in page
    assert "McNemar" in page
    assert "do not differ beyond chance" in page


def test_runs_that_cannot_be_compared_are_listed_and_not_compared(tmp_path: Path) -> None:
    best = write_run(tmp_path / "best", ("cat", "dog"))
    unfinished = write_run(tmp_path / "unfinished", ("cat", "dog"), seed=1, finished=False)
    os.utime(attempt_path(unfinished, 1), (0, 0))  # its last heartbeat
    other = write_run(tmp_path / "other", ("cat", "dog", "owl"))
    failed = write_run(tmp_path / "failed", ("cat", "dog"), epochs=0, finished=False)
    record = json.loads(attempt_path(failed, 1).read_text())
    attempt_path(failed, 1).write_text(json.dumps({**record, "state": "failed", "reason": "it diverged"}))
    for folders, expected in (
        ((best, other), ["No two runs have results on the same test images"]),
        ((failed, failed), ["No run has a result yet", "epoch 0 of 2, failed: it diverged"]),
        (
            (other, failed, unfinished, best),
            [
                "% more accurate than ",
                "1 of 4 runs have no result",
                "latest epoch counts: unfinished.",
                "compared: other.",
                "probably killed",
            ],
        ),
    ):
        page = render_comparison([read_run(folder) for folder in folders])
        for text in expected:
            assert text in page, (folders, text)


def test_a_signal_while_grad_cam_is_imported_stops_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"))
    monkeypatch.setattr(report, "_explainer", lambda _: signal.raise_signal(signal.SIGTERM))
    assert report.main([str(folder)]) == STOPPED
    assert capsys.readouterr().err.endswith("nothing new to save. The same command writes the page\n")
    assert not (folder / REPORT).exists()


def test_command_writes_pages_and_rejects_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", ("cat", "dog"))
    assert report.main([str(folder), "--no-grad-cam"]) == 0
    assert (folder / REPORT).is_file()
    assert report.main([str(folder), str(folder), "--output", str(tmp_path / "both.html")]) == 0
    assert "run (2)" in (tmp_path / "both.html").read_text(encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    for argv, message in (
        ([str(tmp_path)], f"not a run folder, but it holds runs; name one or more of {folder}"),
        ([str(tmp_path / "images")], "not a run folder; expected one with config.yaml"),
        ([str(folder / CONFIG)], "is not a folder"),
        ([str(folder), str(folder)], "--output FILE is missing"),
        ([str(folder), "--output", str(tmp_path)], "is a folder"),
        ([str(folder), "--output", str(tmp_path / "pipe")], "is no regular file"),
        ([str(folder), "--output", str(folder / CONFIG)], "expected a name that ends in .html"),
        ([str(folder), "--output", str(tmp_path / "none" / "x.html")], "cannot be written"),
    ):
        capsys.readouterr()
        assert report.main(argv) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no such folder"):
        read_run(tmp_path / "missing")

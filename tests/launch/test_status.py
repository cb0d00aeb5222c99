import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from launch.errors import LaunchError
from launch.status import describe, show

NOW = 1_800_000_000.0


def run(folder: Path, *, epochs: int = 0, seen: float = NOW - 5, **changes: Any) -> Path:
    """Make a run folder as the trainer leaves it in mid-run: 10 epochs of 20 steps, each of 30 s."""
    record: dict[str, Any] = {
        "attempt": 3,
        "state": "running",
        "reason": None,
        "stage": "",
        "step": 40,
        "steps": 200,
        "epoch": 2,
        "epochs": 10,
        "began": "2026-11-24T12:00:00+00:00",
        "ended": None,
        "host": "node7",
        "pid": 4711,
        "token": "x",
    }
    path = folder / "attempts" / "0003.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record | changes))
    os.utime(path, (seen, seen))
    stage = folder / str(changes.get("stage", ""))
    stage.mkdir(exist_ok=True)
    rows = [
        {
            "kind": "epoch",
            "epoch": epoch,
            "step": 20 * epoch,
            "seconds": 30.0,
            "examples_per_sec": 1234.5,
            "test_accuracy": 0.5 + 0.1 * (epoch % 3),
            "train_loss": 1 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_that_has_only_evaluated_its_start_is_at_its_first_epoch(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", step=0, epoch=0)
    row = {"kind": "start", "epoch": 0, "step": 0, "seconds": 3.0, "test_accuracy": 0.9}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text, code, over = describe(folder, now=NOW)
    assert (code, over) == (0, False)
    assert text.splitlines()[2:] == ["step 0 of 200, epoch 0 of 10"]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    text, code, over = describe(run(tmp_path / "r", epochs=3), now=NOW)
    assert (code, over) == (0, False)
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path / 'r'}: running"
    assert lines[1] == "attempt 3, process 4711 on node7, since 2026-11-24T12:00:00+00:00"
    assert lines[2] == "step 60 of 200, epoch 2 of 10"  # the figures are ahead of the last checkpoint
    assert lines[3] == "test accuracy 0.500 after epoch 3, best 0.700 after epoch 2; train loss 0.3333"
    assert lines[4] == "ETA 3:30, at 1,234.5 examples a second"  # 140 steps at 20 in 30 s


def test_a_finished_run_is_told_by_its_own_model_after_the_comparison_with_scratch(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", epochs=3, state="done", stage="scratch", step=200)
    own = {
        "kind": "epoch",
        "epoch": 10,
        "step": 200,
        "seconds": 3.0,
        "test_accuracy": 0.99,
        "train_loss": 0.1,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(own) + "\n")
    lines = describe(folder, now=NOW)[0].splitlines()
    assert lines[2] == "step 200 of 200, epoch 2 of 10"
    assert lines[3].startswith("test accuracy 0.990 after epoch 10")


def test_a_line_that_is_being_written_is_passed_over(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", epochs=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "epo')
    assert "after epoch 2" in describe(folder, now=NOW)[0]


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"state": "done", "step": 200}, 0, "done"),
        ({"state": "stopped", "reason": "SIGTERM"}, 3, "stopped (SIGTERM)"),
        ({"state": "failed", "reason": "ValueError: x\nmore"}, 3, "failed (ValueError: x)"),
        ({"seen": NOW - 3661.0}, 3, "silent for 1:01:01: killed, most likely"),
    ],
)
def test_a_run_that_has_ended(tmp_path: Path, changes: dict[str, Any], code: int, said: str) -> None:
    folder = run(tmp_path / "r", epochs=1, **changes)
    (folder / "logs").mkdir()
    text, found, over = describe(folder, now=NOW)
    assert (found, over) == (code, True)
    assert text.splitlines()[0] == f"{folder}: {said}"
    assert ("logs: " in text) is (code == 3)
    assert "ETA" not in text


def test_the_failure_before_is_told(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    record = json.loads((folder / "attempts" / "0003.json").read_text())
    for number, state, reason in ((1, "failed", "OSError: x"), (2, "running", None)):
        text = json.dumps(record | {"attempt": number, "state": state, "reason": reason, "step": 10 * number})
        (folder / "attempts" / f"000{number}.json").write_text(text)
    assert "attempt 2 failed after step 20: killed, most likely" in describe(folder, now=NOW)[0]
    (folder / "attempts" / "0002.json").unlink()
    assert "attempt 1 failed after step 10: OSError: x" in describe(folder, now=NOW)[0]


def test_slurm_has_the_last_word_on_whether_it_goes_on(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", state="stopped", reason="SIGTERM")
    assert "Slurm" not in describe(folder, now=NOW, ask=lambda job: ("RUNNING", "None"))[0], (
        "no job of Slurm's"
    )
    for name in ("0001-job-12.0", "0003-job-13.2", "0002-job-13.1"):
        (folder / "logs" / name).mkdir(parents=True)
    asked: list[str] = []

    def ask(job: str) -> tuple[str, str]:
        asked.append(job)
        return "PENDING", "BeginTime"

    text, code, over = describe(folder, now=NOW, ask=ask)
    assert text.splitlines()[-1] == "Slurm: job 13 is PENDING (BeginTime)"
    assert (code, over, asked) == (0, False, ["13"])
    assert describe(folder, now=NOW, ask=lambda job: ("CANCELLED", "None"))[2]


def test_what_waits_in_the_queue_is_known_by_its_job(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "job-id").write_text("17\n")
    text, code, over = describe(folder, now=NOW, ask=lambda job: ("PENDING", "Priority"))
    assert text.splitlines() == [
        f"{folder}: submitted, and nothing has begun yet",
        "Slurm: job 17 is PENDING (Priority)",
    ]
    assert (code, over) == (0, False)
    text, code, over = describe(folder / "3", now=NOW, ask=lambda job: ("CANCELLED", "None"))
    assert text.splitlines()[1] == "Slurm: job 17_3 is CANCELLED"
    assert (code, over) == (3, True)
    assert describe(folder, now=NOW)[1:] == (0, False), "where there is no Slurm to ask"


def test_a_stage_has_figures_of_its_own(tmp_path: Path) -> None:
    text, *_ = describe(run(tmp_path / "r", epochs=1, stage="source"), now=NOW)
    assert "epoch 2 of 10 of the source stage" in text
    assert "test accuracy" in text


def test_before_the_first_epoch_there_is_no_figure(tmp_path: Path) -> None:
    text, code, _ = describe(run(tmp_path / "r", steps=0, step=0, epoch=0), now=NOW)
    assert code == 0
    assert "step 0 of ?" in text
    assert "accuracy" not in text


@pytest.mark.parametrize("content", ["", "[]", '{"attempt": 1}', "{", "\0" * 9])
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    with pytest.raises(LaunchError, match="no such folder"):
        describe(tmp_path / "nowhere", now=NOW)
    with pytest.raises(LaunchError, match="no attempt has begun here"):
        describe(tmp_path, now=NOW)
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001.json").write_text(content)
    with pytest.raises(LaunchError, match="no attempt has begun here"):
        describe(tmp_path, now=NOW)


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    folder = run(tmp_path / "r", epochs=1, seen=NOW)
    said: list[object] = []

    def say(text: object) -> None:
        said.append(text)
        path = folder / "attempts" / "0003.json"
        path.write_text(path.read_text().replace('"running"', '"done"'))

    assert show(folder, watch=True, say=say) in (0, 3)
    assert re.search(": done", str(said[-1]))

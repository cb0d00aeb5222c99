import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch import status, watch
from launch.errors import LaunchError
from launch.status import show
from launch.stop_signal import write_stop_signal
from regraft.contract import CONFIG, METRICS, attempt_path
from tests.launching import attempt

NOW = 1_800_000_000.0
BAR = "━━━━┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ 20%"


def make_run(folder: Path, *, epochs: int = 0, seen: float = NOW - 5, **changes: Any) -> Path:
    """Make a run folder in the middle of training, with epochs of 20 steps and 30 s each."""
    path = write_attempt(
        folder, 3, **{"state": "running", "step": 40, "steps": 200, "epoch": 2, "epochs": 10, **changes}
    )
    os.utime(path, (seen, seen))
    common = {"kind": "epoch", "seconds": 30.0, "examples_per_sec": 1234.5}
    rows = [
        {
            **common,
            "epoch": n,
            "step": 20 * n,
            "test_accuracy": 0.5 + 0.1 * (n % 3),
            "test_loss": n,
            "train_loss": 1 / n,
        }
        for n in range(1, epochs + 1)
    ]
    write_metrics(folder / str(changes.get("stage", "")), rows)
    return folder


def describe(run: Path, **changes: Any) -> tuple[str, int, bool]:
    """Return the text, the exit code, and whether the run has ended."""
    report = status.describe(run, **changes)
    return report.text, report.code, report.ended


def describe_all(run: Path | None) -> tuple[str, int, bool]:
    report = status.describe_all(run, now=NOW)
    return report.text, report.code, report.ended


def write_attempt(folder: Path, number: int, **fields: Any) -> Path:
    path = attempt_path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(attempt(number, **fields).to_json())
    return path


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_running_run(tmp_path: Path) -> None:
    text, code, ended = describe(make_run(tmp_path / "r", epochs=3), now=NOW)
    assert (code, ended) == (0, False)
    assert text.splitlines() == [
        f"{tmp_path / 'r'}: running",
        "attempt 3, process 103 on node7, started 2026-11-24T12:00:03+00:00",
        "step 60 of 200, epoch 3 of 10",  # metrics are newer than the last checkpoint
        "━━━━━━┄┄┄┄┄┄┄┄┄┄┄┄┄┄ 30%, ETA 3:30",  # 140 steps at 20 in 30 s
        "train loss 0.3333 █▃▁",
        "1,234.5 examples/s",
        "test accuracy 0.500 after epoch 3, best 0.700 after epoch 2",
    ]
    rows = [json.loads(line) for line in (tmp_path / "r" / METRICS).read_text().splitlines()]
    write_metrics(tmp_path / "r", [{**row, "evaluation_seconds": 10.0} for row in rows])
    assert "ETA 4:40" in describe(tmp_path / "r", now=NOW)[0]  # with 7 evaluations


def test_running_run_within_its_first_epoch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=0, step=0, epoch=0)
    row = {
        **{"kind": "train", "seconds": 5.0, "examples_per_sec": 80.0, "examples_per_sec_compute": 100.0},
        **{"train_loss": 2.0, "lr_backbone": 1e-4, "lr_head": 1e-3, "memory_bytes": 3 << 30},
    }
    write_metrics(folder, [{**row, "epoch": 0.2, "step": 4}, {**row, "epoch": 0.5, "step": 10, "train_loss": 1.0}])
    assert describe(folder, now=NOW)[0].splitlines()[2:] == [
        "step 10 of 200, epoch 0 of 10",
        "━┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ 5%, ETA 1:35",
        "train loss 1.0000 █▁",
        "80.0 examples/s, 100.0 without data loading (wait 20%)",
        "learning rate 0.0001 (backbone), 0.001 (head), memory 3.0 GiB",
    ]


def test_run_before_its_first_epoch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", steps=0, step=0, epoch=0)
    assert describe(folder, now=NOW)[0].splitlines()[2].startswith("before the first step: images")
    write_metrics(folder, [{"kind": "start", "epoch": 0, "step": 0, "seconds": 3.0, "test_accuracy": 0.9}])
    text, code, _ = describe(folder, now=NOW)
    assert (code, text.splitlines()[2:]) == (0, ["step 0 of ?, epoch 0 of 10"])  # without a bar


def test_finished_run_shows_the_fine_tuned_model_and_not_the_baseline(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=3, state="done", stage="baseline", step=200)
    make_run(tmp_path / "s", epochs=10)
    (tmp_path / "s" / METRICS).rename(folder / METRICS)
    lines = describe(folder, now=NOW)[0].splitlines()
    assert lines[2] == "step 200 of 200, epoch 10 of 10"
    assert lines[3].startswith("train loss 0.1000 ")
    assert lines[4].startswith("test accuracy 0.600 after epoch 10")


@pytest.mark.parametrize(
    ("select_by", "best"),
    [
        ("accuracy", "best 0.750 after epoch 3"),
        ("log_loss", "best 0.500 after epoch 5"),
        ("f1_macro", "best 0.750 after epoch 2"),
        ("balanced_accuracy", "best 0.750 after epoch 3"),  # the rows do not have it
    ],
)
def test_best_epoch_is_the_one_that_the_run_selects(select_by: str, best: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=6)
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for row, accuracy, loss in zip(rows, (0.5, 0.75, 0.75, 0.75, 0.5, 0.5), (9, 3, 2, 2, 1, 1), strict=True):
        row |= {"val_accuracy": accuracy, "val_loss": loss, "val_f1_macro": accuracy + (row["epoch"] == 2)}
    write_metrics(folder, rows)
    (folder / CONFIG).write_text(f"checkpoint:\n  select_by: {select_by}\n")
    assert f"val accuracy 0.500 after epoch 6, {best}" in describe(folder, now=NOW)[0]


def test_stop_is_named_after_the_signal_that_the_launcher_received(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", state="stopped", reason="SIGTERM")
    (folder / "logs" / "0002").mkdir(parents=True)
    write_stop_signal(folder / "logs" / "0002", 2, "SIGUSR1")
    assert describe(folder, now=NOW)[0].startswith(f"{folder}: stopped (SIGTERM)\n")
    write_stop_signal(folder / "logs" / "0002", 3, "SIGINT")
    assert describe(folder, now=NOW)[0].startswith(f"{folder}: stopped (SIGINT)\n")


def make_unreadable(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes({"binary": bytes(range(256)) * 9, "nested": b"[" * 100_000, "huge": b"9" * 9_000}[kind])


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "loop", "binary", "nested", "huge"])
def test_odd_files_are_not_read(kind: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=2)
    make_unreadable(folder / METRICS, kind)
    make_unreadable(attempt_path(folder, 1), kind)
    assert describe(folder, now=NOW)[0].splitlines()[2:] == [
        "step 40 of 200, epoch 2 of 10",
        "━━━━┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄ 20%",
    ]
    for path in (attempt_path(folder, 3), folder / "job-id", attempt_path(folder, 9999)):
        make_unreadable(path, kind)
        with pytest.raises(LaunchError, match="no attempt has started here"):
            describe(folder, now=NOW)
    make_unreadable(tmp_path / "run", kind)
    with pytest.raises(LaunchError, match=r"expected a run folder|cannot be read"):
        describe(tmp_path / "run", now=NOW)


@pytest.mark.parametrize(
    "row",
    [{"step": "9"}, {"epoch": None}, {"test_accuracy": "high"}, {"test_loss": True}, {"train_loss": float("nan")}],
)
def test_metrics_of_the_wrong_type_are_skipped(row: dict[str, Any], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=2)
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    write_metrics(folder, [*rows, 17, rows[1] | {"epoch": 3} | row])  # type: ignore[list-item]
    assert "test accuracy 0.700 after epoch 2" in describe(folder, now=NOW)[0]
    write_metrics(folder, [rows[1] | {"epoch": 0}])
    assert "ETA" not in describe(folder, now=NOW)[0]


def test_a_folder_without_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "r")
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(LaunchError, match=r"cannot be read \(Permission denied\)"):
        describe(folder, now=NOW)


def test_escape_sequences_of_a_run_folder_are_not_sent_to_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\udcff"
    fields = {"reason": f"{evil}\nmore", "host": evil, "began": evil, "state": "failed", "stage": evil}
    folder = make_run(tmp_path / "a\x1b[1m", **{**fields, "stage": ""})
    write_attempt(folder, 3, **fields)
    write_attempt(folder, 2, **fields)
    text, *_ = describe(folder, now=NOW)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "failed (\\x1b]0;owned\\x07\\x1b[2J\\udcff)" in text


def test_each_phase_has_its_own_metrics_and_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", epochs=1, stage="pretrain")
    with (folder / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "epo')
    text, *_ = describe(folder, now=NOW)
    assert "epoch 2 of 10 of the pretrain phase" in text
    assert "test accuracy 0.600 after epoch 1" in text


@pytest.mark.parametrize(
    ("changes", "code", "state"),
    [
        ({"state": "done", "step": 200}, 0, "done"),
        ({"state": "stopped", "reason": "SIGTERM"}, 3, "stopped (SIGTERM)"),
        ({"state": "failed", "reason": "ValueError: x\\nmore"}, 3, "failed (ValueError: x)"),
        ({"seen": NOW - 3661.0}, 3, "no heartbeat for 1:01:01: probably killed"),
    ],
)
def test_ended_run(tmp_path: Path, changes: dict[str, Any], code: int, state: str) -> None:
    folder = make_run(tmp_path / "r", epochs=1, **changes)
    (folder / "logs").mkdir()
    text, found_code, ended = describe(folder, now=NOW)
    assert (found_code, ended) == (code, True)
    assert text.splitlines()[0] == f"{folder}: {state}"
    assert ("logs: " in text) is (code == 3)
    assert "ETA" not in text


def test_failure_of_the_previous_attempt_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    write_attempt(folder, 1, state="failed", reason="OSError: x", step=10)
    write_attempt(folder, 2, state="running", step=20)
    assert "attempt 2 failed after step 20: probably killed" in describe(folder, now=NOW)[0]
    (folder / "attempts" / "0002.json").unlink()
    assert "attempt 1 failed after step 10: OSError: x" in describe(folder, now=NOW)[0]


def test_stopped_run_has_not_ended_while_its_latest_job_is_active(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", state="stopped", reason="SIGTERM")
    assert "Slurm" not in describe(folder, now=NOW, query=lambda _: ("RUNNING", "None"))[0], "it has no job"
    for name in ("0001-job-12.0", "0003-job-13.2", "0002-job-13.1"):
        (folder / "logs" / name).mkdir(parents=True)
    jobs: list[str] = []

    def query(job: str) -> tuple[str, str]:
        jobs.append(job)
        return "PENDING", "BeginTime"

    text, code, ended = describe(folder, now=NOW, query=query)
    assert text.splitlines()[-1] == "Slurm: job 13 is PENDING (BeginTime)"
    assert (code, ended, jobs) == (0, False, ["13"])
    assert describe(folder, now=NOW, query=lambda _: ("CANCELLED", "None"))[2]


def test_submitted_job_that_has_not_started(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "job-id").write_text("17\n")
    text, code, ended = describe(folder, now=NOW, query=lambda _: ("PENDING", "Priority"))
    assert text == f"{folder}: submitted, training has not started\nSlurm: job 17 is PENDING (Priority)"
    assert (code, ended) == (0, False)
    text, code, ended = describe(folder / "3", now=NOW, query=lambda _: ("CANCELLED", "None"))
    assert text.splitlines()[1] == "Slurm: job 17_3 is CANCELLED"
    assert (code, ended) == (3, True)
    assert describe(folder, now=NOW)[1:] == (0, False), "without Slurm"


@pytest.mark.parametrize("content", ["", "[]", '{"attempt": 1}', "{", "\0" * 9])
def test_folder_without_a_run_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(LaunchError, match="no such folder"):
        describe(tmp_path / "nowhere", now=NOW)
    with pytest.raises(LaunchError, match="no attempt has started here"):
        describe(tmp_path, now=NOW)
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "0001.json").write_text(content)
    with pytest.raises(LaunchError, match="no attempt has started here"):
        describe(tmp_path, now=NOW)


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Return a list of what happens between two looks at a run; the watch does not wait."""
    events: list[Callable[[], object]] = []
    monkeypatch.setattr(watch.time, "sleep", lambda _: events.pop(0)())
    return events


def test_watch_without_a_terminal_prints_a_line_for_each_change(
    polls: list[Callable[[], object]], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "r", epochs=1, seen=time.time(), steps=40)
    record = attempt_path(folder, 3).read_text()
    polls += [
        lambda: None,
        lambda: make_run(folder, epochs=2, seen=time.time(), steps=40),
        lambda: None,
        lambda: attempt_path(folder, 3).write_text(record.replace('"running"', '"done"')),
    ]
    printed: list[str] = []
    assert show(folder, watch=True, say=lambda text: printed.append(str(text))) == 0
    first, change, last = printed
    assert first.splitlines()[0] == f"{folder}: running"
    assert change == (
        f"{folder}: running, step 40 of 40, epoch 2 of 10, train loss 0.5000, "
        "test accuracy 0.700 after epoch 2, best 0.700 after epoch 2, ETA 0:00"
    )
    assert last.splitlines()[0] == f"{folder}: done"


def test_watch_on_a_terminal_replaces_what_it_has_shown_and_ctrl_c_shows_the_cursor_again(
    polls: list[Callable[[], object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(watch.sys, "stdout", Mock(wraps=terminal, fileno=lambda: 1, isatty=lambda: True))
    monkeypatch.setattr(watch.os, "get_terminal_size", lambda _: os.terminal_size((40, 24)))
    folder = make_run(tmp_path / "r", epochs=1, seen=time.time())

    def interrupt() -> None:
        raise KeyboardInterrupt

    polls += [lambda: None, lambda: make_run(folder, epochs=2, seen=time.time()), interrupt]
    with pytest.raises(KeyboardInterrupt):
        show(folder, watch=True)
    text = terminal.getvalue()
    assert text.startswith("\x1b[?25l\x1b[J")
    assert text.endswith("\x1b[?25h")
    _, second = text.split("\x1b[7F\x1b[J")
    assert max(len(line) for line in second.split("\n")) <= 40
    assert "train loss 0.5000" in second
    assert watch._fit("\n".join(map(str, range(30)))) == [*map(str, range(22)), "... 8 more lines"]


def test_all_runs_of_a_folder_are_shown_with_the_options_in_which_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, lr, state in (("default", 0.1, "done"), ("default-2", 0.2, "failed"), ("odd", None, "running")):
        make_run(tmp_path / "runs" / name, seen=NOW, state=state)
        if lr is not None:
            config = f"run: {{dir: {name}}}\noptim: {{lr: {lr}}}\ntrain: {{epochs: 5}}\n"
            (tmp_path / "runs" / name / "config.yaml").write_text(config)
    os.mkfifo(tmp_path / "runs" / "odd" / "config.yaml")
    make_run(tmp_path / "runs" / "default.earlier-1")
    for run in (None, Path("runs")):
        text, code, ended = describe_all(run)
        lines = [one.splitlines() for one in text.split("\n\n")]
        states = ["runs/default: done", "runs/default-2: failed", "runs/odd: running"]
        assert [one[0] for one in lines] == states
        assert [one[-1] for one in lines[:2]] == ["  options: optim.lr 0.1", "  options: optim.lr 0.2"]
        assert (code, ended) == (3, False)
    assert describe_all(Path("runs/default")) == describe(Path("runs/default"), now=NOW)
    with pytest.raises(LaunchError, match="no such folder"):
        describe_all(Path("nowhere"))

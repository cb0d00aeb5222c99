import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from regraft import contract
from regraft.contract import (
    ATTEMPTS,
    AttemptRecord,
    attempt_path,
    available_cores,
    last_heartbeat,
    latest_attempt,
    latest_attempt_number,
    physical_cores,
    read_attempt,
    read_attempts,
)

RECORD = AttemptRecord(
    attempt=1,
    state="stopped",
    reason="SIGTERM",
    stage="pretrain",
    step=3,
    steps=12,
    epoch=1,
    epochs=4,
    began="2026-01-01T00:00:00+00:00",
    host="node17",
    pid=17,
    started=4711,
    launcher="run 3 9 boot",
    pid_namespace="boot pid:[1]",
    lease_id="0badcafe",
)
FIELDS = dataclasses.asdict(RECORD)


def write_record(run: Path, number: int, content: str | bytes | None = None) -> Path:
    path = attempt_path(run, number)
    path.parent.mkdir(exist_ok=True)
    text = dataclasses.replace(RECORD, attempt=number).to_json() if content is None else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_record_round_trip(tmp_path: Path) -> None:
    for record in (RECORD, dataclasses.replace(RECORD, reason=None, launcher=None, ended="later", state="done")):
        assert read_attempt(write_record(tmp_path, 1, record.to_json())) == record
    assert RECORD.to_json().isascii()


DAMAGED: dict[str, str | bytes | dict[str, Any]] = {
    "empty": "",
    "half written": RECORD.to_json()[:50],
    "null": "null",
    "not text": b"\xff\xfe",
    "deep": "[" * 100_000,
    "a field is missing": {name: value for name, value in FIELDS.items() if name != "lease_id"},
    "a field is unknown": {**FIELDS, "code": "x"},
    **{
        f"{name} {value!r}": {**FIELDS, name: value}
        for name, values in {
            "pid": ["1", True, 1.0, -1, None],
            "started": [None, "0", False],
            "attempt": [[1], 0.5],
            "step": [None, -3],
            "steps": ["3"],
            "epoch": [True],
            "epochs": [{}],
            "state": ["over", None, ["running"]],
            "host": [3, None],
            "pid_namespace": [None, 7],
            "lease_id": [0],
            "began": [0],
            "stage": [None],
            "launcher": [7],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_records_are_none(damage: str, tmp_path: Path) -> None:
    content = DAMAGED[damage]
    write_record(tmp_path, 1, json.dumps(content) if isinstance(content, dict) else content)
    assert read_attempt(attempt_path(tmp_path, 1)) is None
    write_record(tmp_path, 2)
    assert [record.attempt for record in read_attempts(tmp_path)] == [2]


def test_a_folder_without_attempts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert latest_attempt_number(folder) == 0
        assert latest_attempt(folder) is None
        assert read_attempts(folder) == []
        assert last_heartbeat(folder, 1) is None


def test_the_latest_attempt_has_the_highest_number(tmp_path: Path) -> None:
    for number in (1, 2, 9999, 10000):
        write_record(tmp_path, number)
    for name in ("notes.json", "99999.txt", "٣.json", "20007.json.tmp", ".20008.json.1.tmp", "-5.json"):
        (tmp_path / ATTEMPTS / name).write_text("mine")
    assert latest_attempt_number(tmp_path) == 10000
    latest = latest_attempt(tmp_path)
    assert latest is not None
    assert latest.attempt == 10000
    write_record(tmp_path, 10001, "")
    assert latest_attempt_number(tmp_path) == 10001
    assert latest_attempt(tmp_path) is None, "its record is half written"
    os.utime(attempt_path(tmp_path, 2), (5, 7))
    assert last_heartbeat(tmp_path, 2) == 7


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000\n", 1), ("400000 100000", 4), ("max 100000\n", 16)])
def test_available_cores_are_limited_by_the_containers_quota(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(contract, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert available_cores() == cores


def test_two_hardware_threads_are_one_physical_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(4):  # CPUs 0 and 2, 1 and 3 share a core; the kernel tells nothing about 4 and 5
        siblings = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        siblings.parent.mkdir(parents=True)
        siblings.write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    for affinity, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({0, 1, 2, 3, 4, 5}, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, affinity=affinity: affinity)
        monkeypatch.setattr(contract, "available_cores", lambda: 16)
        assert physical_cores(tmp_path) == cores
    monkeypatch.setattr(contract, "available_cores", lambda: 1)
    assert physical_cores(tmp_path) == 1, "the container's quota is less"

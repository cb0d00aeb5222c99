import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import machine
from benchmarks.gpu.checks import checks
from benchmarks.gpu.training import Training, compare
from benchmarks.gpu.workplace import CheckFailed, Workplace
from tests.launching import REPOSITORY, run

SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"


def record(name: str, status: str, **details: float) -> dict[str, Any]:
    return {"name": name, "status": status, "seconds": 1.0, "details": details}


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    output = run([SCRIPT, "--cpu", "--only", "fp16", "evaluation", "--out", str(tmp_path)], cwd=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    statuses = {check["name"]: check["status"] for check in results["checks"]}
    assert statuses == {"fp16": "skipped", "evaluation": "passed"}, output
    assert results["checks"][1]["details"]["images"] == 32
    assert "evaluation               passed" in (tmp_path / "results.txt").read_text()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "MODULES", {"json": "json", "missing_module": "missing-package"})
    monkeypatch.setattr(sys, "argv", ["gpu.sh"])
    assert gpu.main() == 2
    assert "missing Python packages: missing-package." in capsys.readouterr().out


def test_a_check_that_hangs_or_crashes_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    monkeypatch.setattr(sys, "executable", str(program))
    for text, status, message in (
        ("import time; time.sleep(60)", "timed out", "not done within 1 s"),
        ("raise RuntimeError('no kernel')", "failed", "no kernel"),
        ('print(\'{"status": "passed", "details": {}}\')', "passed", None),
    ):
        program.write_text(f"#!/usr/bin/env python3\n{text}\n")
        program.chmod(0o755)
        result = gpu.in_own_process("fp32", tmp_path, "cpu", limit=1)
        assert result["status"] == status
        assert message is None or message in result["message"]


def test_the_median_of_several_rounds_decides() -> None:
    rounds = [record("resnet18-128", "passed", ratio=ratio, asked=0.95) for ratio in (0.94, 0.96, 0.97)]
    assert gpu.status(rounds) == "passed"
    assert gpu.status([*rounds, *[record("resnet18-128", "below", ratio=0.9, asked=0.95)] * 3]) == "below"
    lines = gpu.table([record("fp32", "failed"), *rounds]).splitlines()
    assert lines[1].split() == ["fp32", "failed"]
    assert "median ratio 0.960 of 3 rounds (0.940 to 0.970)" in lines[2]


@pytest.mark.parametrize(("losses", "message"), [([1.0, 2.2], "differ by 9.1e-02"), ([1.0], "2 and 1 losses")])
def test_different_losses_fail(losses: list[float], message: str) -> None:
    one, other = (Training(Path(), [{"train_loss": loss} for loss in values]) for values in ([1.0, 2.0], losses))
    assert compare(one, one, 0.0)["losses"] == 2
    with pytest.raises(CheckFailed, match=message):
        compare(one, other, 1e-3)


def test_the_limits_of_the_checks_of_correctness_leave_time_for_speed() -> None:
    every = checks(Workplace(folder=Path(), device="cuda"))
    first_speed = next(number for number, check in enumerate(every.values()) if check.is_speed)
    assert sum(check.limit for check in list(every.values())[:first_speed]) < gpu.BUDGET
    assert gpu.BUDGET < 480

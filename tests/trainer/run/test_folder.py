import os
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from regraft.contract import ATTEMPTS, CHECKPOINTS, CONFIG, CURVES, LOG_FOLDER, METRICS, MODEL, SPLIT, attempt_path
from tests.launching import attempt
from trainer.config.parse import dump, keys
from trainer.config.schema import Config
from trainer.config.sections.data import DataConfig
from trainer.errors import UserError
from trainer.run import folder as folder_module
from trainer.run.folder import (
    FINE_TUNED,
    HEADER,
    INITIAL,
    WISE,
    archive_results,
    archive_run,
    check_resumable,
    check_visible,
    choose_folder,
    holds_run,
    saved_execution,
    saving_to,
    write_config,
)

FIRST = "run:\n  dir: here\noptim:\n  lr: 0.1\n  name: sgd\ndebug: false\n"
OTHER = "run:\n  dir: here\noptim:\n  lr: 0.2\n  momentum: 0.5\ndebug: false\n"
FILES = (MODEL, METRICS, CURVES, SPLIT)
CHECKPOINT = f"{CHECKPOINTS}/step-00000006-epoch-0002"
NO_CHECKPOINT = "an earlier start in this folder has saved no checkpoint: starting anew"
DEFAULT = dump(Config(data=DataConfig(root="/data")))

Resume = Literal["auto", "never", "must"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(folder: Path, config: str = FIRST, resume: Resume = "auto") -> str | None:
    """Check, archive and write, as a start does; return the line to print."""
    message = check_resumable(folder, config, resume=resume)
    if resume == "never" and holds_run(folder):
        message = archive_run(folder)
    write_config(folder, config)
    return message


def make_finished_run(folder: Path, config: str = FIRST) -> dict[str, bytes]:
    """Create a run with results and a checkpoint, and return its files."""
    (folder / CHECKPOINT).mkdir(parents=True)
    (folder / CHECKPOINT / "state.json").write_text("a state")
    (folder / CONFIG).write_text(HEADER + config)
    for name in FILES:
        (folder / name).write_text(f"content of {name}")
    write_attempt(folder)
    return contents(folder)


def write_attempt(folder: Path, number: int = 1, **changes: Any) -> None:
    (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    attempt_path(folder, number).write_text(attempt(number, **{"state": "done", "step": 6, **changes}).to_json())


def refusal(folder: Path, config: str = FIRST, resume: Resume | str = "auto") -> str:
    """Return why a start is refused. No file may change."""
    before = contents(folder.parent)
    with pytest.raises(UserError) as caught:
        start(folder, config, resume)  # type: ignore[arg-type]
    assert contents(folder.parent) == before
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "图 1"


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_leaves_other_files_alone(resume: Resume, folder: Path) -> None:
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    write_attempt(folder, state="running", step=0)  # killed before it had written its config
    before = contents(folder)
    assert start(folder, resume=resume) is None
    assert contents(folder) == {CONFIG: (HEADER + FIRST).encode(), **before}
    assert start(folder.parent / "new", resume=resume) is None


def test_must_refuses_a_folder_without_a_run(folder: Path) -> None:
    folder.parent.mkdir()
    expected = f"run.resume is must, but {folder} holds no run to resume"
    assert refusal(folder, resume="must") == expected
    assert not folder.exists()
    folder.mkdir()
    assert refusal(folder, resume="must") == expected
    (folder / CONFIG).write_text(HEADER + "[damaged")
    (folder / METRICS).write_text("a few rows")
    assert refusal(folder, resume="must") == f"run.resume is must, but the run in {folder} has no checkpoint yet"
    assert start(folder, OTHER) == NO_CHECKPOINT
    assert (folder / CONFIG).read_text() == HEADER + OTHER


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_files_of_the_user_are_never_overwritten(resume: Resume, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in (*FILES, CHECKPOINTS):
        (folder / name).write_text("somebody's")
        assert f"holds {name} but no {CONFIG}" in refusal(folder, resume=resume)
        (folder / name).unlink()
    (folder / CONFIG).write_text("train:\n  precision: bf16\n")
    assert f"holds a {CONFIG} that no run has written" in refusal(folder, resume=resume)
    (folder / CHECKPOINT).mkdir(parents=True)
    assert saved_execution(folder) is None


def test_never_archives_earlier_runs(folder: Path) -> None:
    runs = []
    for number in (1, 2):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "my notes.txt").write_text(f"of run {number}")
        runs.append(make_finished_run(folder, config="\0 : [damaged"))
        message = start(folder, OTHER, resume="never")
        assert message == f"the earlier run was archived as {folder}.earlier-{number}"
        assert contents(folder) == {CONFIG: (HEADER + OTHER).encode()}
    for number, run in enumerate(runs, start=1):
        assert contents(folder.with_name(f"{folder.name}.earlier-{number}")) == run
    assert len(list(folder.parent.iterdir())) == 3


def test_archiving_keeps_the_logs_of_this_start_and_the_target_of_a_link(folder: Path, tmp_path: Path) -> None:
    run = make_finished_run(target := tmp_path / "disk" / "run")
    folder.parent.mkdir()
    folder.symlink_to(target)
    start(folder, OTHER, resume="never")
    assert contents(target) == run
    assert contents(folder) == {CONFIG: (HEADER + OTHER).encode()}
    assert (folder.parent / f"{folder.name}.earlier-1" / MODEL).exists()
    for number in ("0001", "0002"):
        (folder / "logs" / number).mkdir(parents=True)
        (folder / "logs" / number / "log").write_text(number)
    archive_run(folder, {LOG_FOLDER: str(folder / "logs" / "0002")})
    assert contents(folder) == {"logs/0002/log": b"0002"}
    assert contents(folder.with_name(f"{folder.name}.earlier-2") / "logs") == {"0001/log": b"0001"}


def test_results_without_checkpoints_are_archived(tmp_path: Path) -> None:
    assert archive_results(tmp_path) is None
    for name in (MODEL, METRICS, FINE_TUNED, WISE, INITIAL):
        (tmp_path / name).write_text(name)
    assert str(archive_results(tmp_path)).endswith(f"archived as earlier-1-{MODEL}")
    archived = {f"earlier-1-{name}" for name in (MODEL, METRICS, FINE_TUNED, WISE)}
    assert {path.name for path in tmp_path.iterdir()} == {INITIAL} | archived


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_resumes_with_the_same_config_only(resume: Resume, folder: Path) -> None:
    with pytest.raises(UserError, match="one folder that every machine shares"):
        check_visible(folder)
    run = make_finished_run(folder)
    check_visible(folder)
    assert start(folder, resume=resume) is None
    assert contents(folder) == run
    expected = (
        f"run.dir {folder}: holds a run of another config:\n"
        "  optim.lr: 0.1 there, 0.2 now\n"
        "  optim.momentum: None there, 0.5 now\n"
        "  optim.name: 'sgd' there, None now\n"
        "Choose another run.dir, or --run.resume never, which archives that run"
    )
    assert refusal(folder, OTHER, resume) == expected
    (folder / CHECKPOINT).rename(folder / "elsewhere")
    (folder / "pretrain" / CHECKPOINT).mkdir(parents=True)
    write_attempt(folder, step=0)
    assert refusal(folder, OTHER, resume) == expected, "a checkpoint of pretraining is enough"
    (folder / "pretrain" / CHECKPOINT).rmdir()
    # A kill between the best epoch's model and the first checkpoint leaves a model without checkpoints.
    if resume == "auto":
        assert refusal(folder, OTHER) == expected
        assert start(folder) == NO_CHECKPOINT


def test_metrics_whose_checkpoints_are_gone_are_not_overwritten(folder: Path) -> None:
    make_finished_run(folder)
    (folder / CHECKPOINT).rename(folder / "elsewhere")
    write_attempt(folder, 2, state="running", step=0)
    for resume in ("auto", "must"):
        assert refusal(folder, resume=resume) == (
            f"{folder / CHECKPOINTS}: attempt 1 has saved step 6 of this run, but its checkpoints are gone. Restore "
            "one, or --run.resume never, which archives the run"
        )
    attempt_path(folder, 1).write_text("{")
    assert start(folder) == NO_CHECKPOINT, "a damaged record says nothing"


@pytest.mark.parametrize("phase", ["pretrain", "baseline"])
def test_metrics_of_a_phase_whose_checkpoints_are_gone_are_not_overwritten(phase: str, folder: Path) -> None:
    make_finished_run(folder)
    write_attempt(folder, 2, stage=phase, step=3)
    assert start(folder) is None, "the whole phase was removed, to repeat it"
    (folder / phase).mkdir()
    (folder / phase / METRICS).write_text("rows")
    assert str(folder / phase / CHECKPOINTS) in refusal(folder)
    (folder / phase / CHECKPOINTS / "damaged-1-step-00000003-epoch-0001").mkdir(parents=True)
    assert start(folder) is None, "a quarantined checkpoint can be restored"


def edited(key: str, value: object = "another", config: str = DEFAULT) -> str:
    """Return a config with another value at a dotted key."""
    values = parent = yaml.safe_load(config)
    *sections, last = key.split(".")
    for section in sections:
        parent = parent[section]
    parent[last] = value
    return yaml.safe_dump(values, allow_unicode=True)


@pytest.mark.parametrize("key", list(keys()))
def test_a_resumed_run_may_change_where_and_how_fast_it_runs(key: str, folder: Path) -> None:
    make_finished_run(folder, DEFAULT)
    assert not {"run.seed", "train.batch_size", "train.precision", "optim.lr"} & folder_module._MAY_CHANGE
    if key in folder_module._MAY_CHANGE:
        assert start(folder, edited(key)) is None
        assert (folder / CONFIG).read_text() == HEADER + edited(key)
    else:
        assert refusal(folder, edited(key)).count(f"\n  {key}: ") == 1


LONGER = [("train.epochs", 5, 6), ("regularization.early_stopping", 2, 3), ("regularization.early_stopping", 2, None)]


@pytest.mark.parametrize(("key", "before", "after"), LONGER)
def test_a_run_may_become_longer_and_more_patient(key: str, before: object, after: object, folder: Path) -> None:
    make_finished_run(folder, edited(key, before))
    assert start(folder, edited(key, after)) is None
    for saved, now in ((after, before), *((other, 5) for other in ("7", None, [5], 4.0) if key == "train.epochs")):
        (folder / CONFIG).write_text(HEADER + edited(key, saved))
        assert f"\n  {key}: {saved!r} there, {now!r} now" in refusal(folder, edited(key, now))


@pytest.mark.parametrize(
    "content", [b"", b"- a list", b"a word", b"a: [1", b"\xff\xfe\xfa", b"a: !!python/name:os.system", b"&a {b: *a}"]
)
def test_a_damaged_config_is_refused(content: bytes, folder: Path) -> None:
    make_finished_run(folder)
    (folder / CONFIG).write_bytes(HEADER.encode() + content)
    assert saved_execution(folder) is None
    for resume in ("auto", "must"):
        advice = "Restore the file, or --run.resume never, which archives the run"
        assert re.fullmatch(rf"{folder / CONFIG}: damaged \(.*\)\. {advice}", refusal(folder, resume=resume))


@pytest.mark.parametrize("phase", ["", "pretrain"])
def test_precision_and_layout_of_a_run_with_a_checkpoint_are_saved(phase: str, folder: Path) -> None:
    assert saved_execution(folder) is None
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(HEADER + edited("train.precision", "bf16"))
    assert saved_execution(folder) is None, "without a checkpoint"
    (folder / phase / CHECKPOINT).mkdir(parents=True)
    for precision, channels_last, expected in (
        ("bf16", True, ("bf16", True)), ("tf32", False, ("tf32", False)), ("auto", True, None), ("fp64", True, None),
        (["bf16"], True, None), ("bf16", "auto", None),
    ):  # fmt: skip
        options = yaml.safe_load(edited("train.precision", precision))
        options["train"]["channels_last"] = channels_last
        (folder / CONFIG).write_text(HEADER + yaml.safe_dump(options))
        assert saved_execution(folder) == expected


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_folder_that_cannot_be_written_is_refused(
    resume: Resume, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_finished_run(folder)
    (folder.parent / "file").write_text("mine")
    if resume != "must":
        text = refusal(folder.parent / "file", resume=resume)
        assert text == f"run.dir {folder.parent / 'file'}: cannot be written to (File exists); choose another folder"
        assert "cannot be written to (Not a directory)" in refusal(folder.parent / "file" / "below", resume=resume)

    def denied(*_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(folder_module, "write_text_atomically", denied)
    monkeypatch.setattr(Path, "rename", denied)
    action = "archived" if resume == "never" else "written to"
    expected = f"run.dir {folder}: cannot be {action} (Permission denied); choose another folder"
    assert refusal(folder, resume=resume) == expected
    with pytest.raises(UserError, match=r"could not be saved .*resumes from there"), saving_to(folder):
        denied()


def choose(folder: Path, config: str = FIRST) -> str:
    chosen, message = choose_folder(folder, config)
    assert (message is None) == (chosen == folder)
    assert message is None or re.fullmatch(
        rf"run\.dir is not set, and {folder} holds .*: this run is in {chosen}", message
    )
    return chosen.name.removeprefix(folder.name)


def test_each_config_has_its_own_default_folder(folder: Path) -> None:
    third = FIRST.replace("0.1", "0.3")
    assert choose(folder) == ""
    make_finished_run(folder)
    assert [choose(folder, config) for config in (FIRST, OTHER, third)] == ["", "-2", "-2"]
    make_finished_run(folder.with_name(f"{folder.name}-2"), OTHER)
    assert [choose(folder, config) for config in (FIRST, OTHER, third)] == ["", "-2", "-3"]
    make_finished_run(folder.with_name(f"{folder.name}-3"), third)
    assert [choose(folder, config) for config in (FIRST, OTHER, third)] == ["", "-2", "-3"]


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("data.root", "another", False), ("run.seed", "another", False), ("run.device", "another", True),
        ("run.resume", "another", True), ("train.precision", "auto", True), ("train.precision", "bf16", False),
    ],
)  # fmt: skip
def test_another_data_set_has_another_default_folder(key: str, value: str, same: bool, folder: Path) -> None:
    make_finished_run(folder, edited("train.precision", "fp32"))
    assert choose(folder, edited(key, value, edited("train.precision", "fp32"))) == ("" if same else "-2")


def test_default_folders_that_are_not_used(folder: Path) -> None:
    start(folder)
    write_attempt(folder, state="failed", step=0)
    assert choose(folder, OTHER) == "", "a start without results may be followed by another one"
    write_attempt(folder, state="running", step=0)
    assert (choose(folder, FIRST), choose(folder, OTHER)) == ("", "-2"), "it may still run"
    (folder / CONFIG).write_text(HEADER + "[damaged")
    assert choose(folder) == "-2"
    (folder / CONFIG).unlink()
    (folder / MODEL).write_text("somebody's")
    assert choose(folder) == "-2"

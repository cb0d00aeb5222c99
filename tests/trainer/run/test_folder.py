import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer.checkpoint.store import CheckpointId
from trainer.config.parse import dump, keys
from trainer.config.schema import Config, DataConfig, RegularizationConfig, RunConfig
from trainer.errors import UserError
from trainer.run import folder as module
from trainer.run.folder import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    FINE_TUNED,
    MARK,
    METRICS,
    MODEL,
    SPLIT,
    START,
    WISE,
    archive_results,
    archive_run,
    check_resumable,
    check_seen,
    holds_run,
    saved_precision,
    write_config,
)
from trainer.run.lock import ATTEMPTS, AttemptRecord

FIRST = "run:\n  dir: here\noptim:\n  lr: 0.1\n  name: sgd\ndebug: false\n"
OTHER = "run:\n  dir: here\noptim:\n  lr: 0.2\n  momentum: 0.5\ndebug: false\n"
FILES = (MODEL, METRICS, CURVES, SPLIT)
CHECKPOINT = f"{CHECKPOINTS}/{CheckpointId(step=6, epoch=2).name}"
NOT_BEGUN = "an earlier start in this folder had not come to a checkpoint: starting anew"

Resume = Literal["auto", "never", "must"]


def contents(folder: Path) -> dict[str, bytes]:
    """Return everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def opened(folder: Path, config: str = FIRST, resume: Resume = "auto") -> str | None:
    """Do what a start does with its run folder, and return what it says of it."""
    note = check_resumable(folder, config, resume=resume)
    if resume == "never" and holds_run(folder):
        note = archive_run(folder)
    write_config(folder, config)
    return note


def finished(folder: Path, config: str = FIRST) -> dict[str, bytes]:
    """Leave a run that has saved, and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(MARK + config)
    for name in FILES:
        (folder / name).write_text(f"what {name} held")
    (folder / CHECKPOINT).mkdir(parents=True)
    (folder / CHECKPOINT / "state.json").write_text("a state")
    noted(folder)
    return contents(folder)


def noted(folder: Path, number: int = 1, **changes: Any) -> None:
    """Leave the record of an attempt that has ended."""
    record = AttemptRecord(
        attempt=number,
        state="done",
        step=6,
        began="then",
        host="there",
        pid=1,
        started=1,
        pid_namespace="x",
        lease_id="y",
    )
    (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    record = dataclasses.replace(record, **changes)
    (folder / ATTEMPTS / f"{number:04}.json").write_text(json.dumps(dataclasses.asdict(record)))


def lose_checkpoints(folder: Path) -> None:
    (folder / CHECKPOINT / "state.json").unlink()
    (folder / CHECKPOINT).rmdir()


def refusal(folder: Path, config: str = FIRST, resume: Resume = "auto") -> str:
    """Return why a folder is refused; nothing around it has changed."""
    before = contents(folder.parent)
    with pytest.raises(UserError) as caught:
        opened(folder, config, resume)
    assert contents(folder.parent) == before
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "图 1"


# --- nothing there yet


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_folder_is_made_and_holds_the_config(resume: Resume, folder: Path) -> None:
    assert opened(folder, FIRST, resume=resume) is None
    assert contents(folder) == {CONFIG: (MARK + FIRST).encode()}


def test_must_goes_on_with_nothing_and_leaves_nothing(folder: Path) -> None:
    text = f"run.resume is must, but {folder} holds no run to go on from"
    folder.parent.mkdir()
    assert refusal(folder, resume="must") == text
    assert not folder.exists()
    folder.mkdir()
    assert refusal(folder, resume="must") == text


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_with_other_things_is_used_and_they_stay(resume: Resume, folder: Path) -> None:
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    assert opened(folder, FIRST, resume=resume) is None
    assert contents(folder) == {CONFIG: (MARK + FIRST).encode(), "notes/a.txt": b"mine"}


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
@pytest.mark.parametrize("name", [*FILES, CHECKPOINTS])
def test_results_without_a_config_are_never_written_over(name: str, resume: Resume, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text("somebody's")
    assert f"holds {name} but no {CONFIG}" in refusal(folder, resume=resume)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_start_that_was_killed_before_it_wrote_its_config_is_no_hindrance(
    resume: Resume, folder: Path
) -> None:
    noted(folder, state="running", step=0)
    assert opened(folder, resume=resume) is None
    assert (folder / CONFIG).exists()


# --- never


def test_never_moves_the_earlier_runs_aside_and_loses_nothing(folder: Path) -> None:
    runs = []
    for number in (1, 2):
        (folder / "pretrain" / CHECKPOINT).mkdir(parents=True)
        (folder / "pretrain" / CHECKPOINT / "state.json").write_text(f"source {number}")
        (folder / "my notes.txt").write_text(f"of run {number}")
        runs.append(finished(folder))
        note = opened(folder, OTHER, resume="never")
        assert note == f"the earlier run was moved to {folder}.earlier-{number}"
        assert contents(folder) == {CONFIG: (MARK + OTHER).encode()}
    for number, run in enumerate(runs, start=1):
        assert contents(folder.with_name(f"{folder.name}.earlier-{number}")) == run
        assert run["my notes.txt"] == f"of run {number}".encode()
    assert len(list(folder.parent.iterdir())) == 3


def test_never_asks_nothing_of_what_it_moves_aside(folder: Path) -> None:
    finished(folder, config="\0 : [damaged")
    lose_checkpoints(folder)
    assert opened(folder, FIRST, resume="never") is not None
    assert (folder.parent / f"{folder.name}.earlier-1" / MODEL).exists()


def test_never_moves_a_link_and_not_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "disk" / "run")
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "disk" / "run")
    opened(folder, OTHER, resume="never")
    assert contents(tmp_path / "disk" / "run") == run
    assert contents(folder) == {CONFIG: (MARK + OTHER).encode()}
    assert (folder.parent / f"{folder.name}.earlier-1" / MODEL).exists()


# --- auto and must


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_of_the_same_config_is_gone_on_with(resume: Resume, folder: Path) -> None:
    run = finished(folder)
    assert opened(folder, FIRST, resume=resume) is None
    assert contents(folder) == run


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_of_another_config_is_refused_with_the_differences(resume: Resume, folder: Path) -> None:
    finished(folder)
    assert refusal(folder, OTHER, resume) == (
        f"run.dir {folder}: holds a run of another config:\n"
        "  optim.lr: 0.1 there, 0.2 now\n"
        "  optim.momentum: None there, 0.5 now\n"
        "  optim.name: 'sgd' there, None now\n"
        "Choose another run.dir, or --run.resume never, which moves that run aside"
    )


def test_a_run_whose_source_model_is_trained_has_begun(folder: Path) -> None:
    (folder / "pretrain" / CHECKPOINT).mkdir(parents=True)
    (folder / CONFIG).write_text(MARK + FIRST)
    assert opened(folder, FIRST, resume="must") is None
    assert "optim.lr: 0.1 there, 0.2 now" in refusal(folder, OTHER)


def test_a_start_that_got_nowhere_may_be_followed_by_another(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(MARK + "[damaged")
    (folder / METRICS).write_text("a few rows")
    assert refusal(folder, resume="must") == (
        f"run.resume is must, but the run in {folder} has not come to its first checkpoint"
    )
    assert opened(folder, OTHER, resume="auto") == NOT_BEGUN
    assert (folder / CONFIG).read_text() == MARK + OTHER


def test_a_model_without_its_state_is_not_given_up_for_another_config(folder: Path) -> None:
    finished(folder)
    lose_checkpoints(folder)
    noted(folder, state="running", step=0)
    assert "optim.lr: 0.1 there, 0.2 now" in refusal(folder, OTHER)
    # A kill between the best epoch's model and the first checkpoint leaves the same.
    assert opened(folder, FIRST, resume="auto") == NOT_BEGUN


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_the_figures_of_a_run_that_has_lost_its_checkpoints_are_not_written_over(
    resume: Resume, folder: Path
) -> None:
    finished(folder)
    lose_checkpoints(folder)
    noted(folder, 2, state="running", step=0)
    assert refusal(folder, FIRST, resume) == (
        f"{folder / CHECKPOINTS}: attempt 1 has saved step 6 of this run, but no checkpoint is there any more. "
        "Restore one, or --run.resume never, which moves the run aside"
    )
    assert opened(folder, FIRST, resume="never") is not None


@pytest.mark.parametrize("stage", ["pretrain", "baseline"])
def test_nor_are_those_of_its_parts(stage: str, folder: Path) -> None:
    finished(folder)
    noted(folder, 2, stage=stage, step=3)
    assert opened(folder) is None, "somebody has removed the whole of it, to make it again"
    (folder / stage).mkdir()
    (folder / stage / METRICS).write_text("rows")
    assert str(folder / stage / CHECKPOINTS) in refusal(folder)
    (folder / stage / CHECKPOINTS / f"damaged-1-{CheckpointId(step=3, epoch=1).name}").mkdir(parents=True)
    assert opened(folder) is None, "a checkpoint that was set aside can be restored"


def test_records_that_are_damaged_are_no_hindrance(folder: Path) -> None:
    finished(folder)
    lose_checkpoints(folder)
    (folder / ATTEMPTS / "0001.json").write_text("{")
    noted(folder, 2, stage="a\0/../b", step=0)
    assert opened(folder) == NOT_BEGUN


def config(**changes: object) -> str:
    return dump(Config(data=DataConfig(root="/data", **changes)))  # type: ignore[arg-type]


def changed(text: str, key: str) -> str:
    """Return a config with another value at a dotted key."""
    values = module.yaml.safe_load(text)
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[last] = "another"
    return str(module.yaml.safe_dump(values))


FREE = {
    "run.dir",
    "run.resume",
    "run.device",
    "run.threads",
    "run.hang_timeout",
    "run.audit",
    "data.root",
    "data.num_workers",
    "data.cache",
    "data.on_unreadable",
    "transfer.strategy",
    "train.grad_accum_steps",
    "train.logs_per_epoch",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.keep_every",
}


@pytest.mark.parametrize("key", list(keys()))
def test_only_where_and_how_fast_may_change(key: str, folder: Path) -> None:
    finished(folder, config())
    now = changed(config(), key)
    if key in FREE:
        assert opened(folder, now, resume="auto") is None
        assert (folder / CONFIG).read_text() == MARK + now
    else:
        text = refusal(folder, now)
        assert f"\n  {key}: " in text
        assert text.count(" there, ") == 1


def test_what_may_change_exists() -> None:
    assert set(keys()) >= FREE
    assert module._FREE == FREE


def test_a_run_may_become_longer(folder: Path) -> None:
    finished(folder, config())
    longer = config().replace("epochs: 5", "epochs: 6", 1)
    assert longer != config()
    assert opened(folder, longer) is None
    assert (folder / CONFIG).read_text() == MARK + longer
    assert refusal(folder, config()) == (
        f"run.dir {folder}: holds a run of another config:\n"
        "  train.epochs: 6 there, 5 now\n"
        "Choose another run.dir, or --run.resume never, which moves that run aside"
    ), "and is longer from then on"


@pytest.mark.parametrize("there", ["'7'", "null", "[5]", "4.0"])
def test_a_number_of_epochs_that_is_none_is_not_exceeded(there: str, folder: Path) -> None:
    finished(folder, config().replace("epochs: 5", f"epochs: {there}", 1))
    assert "\n  train.epochs: " in refusal(folder, config())


def test_a_run_written_before_an_option_was_thought_of_is_another(folder: Path) -> None:
    values = module.yaml.safe_load(config())
    del values["checkpoint"], values["optim"]["max_grad_norm"]
    finished(folder, module.yaml.safe_dump(values))
    assert opened(folder, config()) is None, "as without it: not clipped"
    now = changed(config(), "optim.max_grad_norm")
    del values["optim"]["momentum"]
    (folder / CONFIG).write_text(MARK + module.yaml.safe_dump(values))
    assert "optim.max_grad_norm: None there, 'another' now\n  optim.momentum: None there, 0.9 now" in refusal(
        folder, now
    )


def test_a_config_is_the_same_after_it_was_written(folder: Path) -> None:
    text = dump(Config(run=RunConfig(dir="runs/é"), data=DataConfig(root="图 片", crop_scale=(0.3, 0.9))))
    finished(folder, text)
    assert opened(folder, text, resume="must") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"- a list", b"a word", b"a: [1", b"\xff\xfe\xfa", b"a: !!python/name:os.system", b"&a {b: *a}"],
)
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_damaged_config_is_refused(content: bytes, resume: Resume, folder: Path) -> None:
    finished(folder)
    (folder / CONFIG).write_bytes(MARK.encode() + content)
    text = refusal(folder, resume=resume)
    assert text.startswith(f"{folder / CONFIG}: damaged (")
    assert text.endswith("Restore the file, or --run.resume never, which moves the run aside")
    assert "\n" not in text


# --- folders that cannot be used


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_file_is_not_a_folder(resume: Resume, folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("mine")
    assert refusal(folder, resume=resume) == (
        f"run.dir {folder}: cannot be written to (File exists); choose another folder"
    )
    assert "cannot be written to (Not a directory)" in refusal(folder / "below", resume=resume)


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_folder_that_may_not_be_written_is_refused(resume: Resume, folder: Path) -> None:
    finished(folder)
    for path in (folder, folder.parent):
        path.chmod(0o555)
    folder.parent.parent.chmod(0o755)
    nobody, me = 65534, os.geteuid()
    above = [p for p in folder.parents if p.stat().st_uid == me and not p.stat().st_mode & 0o001]
    modes = {p: p.stat().st_mode for p in above}
    try:
        if me == 0:  # root may write anywhere: be somebody else for a moment
            for path in above:
                path.chmod(0o755)
            os.seteuid(nobody)
        text = refusal(folder, resume=resume)
    finally:
        os.seteuid(me)
        for path, mode in modes.items():
            path.chmod(mode)
        for path in (folder, folder.parent):
            path.chmod(0o755)
    what = "moved aside" if resume == "never" else "written to"
    assert text == f"run.dir {folder}: cannot be {what} (Permission denied); choose another folder"


def test_a_config_that_cannot_be_written_leaves_the_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(folder, config())

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text_atomically", full)
    text = refusal(folder, changed(config(), "run.threads"))
    assert "cannot be written to (No space left on device)" in text


# --- what the first start chose


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_precision_that_a_run_began_with_is_kept(precision: str, folder: Path) -> None:
    text = config().replace("precision: auto", f"precision: {precision}")
    assert text != config()
    assert saved_precision(folder) is None
    finished(folder, text)
    assert saved_precision(folder) == precision
    lose_checkpoints(folder)
    assert saved_precision(folder) is None, "a start that got nowhere binds nobody"
    (folder / "pretrain" / CHECKPOINT).mkdir(parents=True)
    assert saved_precision(folder) == precision, "the source model was trained in it"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a list",
        b"train: 3",
        b"train: {precision: tf32}",
        b"train: {precision: [bf16]}",
        b"a: [1",
        b"\xff",
    ],
)
def test_a_damaged_config_has_no_precision_to_keep(content: bytes, folder: Path) -> None:
    finished(folder)
    (folder / CONFIG).write_bytes(MARK.encode() + content)
    assert saved_precision(folder) is None


def test_a_config_of_the_users_own_has_no_precision_to_keep(folder: Path) -> None:
    finished(folder)
    (folder / CONFIG).write_text("train:\n  precision: bf16\n")
    assert saved_precision(folder) is None


# --- whose folder it is


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_config_of_the_users_own_is_neither_overwritten_nor_moved(resume: Resume, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("# my own, with remarks\n" + FIRST)
    (folder / "thesis.tex").write_text("years of work")
    before = contents(folder)
    with pytest.raises(UserError, match=r"holds a config\.yaml that no run has written"):
        opened(folder, FIRST, resume=resume)
    assert contents(folder) == before


def test_a_folder_that_another_machine_does_not_see_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="one folder that every machine shares"):
        check_seen(folder)
    opened(folder)
    check_seen(folder)


@pytest.mark.parametrize(
    ("before", "after", "allowed"), [(2, 3, True), (2, None, True), (3, 2, False), (None, 2, False)]
)
def test_a_run_may_become_more_patient_and_not_less(
    before: int | None, after: int | None, allowed: bool, tmp_path: Path
) -> None:
    def config(patience: int | None) -> str:
        return dump(Config(regularization=RegularizationConfig(early_stopping=patience)))

    finished(tmp_path / "run", config(before))
    if allowed:
        assert opened(tmp_path / "run", config(after)) is None
    else:
        assert f"regularization.early_stopping: {before} there, {after} now" in refusal(
            tmp_path / "run", config(after)
        )


def test_results_without_checkpoints_are_set_aside_with_what_belongs_to_them(tmp_path: Path) -> None:
    for name in (MODEL, METRICS, FINE_TUNED, WISE, START):
        (tmp_path / name).write_text(name)
    assert archive_results(tmp_path) is not None
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted([START, *(f"earlier-1-{name}" for name in (MODEL, METRICS, FINE_TUNED, WISE))])

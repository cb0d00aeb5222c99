import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from trainer import run_folder
from trainer.checkpoint import Counters, save_state
from trainer.config import Config, DataConfig, RunConfig
from trainer.errors import UserError
from trainer.parse import dump, keys
from trainer.run_folder import (
    CONFIG,
    CURVES,
    LAST,
    MARK,
    METRICS,
    MODEL,
    SPLIT,
    check_seen,
    find_state,
    open_folder,
)

FIRST = "run:\n  dir: here\noptim:\n  lr: 0.1\n  name: sgd\ndebug: false\n"
OTHER = "run:\n  dir: here\noptim:\n  lr: 0.2\n  momentum: 0.5\ndebug: false\n"
OURS = (MODEL, LAST, METRICS, CURVES, SPLIT)
NOT_BEGUN = "an earlier start in this folder had not finished an epoch: starting anew"

Resume = Literal["auto", "never", "must"]


def contents(folder: Path) -> dict[str, bytes]:
    """Return everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(folder: Path, config: str = FIRST) -> dict[str, bytes]:
    """Leave a run after an epoch, and return its files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(MARK + config)
    for name in OURS:
        (folder / name).write_text(f"what {name} held")
    return contents(folder)


def refusal(folder: Path, config: str = FIRST, resume: Resume = "auto") -> str:
    """Return why a folder is refused; nothing around it has changed."""
    before = contents(folder.parent)
    with pytest.raises(UserError) as caught:
        open_folder(folder, config, resume=resume)
    assert contents(folder.parent) == before
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "图 1"


# --- nothing there yet


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_folder_is_made_and_holds_the_config(resume: Resume, folder: Path) -> None:
    assert open_folder(folder, FIRST, resume=resume) is None
    assert contents(folder) == {CONFIG: (MARK + FIRST).encode()}
    assert find_state(folder, data="x") is None


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
    assert open_folder(folder, FIRST, resume=resume) is None
    assert contents(folder) == {CONFIG: (MARK + FIRST).encode(), "notes/a.txt": b"mine"}


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
@pytest.mark.parametrize("name", OURS)
def test_results_without_a_config_are_never_written_over(name: str, resume: Resume, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_text("somebody's")
    assert f"holds {name} but no {CONFIG}" in refusal(folder, resume=resume)


# --- never


def test_never_moves_the_earlier_runs_aside_and_loses_nothing(folder: Path) -> None:
    runs = []
    for number in (1, 2):
        (folder / "source").mkdir(parents=True)
        (folder / "source" / LAST).write_text(f"source {number}")
        (folder / "my notes.txt").write_text(f"of run {number}")
        runs.append(finished(folder))
        note = open_folder(folder, OTHER, resume="never")
        assert note == f"the earlier run was moved to {folder}.earlier-{number}"
        assert contents(folder) == {CONFIG: (MARK + OTHER).encode()}
    for number, run in enumerate(runs, start=1):
        assert contents(folder.with_name(f"{folder.name}.earlier-{number}")) == run
        assert run["my notes.txt"] == f"of run {number}".encode()
    assert len(list(folder.parent.iterdir())) == 3


def test_never_asks_nothing_of_what_it_moves_aside(folder: Path) -> None:
    finished(folder, config="\0 : [damaged")
    (folder / MODEL).unlink()
    assert open_folder(folder, FIRST, resume="never") is not None
    assert (folder.parent / f"{folder.name}.earlier-1" / LAST).exists()


def test_never_moves_a_link_and_not_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    run = finished(tmp_path / "disk" / "run")
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "disk" / "run")
    open_folder(folder, OTHER, resume="never")
    assert contents(tmp_path / "disk" / "run") == run
    assert contents(folder) == {CONFIG: (MARK + OTHER).encode()}
    assert (folder.parent / f"{folder.name}.earlier-1" / MODEL).exists()


# --- auto and must


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_of_the_same_config_is_gone_on_with(resume: Resume, folder: Path) -> None:
    run = finished(folder)
    assert open_folder(folder, FIRST, resume=resume) is None
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
    (folder / "source").mkdir(parents=True)
    (folder / CONFIG).write_text(MARK + FIRST)
    (folder / "source" / LAST).touch()
    assert open_folder(folder, FIRST, resume="must") is None
    assert "optim.lr: 0.1 there, 0.2 now" in refusal(folder, OTHER)


def test_a_start_that_got_nowhere_may_be_followed_by_another(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(MARK + "[damaged")
    (folder / METRICS).write_text("a few rows")
    assert refusal(folder, resume="must") == (
        f"run.resume is must, but the run in {folder} has not finished an epoch"
    )
    assert open_folder(folder, OTHER, resume="auto") == NOT_BEGUN
    assert (folder / CONFIG).read_text() == MARK + OTHER


def test_a_model_without_its_state_is_not_given_up_for_another_config(folder: Path) -> None:
    finished(folder)
    (folder / LAST).unlink()
    assert "optim.lr: 0.1 there, 0.2 now" in refusal(folder, OTHER)
    # A kill between the two files of the first epoch leaves the same: the metrics tell them apart.
    assert open_folder(folder, FIRST, resume="auto") == NOT_BEGUN


def test_a_state_without_its_model_is_refused(folder: Path) -> None:
    finished(folder)
    (folder / MODEL).unlink()
    text = refusal(folder)
    assert f"holds {LAST} but no {MODEL}" in text
    assert "--run.resume never, which moves the run aside" in text


def config(**changes: object) -> str:
    return dump(Config(data=DataConfig(root="/data", **changes)))  # type: ignore[arg-type]


def changed(text: str, key: str) -> str:
    """Return a config with another value at a dotted key."""
    values = run_folder.yaml.safe_load(text)
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[last] = "another"
    return str(run_folder.yaml.safe_dump(values))


FREE = {
    "run.dir",
    "run.resume",
    "run.device",
    "run.threads",
    "data.root",
    "data.workers",
    "data.cache",
    "data.on_unreadable",
    "train.points_per_epoch",
}


@pytest.mark.parametrize("key", list(keys()))
def test_only_where_and_how_fast_may_change(key: str, folder: Path) -> None:
    finished(folder, config())
    now = changed(config(), key)
    if key in FREE:
        assert open_folder(folder, now, resume="auto") is None
        assert (folder / CONFIG).read_text() == MARK + now
    else:
        text = refusal(folder, now)
        assert f"\n  {key}: " in text
        assert text.count(" there, ") == 1


def test_what_may_change_exists() -> None:
    assert set(keys()) >= FREE
    assert run_folder._FREE == FREE


def test_a_config_is_the_same_after_it_was_written(folder: Path) -> None:
    text = dump(Config(run=RunConfig(dir="runs/é"), data=DataConfig(root="图 片", crop_scale=(0.3, 0.9))))
    finished(folder, text)
    assert open_folder(folder, text, resume="must") is None


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
    assert text == f"run.dir {folder}: cannot be written to (Permission denied); choose another folder"


def test_a_config_that_cannot_be_written_leaves_the_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(folder, config())

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_text_atomically", full)
    text = refusal(folder, changed(config(), "run.threads"))
    assert "cannot be written to (No space left on device)" in text


# --- the state


def with_state(folder: Path, data: str) -> None:
    folder.mkdir(parents=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    save_state(folder / LAST, model, optimizer, Counters(epoch=3, step=9, data=data))


def test_the_state_is_found_where_the_images_are_the_same(folder: Path) -> None:
    with_state(folder, "these images")
    assert find_state(folder, data="these images") == Counters(epoch=3, step=9, data="these images")


def test_a_state_of_other_images_is_refused(folder: Path) -> None:
    with_state(folder, "these images")
    with pytest.raises(UserError, match="holds a run on other training images") as caught:
        find_state(folder, data="others")
    assert str(folder) in str(caught.value)
    assert "--run.resume never" in str(caught.value)


def test_a_damaged_state_is_refused(folder: Path) -> None:
    finished(folder)
    with pytest.raises(UserError, match="not a readable training state"):
        find_state(folder, data="these images")


@pytest.mark.parametrize("resume", ["auto", "never", "must"])
def test_a_config_of_the_users_own_is_neither_overwritten_nor_moved(resume: Resume, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("# my own, with remarks\n" + FIRST)
    (folder / "thesis.tex").write_text("years of work")
    before = contents(folder)
    with pytest.raises(UserError, match=r"holds a config\.yaml that no run has written"):
        open_folder(folder, FIRST, resume=resume)
    assert contents(folder) == before


def test_a_folder_that_another_machine_does_not_see_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="one folder that every machine shares"):
        check_seen(folder)
    open_folder(folder, FIRST, resume="auto")
    check_seen(folder)

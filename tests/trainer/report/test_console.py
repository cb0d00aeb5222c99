import errno
import io
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, cast
from unittest.mock import Mock

import pytest
from rich.console import Console

from trainer.report import console as console_module
from trainer.report.console import BrokenPipeSafeStream, ProgressBar, epoch_header, format_epoch, make_console
from trainer.report.metrics import Row
from trainer.report.progress import counting, downloading

ROW: dict[str, Any] = {
    "epoch": 3, "train_loss": 0.12345, "train_accuracy": 0.9, "test_accuracy": 0.935, "val_accuracy": 0.94,
    "examples_per_sec": 1234.5, "examples_per_sec_compute": 4390.0, "lr_backbone": 5e-5, "lr_head": 5e-4,
    "memory_bytes": 3 * 2**30, "evaluation_seconds": 4.0,
}  # fmt: skip


@pytest.fixture
def plain() -> Console:
    """Return a console that is not a terminal."""
    return Console(file=io.StringIO(), width=100, highlight=False, markup=False, soft_wrap=True)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False, color_system=None)


@pytest.fixture
def ten_seconds_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Stop the clock of the progress displays, and return a function that moves it by more than their interval."""
    clock = 100.0

    def move() -> None:
        nonlocal clock
        clock += 11

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    return move


def output(console: Console) -> str:
    return cast(io.StringIO, console.file).getvalue()


@pytest.mark.parametrize("splits", [["test"], ["val", "test"]])
def test_lines_of_epochs_fit_into_80_columns(splits: list[str]) -> None:
    header, line = epoch_header(splits), format_epoch(ROW, 100, splits)
    assert len(header) == len(line) <= 80
    accuracies = "/".join(f"{ROW[f'{split}_accuracy']:.3f}" for split in ["train", *splits])
    columns = {"loss": "0.1235", "/".join(["acc train", *splits]): accuracies, "ex/s": "1,234", "compute": "4,390"}
    for title, value in {**columns, "wait": "72%", "lr backbone/head": "5e-05/0.0005", "mem": "3.0G"}.items():
        end = header.index(title) + len(title)
        assert line[:end].endswith(value)


def test_numbers() -> None:
    values = {"accuracy": 0.9, "interval": [0.8, 0.95], "correct": 9, "seen": 10}
    row = {f"{split}_{key}": value for split in ("val", "test") for key, value in values.items()}
    text = "accuracy 0.900 (95 % interval 0.800 to 0.950; 9 of 10 correct)"
    start = console_module.format_start(row, ("val", "test"))
    assert start == f"before the first step: val {text}, test {text}"
    assert [console_module.format_duration(seconds) for seconds in (5, 65.4, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert [console_module.format_rate(rate) for rate in (43.94, 99.97, 20123)] == ["43.9", "100.0", "20,123"]
    assert console_module.format_bytes(5 * 2**20) == "5M"


# Training


def train_row(step: int, loss: float = 1.5) -> Row:
    """Return the row of a step of a run with 4 steps per epoch."""
    speed = {"examples_per_sec": 2.0, "examples_per_sec_compute": 4.0, "seconds": 2.0, "memory_bytes": 3 << 30}
    return {"step": step, "train_loss": loss, "train_accuracy": 0.75, "lr_backbone": 1e-5, "lr_head": 1e-4, **speed}


def test_without_a_terminal_progress_is_plain_lines_at_intervals(
    plain: Console, ten_seconds_later: Callable[[], None]
) -> None:
    bar = ProgressBar(plain, epochs=2, steps_per_epoch=4, done_steps=0)
    with bar.show():
        bar.show_metrics(train_row(1))
        assert output(plain) == "", "the interval has not passed"
        ten_seconds_later()
        for step in (2, 3, 4):
            bar.show_metrics(train_row(step))
        ten_seconds_later()
        bar.show_metrics(train_row(5))
        bar.print_epoch(ROW, ["test"])
        bar.print_epoch(ROW, ["test"])
    lines = output(plain).splitlines()
    assert lines[:2] == [
        "  epoch 1/2 step 2/4  loss 1.500  acc 0.750  2.0 ex/s  wait 50%  ETA 0:06",
        "  epoch 2/2 step 1/4  loss 1.500  acc 0.750  2.0 ex/s  wait 50%  ETA 0:06",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["epoch", "3/2", "3/2"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_on_a_terminal_progress_is_a_bar_from_the_resumed_step(encoding: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    terminal = Console(file=file, force_terminal=True, width=80, highlight=False, color_system=None)
    bar = ProgressBar(terminal, epochs=100, steps_per_epoch=4, done_steps=5)
    with bar.show():
        bar.advance(2, 2)
        for loss in (9.0, 4.0, 1.5):
            bar.show_metrics(train_row(6, loss))
        bar._live.refresh()
        file.flush()
        shown = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    *_, first, second, third = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", shown).splitlines()
    assert re.fullmatch(r".*epoch 2/100 training .* 6/400 ETA --:--", first.rstrip())
    chart = "█▃▁" if encoding == "utf-8" else ""
    assert second.rstrip() == f"loss 1.500 {chart}  acc 0.750  lr 1e-05/0.0001"
    assert third.rstrip() == "2.0 ex/s  compute 4.0 ex/s  wait 50%  mem 3.0G"


def test_only_the_console_of_rank_0_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_console(enabled=False).print("no")
    monkeypatch.setattr("sys.stdout", None)
    make_console(enabled=True).print("to a closed standard output")
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "0")
    make_console(enabled=True).print("[bold]no markup[/bold] :smile:")
    assert capsys.readouterr().out == "[bold]no markup[/bold] :smile:\n"


def test_closed_or_ascii_terminal_does_not_end_the_run() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    Console(file=cast(IO[str], BrokenPipeSafeStream(ascii_only)), soft_wrap=True).print("图 done")
    assert cast(io.BytesIO, ascii_only.buffer).getvalue() == b"? done\n"
    closed = Mock(write=Mock(side_effect=OSError(errno.EIO, "")), flush=Mock(side_effect=BrokenPipeError))
    console = Console(file=cast(IO[str], BrokenPipeSafeStream(closed)))
    with ProgressBar(console, epochs=1, steps_per_epoch=2, done_steps=0).show():
        console.print("lost")


# Downloads and image checks


def test_download_bar_shows_size_speed_and_eta_and_leaves_one_line(terminal: Console) -> None:
    with downloading(terminal, "hotdog") as on_progress:
        assert on_progress is not None
        for done in range(0, 400_001, 100_000):
            on_progress(done, 400_000)
            time.sleep(0.15)  # the bar needs two refreshes, 10 per second, for a speed
    pattern = r"downloading hotdog .*━.* \d+\.\d/400\.0 kB \d+\.\d .B/s ETA \d"
    assert re.search(pattern, output(terminal))
    assert re.search(r"(\n|\x1b\[2K)downloading hotdog: 400\.0 kB in \d s\n$", output(terminal))


@pytest.mark.parametrize(
    ("total", "expected"),
    [(400_000, [f"{tenth}0 % of 400.0 kB" for tenth in range(1, 11)]), (None, ["50.0 MB", "100.0 MB"])],
)
def test_without_a_terminal_a_download_prints_some_lines(
    total: int | None, expected: list[str], plain: Console
) -> None:
    with downloading(plain, "hotdog") as on_progress:
        assert on_progress is not None
        on_progress(0, None)
        for done in range(0, (total or 120_000_000) + 1, (total or 4_000_000_000) // 400):
            on_progress(done, total)
    assert output(plain).splitlines() == [f"downloading hotdog: {line}" for line in ("0 bytes", *expected)]


def test_quiet_console_and_cached_download_show_nothing(plain: Console, terminal: Console) -> None:
    for console in (plain, terminal):
        with downloading(console, "hotdog") as on_progress:
            assert on_progress is not None
        console.quiet = True
        with downloading(console, "hotdog") as on_progress, counting(console, "checking") as on_checked:
            assert on_progress is on_checked is None
        assert output(console) == ""


def test_download_bar_is_removed_after_an_error(terminal: Console) -> None:
    with suppress(RuntimeError), downloading(terminal, "hotdog") as on_progress:
        assert on_progress is not None
        on_progress(0, 400_000)
        raise RuntimeError
    assert output(terminal).endswith("\x1b[2K"), "the line is erased"
    assert " in 0 s" not in output(terminal)


def test_image_check_shows_its_count(plain: Console, terminal: Console, ten_seconds_later: Callable[[], None]) -> None:
    with counting(terminal, "checking") as on_checked:
        assert on_checked is not None
        on_checked(3, 7)
    assert re.search(r"checking images .* 3/7", output(terminal))
    with counting(plain, "caching") as on_checked:
        assert on_checked is not None
        on_checked(1, 7)
        ten_seconds_later()
        on_checked(2, 7)
        on_checked(3, 7)
    assert output(plain) == "  caching images 2/7\n", "without a terminal, a line every few seconds"

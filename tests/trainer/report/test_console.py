import errno
import io
import re
from collections.abc import Callable
from typing import IO, Any, cast

import pytest
from rich.console import Console

from trainer.loop import Progress
from trainer.metrics import Metrics
from trainer.report import console as module
from trainer.report.console import (
    BrokenPipeSafeStream,
    ProgressBar,
    checking,
    downloading,
    epoch_header,
    format_bytes,
    format_duration,
    format_epoch,
    format_rate,
    format_start,
    make_console,
)

ROW: dict[str, Any] = {
    "epoch": 3,
    "train_loss": 0.12345,
    "train_accuracy": 0.9,
    "test_accuracy": 0.935,
    "examples_per_sec": 1234.5,
    "examples_per_sec_compute": 43.9,
    "lr_backbone": 5e-5,
    "lr_head": 5e-4,
    "memory_bytes": 3 * 2**30,
}


def progress(epoch_step: int) -> Progress:
    figures = Metrics(
        loss_sum=3.0, correct=2, seen=4, seconds=2.0, compute_seconds=1.0, first_nonfinite_step=None
    )
    return Progress(epoch=1, epoch_step=epoch_step, step=epoch_step, metrics=figures, lr={"head": 0.1})


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=100, highlight=False, markup=False, soft_wrap=True), file


def test_epoch_line_is_aligned_with_its_header() -> None:
    header, line = epoch_header(["test"]), format_epoch(ROW, 5, ["test"])
    assert len(header) == len(line)
    for title, value in (
        ("loss", "0.1235"),
        ("test acc", "0.935"),
        ("ex/s", "1,234"),
        ("compute", "43.9"),
        ("mem", "3.0G"),
    ):
        end = header.index(title) + len(title)
        assert line[:end].endswith(value)


def test_evaluation_before_the_first_step_is_one_line() -> None:
    row = {
        f"{part}_{key}": value
        for part in ("val", "test")
        for key, value in (("accuracy", 0.9), ("interval", [0.8, 0.95]), ("correct", 9), ("seen", 10))
    }
    text = "accuracy 0.900 (95 % interval 0.800 to 0.950; 9 of 10 correct)"
    assert format_start(row, ("val", "test")) == f"before the first step: val {text}, test {text}"


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.4, "1:05"), (3725, "1:02:05")])
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_format_rate_and_format_bytes() -> None:
    assert (format_rate(43.94), format_rate(99.97), format_rate(20123)) == ("43.9", "100.0", "20,123")
    assert (format_bytes(5 * 2**20), format_bytes(3 * 2**30)) == ("5M", "3.0G")


def test_without_a_terminal_progress_is_plain_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = plain()
    clock = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    progress_bar = ProgressBar(console, epochs=2, steps_per_epoch=4, done_steps=0)
    with progress_bar.show():
        progress_bar.show_metrics(progress(1))
        assert file.getvalue() == "", "the interval has not passed"
        clock += 11
        progress_bar.show_metrics(progress(2))
        progress_bar.show_metrics(progress(3))
        progress_bar.show_metrics(progress(4))
        progress_bar.print_epoch(ROW, ["test"])
        progress_bar.print_epoch(ROW, ["test"])
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("  epoch 1/2 step 2/4  loss 0.750 acc 0.500 2.0 ex/s  ETA 0:06")
    assert [line.split()[0] for line in lines[1:]] == ["epoch", "3/2", "3/2"]
    assert "\x1b" not in file.getvalue()


def test_on_a_terminal_progress_is_a_bar_with_eta() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    progress_bar = ProgressBar(console, epochs=1, steps_per_epoch=4, done_steps=0)
    with progress_bar.show():
        progress_bar.advance(1, 1)
        progress_bar.show_metrics(progress(1))
        progress_bar._bar.refresh()
    assert "epoch 1/1 training" in file.getvalue()
    assert "ETA" in file.getvalue()
    assert "1/4" in file.getvalue()


def test_progress_bar_of_a_resumed_run_starts_at_its_step() -> None:
    file = io.StringIO()
    progress_bar = ProgressBar(
        Console(file=file, force_terminal=True, width=100), epochs=2, steps_per_epoch=4, done_steps=5
    )
    with progress_bar.show():
        progress_bar.advance(2, 2)
        progress_bar._bar.refresh()
    assert "epoch 2/2 training" in file.getvalue()
    assert "6/8" in file.getvalue()


def test_only_the_console_of_rank_0_prints(capsys: pytest.CaptureFixture[str]) -> None:
    make_console(speaks=False).print("no")
    make_console(speaks=True).print("[bold]no markup[/bold] :smile:")
    assert capsys.readouterr().out == "[bold]no markup[/bold] :smile:\n"


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=100, highlight=False, color_system=None), file


def test_download_bar_shows_size_speed_and_eta_and_leaves_one_line() -> None:
    console, file = terminal()
    with downloading(console, "hotdog") as on_progress:
        assert on_progress is not None
        for done in range(0, 400_001, 100_000):
            on_progress(done, 400_000)
            module.time.sleep(0.15)  # the bar refreshes 10 times per second and needs two updates for a speed
    text = file.getvalue()
    assert re.search(r"downloading hotdog .*━.* \d+\.\d/400\.0 kB \d+\.\d .B/s ETA \d", text)
    assert re.search(r"(\n|\x1b\[2K)downloading hotdog: 400\.0 kB in \d s\n$", text)


def test_without_a_terminal_a_download_prints_a_line_per_10_percent() -> None:
    console, file = plain()
    with downloading(console, "hotdog") as on_progress:
        assert on_progress is not None
        on_progress(0, None)
        for done in range(0, 400_001, 1_000):
            on_progress(done, 400_000)
        on_progress(400_000, None)
    assert file.getvalue().splitlines() == [
        "downloading hotdog: 0 bytes",
        *(f"downloading hotdog: {tenth}0 % of 400.0 kB" for tenth in range(1, 11)),
    ]


def test_without_a_terminal_and_total_size_a_download_prints_a_line_per_50_mb() -> None:
    console, file = plain()
    with downloading(console, "hotdog") as on_progress:
        assert on_progress is not None
        for done in range(0, 120_000_000, 10_000_000):
            on_progress(done, None)
    assert file.getvalue().splitlines() == [
        f"downloading hotdog: {done}" for done in ("0 bytes", "50.0 MB", "100.0 MB")
    ]


@pytest.mark.parametrize("make", [plain, terminal])
def test_cached_download_shows_nothing(make: Callable[[], tuple[Console, io.StringIO]]) -> None:
    console, file = make()
    with downloading(console, "hotdog"):
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize("make", [plain, terminal])
def test_quiet_console_shows_no_progress(make: Callable[[], tuple[Console, io.StringIO]]) -> None:
    console, file = make()
    console.quiet = True
    with downloading(console, "hotdog") as on_progress, checking(console) as on_checked:
        assert (on_progress, on_checked) == (None, None)
    assert file.getvalue() == ""


def test_download_bar_is_removed_after_an_error() -> None:
    console, file = terminal()

    def fail() -> None:
        with downloading(console, "hotdog") as on_progress:
            assert on_progress is not None
            on_progress(0, 400_000)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.getvalue().endswith("\x1b[2K"), "the line is erased"
    assert " in 0 s" not in file.getvalue()


def test_image_check_shows_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = terminal()
    with checking(console) as on_checked:
        assert on_checked is not None
        on_checked(3, 7)
    assert re.search(r"checking images .* 3/7", file.getvalue())
    console, file = plain()
    clock = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    with checking(console) as on_checked:
        assert on_checked is not None
        on_checked(1, 7)
        clock += 11
        on_checked(2, 7)
        on_checked(3, 7)
    assert file.getvalue() == "  checking images 2/7\n", "without a terminal, a line every few seconds"
    with checking(make_console(speaks=False)) as on_checked:
        assert on_checked is None


def test_closed_terminal_does_not_end_the_run() -> None:
    class ClosedTerminal(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise BrokenPipeError

    console = Console(file=cast(IO[str], BrokenPipeSafeStream(ClosedTerminal())))
    console.print("lost")
    with ProgressBar(console, epochs=1, steps_per_epoch=2, done_steps=0).show():
        console.print("lost")

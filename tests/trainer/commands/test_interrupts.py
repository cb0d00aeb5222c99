"""A stop signal while a command imports torch, which takes seconds: the command stops before it does anything."""

import signal
from collections.abc import Callable

import pytest

from trainer.commands import check, evaluate, export, fetch, predict, preview
from trainer.distributed.signals import Stopped, StopSignals


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (check.check, [".", "--model=nowhere"]),
        (evaluate.evaluate, ["nowhere"]),
        (export.export, ["nowhere", "--to=torch-export"]),
        (fetch.fetch, ["nowhere"]),
        (predict.predict, ["nowhere", "image"]),
    ],
)
def test_signal_during_the_import_of_torch_stops_a_command(
    command: Callable[[list[str], StopSignals], object], argv: list[str]
) -> None:
    signals = StopSignals()
    signals.received = signal.SIGINT
    with pytest.raises(Stopped, match="SIGINT"):
        command(argv, signals)


@pytest.mark.parametrize(("module", "argv"), [(preview, ["nowhere"]), (fetch, ["nowhere"])])
def test_a_signal_is_one_sentence(
    module: object, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "parse", lambda _: signal.raise_signal(signal.SIGTERM))
    assert module.main(argv) == 75  # type: ignore[attr-defined]
    assert capsys.readouterr().err.startswith("stopped by SIGTERM: there was nothing new to save. The same command ")

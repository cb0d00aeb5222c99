"""Train in this process: `regraft.train`."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from trainer.config.options import SECTIONS
from trainer.config.parse import parse
from trainer.config.schema import Config
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.pipeline import run
from trainer.report.summary import TrainResult

_CONFIG_FILES = (".yaml", ".yml")


def train(config: object, options: Mapping[str, object]) -> TrainResult:
    """Train, and return the result; see `regraft.train`.

    A stop signal that interrupts it is raised again after the state is saved and the handlers are restored.
    """
    if isinstance(config, Config) and options:
        raise UserError(f"regraft.train was given a Config and options ({', '.join(options)}): set them in the Config")
    parsed = config if isinstance(config, Config) else parse([*_config_words(config), *_option_words(options)])
    if parsed.debug:
        raise UserError("regraft.train was given debug: use the command regraft debug")
    signals, threads = StopSignals(), torch.get_num_threads()
    is_main_thread = threading.current_thread() is threading.main_thread()  # only that one may set signal handlers
    try:
        with signals if is_main_thread else nullcontext():
            return run(parsed, signals)
    except Stopped as stop:
        stopped = stop
    finally:
        torch.set_num_threads(threads)
    if signals.received is not None:
        signal.raise_signal(signals.received)  # SIGINT becomes a KeyboardInterrupt
    saved = f"saved at {stopped.saved}" if stopped.saved else "there was nothing new to save"
    raise UserError(f"the run was stopped by {stopped.reason}: {saved}. The same call resumes it")


def _config_words(config: object) -> Iterator[str]:
    """Yield the command line of a config file, of the folder of a dataset, or of a mapping of options."""
    if isinstance(config, Mapping):
        yield from _option_words(config)
    elif isinstance(config, str | os.PathLike):
        text = os.fsdecode(config)
        yield f"--config={text}" if text.endswith(_CONFIG_FILES) else f"--data.root={text}"
    elif config is not None:
        raise UserError(
            f"regraft.train was given a {type(config).__name__}: expected a config file, the folder of a dataset, a "
            "mapping of options, or a Config"
        )


def _option_words(options: Mapping[str, object]) -> Iterator[str]:
    """Yield the command line of options: {"data.root": ...} or {"data": {"root": ...}}."""
    for key, value in options.items():
        if key in SECTIONS and isinstance(value, Mapping):
            yield from _option_words({f"{key}.{name}": option for name, option in value.items()})
        else:
            yield f"--{key}={_to_text(value)}"


def _to_text(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fsdecode(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_path_to_text)
    except (TypeError, ValueError) as error:
        raise UserError(f"regraft.train was given an option of type {type(value).__name__} ({error})") from None


def _path_to_text(value: object) -> str:
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    raise TypeError("expected text, a path, a number, true or false, None, a list or a mapping")

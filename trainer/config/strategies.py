"""Strategies: `--transfer.strategy NAME` is short for `--config configs/strategies/NAME.yaml`.

Later options win over earlier ones, so the position of that --config defines what a strategy overrides:
defaults < strategy named in a --config file < that file < strategy named on the command line < other options.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from regraft.files import CONFIGS, find_config
from trainer.config.options import OPTIONS
from trainer.config.read import Content, options_of, read_config_file
from trainer.errors import UserError

FOLDER = CONFIGS / "strategies"
_RUN_OPTIONS = ("run", "debug", "data.root", "train.epochs", "train.batch_size", "transfer.strategy")
"""Sections and options that only a run sets: where, on which data and for how long it trains."""


def known() -> tuple[str, ...]:
    """Return the names of the strategies that come with the program."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def path_of(strategy: str) -> Path:
    """Return the file of a strategy, which is a known name or a path; raises a UserError if it is neither."""
    path = FOLDER / f"{strategy}.yaml" if strategy in known() else Path(strategy)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise UserError(
        f"transfer.strategy {strategy!r}: there is no such strategy or file. Known: {', '.join(known())}; "
        "or give the path of a YAML file"
    )


def insert_configs(words: Sequence[str]) -> list[str]:
    """Return the command line with the content of each config file in its place, and of each strategy that applies.

    A strategy on the command line replaces those in --config files and comes after the last file.

    Args:
        words: the command line, with `--option=value` as one word.

    Raises:
        UserError: a file is unreadable, or a strategy is unknown or sets an option that only a run sets.

    """
    named = [word.partition("=")[2] for word in words if word.startswith("--transfer.strategy=")]
    result: list[str] = []
    end_of_files = 0
    for word in words:
        option, _, file = word.partition("=")
        if option != "--config" or not file:
            result.append(word)
            continue
        content = read_config_file(find_config(file), f"--config {file}")
        strategy = dict(options_of(content)).get("transfer.strategy")
        # The config.yaml of a run sets every option: it does not need its strategy, which may have changed.
        is_complete = {key for key, _ in options_of(content)} >= OPTIONS
        if strategy is not None and not named and not is_complete:
            result.append(_config_option(_read_strategy(str(strategy))))
        result.append(_config_option(content))
        end_of_files = len(result)
    if named and named[-1] != "null":
        result.insert(end_of_files, _config_option(_read_strategy(named[-1])))
    return result


def _read_strategy(strategy: str) -> Content:
    path = path_of(strategy)
    content = read_config_file(path, f"strategy {path}")
    wrong = [key for key, _ in options_of(content) if {key, key.partition(".")[0]} & set(_RUN_OPTIONS)]
    if wrong:
        raise UserError(
            f"strategy {strategy} sets {', '.join(wrong)}: a strategy may not set these options; set them in the "
            "--config file or on the command line"
        )
    return content


def _config_option(content: Content) -> str:
    """Return a --config option with the content of a file, which jsonargparse takes instead of its path."""
    return f"--config={yaml.safe_dump(content, allow_unicode=True)}"

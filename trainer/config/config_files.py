"""The config files of a command line, and the strategies: `--transfer.strategy NAME` is short for a --config file.

Later options win over earlier ones, so the position of that --config defines what a strategy overrides:
defaults < strategy named in a --config file < that file < strategy named on the command line < other options.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from regraft import yaml_file
from regraft.files import CONFIGS, find_config
from trainer.config.options import OPTIONS, SECTIONS, add_brackets, check_option
from trainer.errors import UserError

_Content = dict[str, Any]
STRATEGIES = CONFIGS / "strategies"
_ANCHORS = "x-"
"""Start of the top-level keys that only hold anchors, as in Docker Compose."""
_RUN_OPTIONS = ("run", "debug", "data.root", "train.epochs", "train.batch_size", "transfer.strategy")
"""Sections and options that only a run sets: where, on which data and for how long it trains."""


def known_strategies() -> tuple[str, ...]:
    """Return the names of the strategies that come with the program."""
    return tuple(sorted(path.stem for path in STRATEGIES.glob("*.yaml")))


def strategy_file(strategy: str) -> Path:
    """Return the file of a strategy, which is a known name or a path; raises a UserError if it is neither."""
    path = STRATEGIES / f"{strategy}.yaml" if strategy in known_strategies() else Path(strategy)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise UserError(
        f"transfer.strategy {strategy!r}: there is no such strategy or file. Known: {', '.join(known_strategies())}; "
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
        content = _read_config_file(find_config(file), f"--config {file}")
        strategy = dict(_options_of(content)).get("transfer.strategy")
        # The config.yaml of a run sets every option: it does not need its strategy, which may have changed.
        is_complete = {key for key, _ in _options_of(content)} >= OPTIONS
        if strategy is not None and not named and not is_complete:
            result.append(_config_option(_read_strategy(str(strategy))))
        result.append(_config_option(content))
        end_of_files = len(result)
    if named and named[-1] != "null":
        result.insert(end_of_files, _config_option(_read_strategy(named[-1])))
    return result


def _read_strategy(strategy: str) -> _Content:
    path = strategy_file(strategy)
    content = _read_config_file(path, f"strategy {path}")
    wrong = [key for key, _ in _options_of(content) if {key, key.partition(".")[0]} & set(_RUN_OPTIONS)]
    if wrong:
        raise UserError(
            f"strategy {strategy} sets {', '.join(wrong)}: a strategy may not set these options; set them in the "
            "--config file or on the command line"
        )
    return content


def _config_option(content: _Content) -> str:
    """Return a --config option with the content of a file, which jsonargparse takes instead of its path."""
    return f"--config={yaml.safe_dump(content, allow_unicode=True)}"


def _read_config_file(path: Path, where: str) -> _Content:
    """Return the content of a config file, which may contain some of the options.

    Args:
        path: the file.
        where: its name in error messages.

    Raises:
        UserError: no such file, no YAML, or an unknown or renamed option.

    """
    try:
        content = yaml_file.load(path)
    except FileNotFoundError:
        recipes = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise UserError(f"{where}: there is no such file. The recipes in {CONFIGS}: {recipes}") from None
    except yaml_file.ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{where}: not a readable YAML file: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected sections with options, such as 'optim:' and below it '  lr: 0.001'")
    content = {key: value for key, value in content.items() if not str(key).startswith(_ANCHORS)}
    for section in SECTIONS:
        if section in content and not isinstance(content[section], dict):
            given = "empty" if content[section] is None else repr(str(content[section])[:80])
            raise UserError(f"{where}: section {section!r} is {given}: expected options below it, indented by spaces")
    for key, value in _options_of(content):
        check_option(key, value, where)
    return {section: _with_lists(section, values) for section, values in content.items()}


def _with_lists(section: str, values: Any) -> Any:
    """Return the options of a section, with a list for a value without brackets: `trackers: tensorboard, mlflow`."""
    if not isinstance(values, dict):
        return values
    return {key: _as_list(f"{section}.{key}", value) for key, value in values.items()}


def _as_list(option: str, value: Any) -> Any:
    if not isinstance(value, str | int | float):
        return value
    text = str(value)
    bracketed = add_brackets(option, text)
    if bracketed == text:
        return value
    try:
        return yaml.safe_load(bracketed)
    except yaml.YAMLError:  # the check of the type names it
        return value


def _options_of(content: _Content) -> Iterator[tuple[str, object]]:
    """Yield each option that a config file sets, with its value."""
    for section, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{key}", item) for key, item in value.items())
        else:
            yield str(section), value

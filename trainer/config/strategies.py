"""Strategies: named files of options (configs/strategies/NAME.yaml), and where they come in among the others.

defaults < strategy that a --config file names < that file's own values < strategy named on the command line
< the other options of the command line. One that is named on the command line takes the place of the file's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "strategies"
_OPTION, _SECTION = "--transfer.strategy", "--transfer"
_SUFFIXES = (".yaml", ".yml")
_RUNS_OWN = ("run", "debug", "data.root", "train.epochs", "train.batch_size", "transfer.strategy")
"""What a strategy may not set: where, on what and for how long is the run's own to say."""

Content = Mapping[str, Any]


def known() -> tuple[str, ...]:
    """Return the names of the strategies that come with the program."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def path_of(strategy: str) -> Path:
    """Return the file of a strategy: one of the known names, or a path.

    Raises:
        UserError: it is neither.

    """
    if strategy in known():
        return FOLDER / f"{strategy}.yaml"
    path = Path(strategy)
    if path.suffix in _SUFFIXES or len(path.parts) > 1:
        if path.is_file():
            return path
        raise UserError(
            f"transfer.strategy {strategy}: there is no such file. Known strategies: {', '.join(known())}"
        )
    raise UserError(
        f"transfer.strategy {strategy!r}: there is no such strategy. Known: {', '.join(known())}; or give the path of "
        "a YAML file"
    )


def refuse_runs_own(strategy: str, content: Content) -> None:
    """Raise a UserError for a strategy that sets what only a run may."""
    given = _keys(content)
    wrong = [key for key in _RUNS_OWN if key in content or key in given]
    if wrong:
        raise UserError(
            f"strategy {strategy} sets {', '.join(wrong)}: expected options of how a model is trained; where, on what "
            "and for how long belongs into the --config file or on the command line"
        )


def insert_strategies(
    arguments: Sequence[str], *, read: Callable[[Path, str], Content], complete: frozenset[str]
) -> list[str]:
    """Return the command line with the file of each strategy that it names put in as one more --config.

    A strategy of the command line stands behind the last --config, so that the options after that win over it.

    Args:
        arguments: words of which every option exists.
        read: (file, what to call it) -> its content, checked; raises UserError.
        complete: all keys; a file that sets them all, as a run's config.yaml does, needs nothing of its strategy.

    Raises:
        UserError: a strategy that is not known, cannot be read or sets what is the run's own.

    """
    configs: list[tuple[int, object]] = []
    on_line: list[object] = []
    end = 0  # of the words of the last --config
    for i, option, value, width in _options(arguments):
        if option == "--config" and value is not None:
            content = read(Path(value), f"--config {value}")
            strategy = (content.get("transfer") or {}).get("strategy")
            if strategy is not None and not complete <= _keys(content):
                configs.append((i, strategy))
            end = i + width
        elif option == _OPTION:
            on_line.append(_loaded(value))
        elif option == _SECTION and isinstance(section := _loaded(value), dict) and "strategy" in section:
            on_line.append(section["strategy"])

    def file_of(strategy: object) -> str:
        path = path_of(str(strategy))
        refuse_runs_own(str(strategy), read(path, f"strategy {path}"))
        return f"--config={path}"

    words = list(arguments)
    if on_line and on_line[-1] is not None:
        words.insert(end, file_of(on_line[-1]))
    if not on_line:  # one on the command line takes the file's place, null all
        for i, strategy in reversed(configs):
            words.insert(i, file_of(strategy))
    return words


def _options(arguments: Sequence[str]) -> Iterator[tuple[int, str, str | None, int]]:
    """Yield the place of each option, its name, its value (None: there is none) and the number of its words."""
    for i, word in enumerate(arguments):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            yield (i, name, value, 1) if equals else (i, name, following, 2)


def _keys(content: Content) -> set[str]:
    return {
        f"{section}.{key}"
        for section, values in content.items()
        if isinstance(values, dict)
        for key in values
    } | {key for key, value in content.items() if not isinstance(value, dict)}


def _loaded(text: str | None) -> object:
    try:
        return text and yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None  # the parser says what is wrong with it

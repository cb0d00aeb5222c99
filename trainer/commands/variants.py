"""Strategies to compare: `--strategies NAME[@key=value...],...` -> the config of the runs of each strategy."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.config.config_files import strategy_file
from trainer.config.options import check_option
from trainer.config.parse import QUICKSTART, normalize, parse
from trainer.config.resolve import resolve
from trainer.config.schema import Config
from trainer.config.sections.baseline import BaselineConfig
from trainer.errors import UserError

PRETRAINED = "pretrained-model"
"""Folder of the pretraining that all strategies share."""
_DATA_OPTIONS = ("root", "seed", "val_fraction", "test_fraction", "extensions", "on_unreadable")
_COMMON = (
    "run", "debug", "pretrain", "baseline", "transfer.strategy", *(f"data.{key}" for key in _DATA_OPTIONS)
)  # fmt: skip
"""Sections and options that all strategies share, since their results could not be compared otherwise."""


@dataclass(frozen=True)
class StrategyVariant:
    """A strategy as written on the command line: NAME, or NAME@key=value@key=value."""

    text: str
    strategy: str
    options: tuple[str, ...]
    """Options of the variant, as words of a command line."""

    @property
    def folder(self) -> str:
        """Return the name of the folder of its runs."""
        return folder_name(self.text)


def folder_name(text: str) -> str:
    """Return the text of a variant as the name of a folder."""
    return re.sub(r"[^\w.@=+-]", "_", text, flags=re.ASCII).lstrip(".") or "_"


def variants(text: str) -> tuple[StrategyVariant, ...]:
    """Return the strategies of a list like `d2l@optim.lr=5e-6,lp-ft`; values in brackets may contain commas and @.

    Raises:
        UserError: a strategy is empty, occurs twice, or sets an option that all strategies share.

    """
    result = [_variant(part.strip()) for part in _split(text, ",")]
    folders = [variant.folder for variant in result]
    duplicates = sorted({variant.text for variant in result if folders.count(variant.folder) > 1})
    if duplicates or PRETRAINED in folders:
        names = " and ".join(duplicates) or PRETRAINED
        raise UserError(f"--strategies {text}: {names} would share a folder; expected each name once")
    return tuple(result)


def _variant(text: str) -> StrategyVariant:
    strategy, *options = _split(text, "@")
    if not strategy or not all("=" in option for option in options):
        raise UserError(
            f"--strategies contains {text!r}: expected NAME or NAME@key=value, such as d2l@optim.lr=5e-6,lp-ft"
        )
    check_option("transfer.strategy", strategy, "--strategies")
    keys = [option.partition("=")[0] for option in options]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--strategies {text}: {key} is given {keys.count(key)} times; expected it once")
        if any(key == common or key.startswith(f"{common}.") for common in _COMMON):
            raise UserError(f"--strategies {text}: {key} is the same for all strategies: set --{key} instead")
    return StrategyVariant(text, strategy, tuple(f"--{option}" for option in options))


def _split(text: str, separator: str) -> list[str]:
    """Split a text at the separators outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def plan(options: Sequence[str], chosen: Sequence[StrategyVariant]) -> tuple[Config, dict[str, Config], list[str]]:
    """Return the config without a strategy, the config of each variant by its text, and messages for the user.

    A strategy wins over the options of the command line, which apply to all strategies: from-scratch trains from
    scratch even if the other strategies have weights. The options of a variant win over its strategy.

    Raises:
        UserError: an error of one of the configs, or they are not comparable.

    """
    options = normalize(options)
    if any(word.startswith("--transfer.strategy=") for word in options):
        raise UserError("--transfer.strategy: compare takes strategies from --strategies; leave it out")
    plain = parse([*options, "--transfer.strategy=null"])
    if plain.debug:
        raise UserError("--debug cannot be compared; leave it out")
    if not any(word.startswith(("--config=", "--data.root=")) for word in options):
        options = [f"--config={QUICKSTART}", *options]
    configs: dict[str, Config] = {}
    messages: list[str] = []
    for variant in chosen:
        try:
            strategy = [f"--config={strategy_file(variant.strategy)}", f"--transfer.strategy={variant.strategy}"]
            config = parse([*options, *strategy, *variant.options])
            resolve(config)
        except UserError as error:
            raise UserError(f"strategy {variant.text}: {error}") from None
        configs[variant.text] = replace(config, baseline=BaselineConfig())
        messages += _overridden(options, variant, plain, config)
    first, *others = ((text, _data_options(config)) for text, config in configs.items())
    for other in others:
        if other[1] != first[1]:
            raise UserError(
                f"strategies {first[0]} and {other[0]} have different data ({first[1]}, {other[1]}): strategies are "
                "compared on the same data"
            )
    return plain, configs, messages


def _overridden(options: Sequence[str], variant: StrategyVariant, plain: Config, config: Config) -> Iterator[str]:
    """Yield a line for each option of the command line that a strategy overrides."""
    own = {option.partition("=")[0] for option in variant.options}
    for option in dict.fromkeys(word.partition("=")[0] for word in options if word.startswith("--")):
        section, dot, key = option.removeprefix("--").partition(".")
        if dot and option not in own:
            common, value = (getattr(getattr(c, section), key) for c in (plain, config))
            if common != value:
                yield f"strategy {variant.text}: {section}.{key} is {value}, not {common} as on the command line"


def _data_options(config: Config) -> dict[str, object]:
    return {key: getattr(config.data, key) for key in _DATA_OPTIONS}

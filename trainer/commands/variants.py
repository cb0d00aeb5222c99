"""Strategies to compare: `--strategies NAME[@key=value...],...` -> the config of each one's runs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.config.parse import QUICKSTART, parse
from trainer.config.resolve import resolve
from trainer.config.schema import BaselineConfig, Config
from trainer.config.strategies import path_of
from trainer.errors import UserError

PRETRAINED = "pretrained-model"
"""Folder of the pretraining that all strategies share."""
_COMMON = (
    "run", "debug", "pretrain", "baseline", "data.root", "data.seed", "data.val_fraction", "data.test_fraction",
    "data.extensions", "data.on_unreadable", "transfer.strategy",
)  # fmt: skip
"""Options that a variant may not set, since its result could not be compared with the others'."""


@dataclass(frozen=True)
class StrategyVariant:
    """A strategy, as named on the command line: NAME, or NAME@key=value@key=value."""

    text: str
    strategy: str
    options: tuple[str, ...]
    """Its own, as words of the command line."""

    @property
    def folder(self) -> str:
        """Return the name of the folder of its runs."""
        return folder_name(self.text)


def folder_name(text: str) -> str:
    """Return the text of a variant as the name of a folder."""
    return re.sub(r"[^\w.@=+-]", "_", text, flags=re.ASCII).lstrip(".") or "_"


def variants(text: str) -> tuple[StrategyVariant, ...]:
    """Return the strategies of a list like `d2l@optim.lr=5e-6,lp-ft`; commas and @ within brackets are values' own.

    Raises:
        UserError: one is empty, comes twice or sets what must be common to all.

    """
    found = [_variant(part.strip()) for part in _split(text, ",")]
    folders = [variant.folder for variant in found]
    twice = sorted({variant.text for variant in found if folders.count(variant.folder) > 1})
    if twice or PRETRAINED in folders:
        raise UserError(
            f"--strategies {text}: {' and '.join(twice) or PRETRAINED} would share a folder: expected each name once"
        )
    return tuple(found)


def _variant(text: str) -> StrategyVariant:
    strategy, *options = _split(text, "@")
    wrong = [option for option in options if "=" not in option]
    if not strategy or wrong:
        raise UserError(
            f"--strategies holds {text!r}: expected names, or NAME@key=value, as in d2l@optim.lr=5e-6,lp-ft"
        )
    for option in options:
        key = option.partition("=")[0].removesuffix("+")
        if any(key == common or key.startswith(f"{common}.") for common in _COMMON):
            raise UserError(
                f"--strategies {text}: {key} is common to all that are compared: give it as an option of its own, "
                f"--{key}"
            )
    return StrategyVariant(text, strategy, tuple(f"--{option}" for option in options))


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator that stands outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def plan(
    options: Sequence[str], chosen: Sequence[StrategyVariant]
) -> tuple[Config, dict[str, Config], list[str]]:
    """Return the config without a strategy, text of the variant -> the config of its runs, and what is to be said.

    Here a strategy wins over the options of the command line, which are common to all as the file's are: from-scratch
    is from scratch though weights are named for the others. A variant's own options come last.

    Raises:
        UserError: what is wrong with one of them, or they are not to be compared.

    """
    if any(word.partition("=")[0] == "--transfer.strategy" for word in options):
        raise UserError("--transfer.strategy: compare takes the strategies by --strategies; leave it out")
    plain = parse([*options, "--transfer.strategy=null"])
    if plain.debug:
        raise UserError("--debug is a run of its own: leave it out here")
    if not any(word.partition("=")[0] in ("--config", "--data.root") for word in options):
        options = [f"--config={QUICKSTART}", *options]
    found: dict[str, Config] = {}
    said: list[str] = []
    for variant in chosen:
        try:
            layer = f"--config={path_of(variant.strategy)}"
            words = [*options, layer, f"--transfer.strategy={variant.strategy}", *variant.options]
            config = parse(words)
            resolve(config)
        except UserError as error:
            raise UserError(f"strategy {variant.text}: {error}") from None
        found[variant.text] = replace(config, baseline=BaselineConfig())
        said += _overruled(options, variant, plain, config)
    data = {text: _yardstick(config) for text, config in found.items()}
    one, *others = data
    for other in others:
        if data[other] != data[one]:
            raise UserError(
                f"strategies {one} and {other} have other data ({data[one]}, {data[other]}): a strategy that is "
                "compared may set nothing of that"
            )
    return plain, found, said


def _overruled(options: Sequence[str], variant: StrategyVariant, plain: Config, config: Config) -> list[str]:
    """Return a line for each option of the command line that a strategy sets otherwise."""
    own = {option.partition("=")[0] for option in variant.options}
    lines = []
    for option in dict.fromkeys(word.partition("=")[0] for word in options if word.startswith("--")):
        section, dot, key = option.removeprefix("--").removesuffix("+").partition(".")
        if dot and option not in own:
            asked, has = (getattr(getattr(c, section), key) for c in (plain, config))
            if asked != has:
                lines.append(
                    f"strategy {variant.text}: {section}.{key} is {has}, not {asked} as on the command line"
                )
    return lines


def _yardstick(config: Config) -> dict[str, object]:
    """Return what all runs must have in common."""
    data = config.data
    keys = ("root", "seed", "val_fraction", "test_fraction", "extensions", "on_unreadable")
    return {key: getattr(data, key) for key in keys}

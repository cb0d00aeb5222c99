"""Command line and YAML -> a config, or one sentence that says what is wrong with them; and back to YAML.

jsonargparse does the work; what it leaves open is closed here: a misspelt key lists the valid ones, a key
given twice is an error, and a rule that is broken reads like any other error.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from trainer.config.schema import Config
from trainer.config.strategies import insert_strategies
from trainer.errors import UserError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="trainer/main.py",
        exit_on_error=False,
        description="Fine-tune a pretrained image classifier: "
        "accelerate launch trainer/main.py [--config FILE] [--section.key VALUE ...]. "
        f"With neither --config nor --data.root it runs configs/{QUICKSTART.name}, offline.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML file of these options; what stands on the command line wins.",
    )
    parser.add_class_arguments(Config)
    return parser


def keys(config_class: type = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the configuration: `run.dir`, ..., `debug`."""
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _unknown(key: str, where: str) -> UserError:
    known = list(keys())
    section = key.split(".", maxsplit=1)[0]
    near = [k for k in known if k.split(".")[0] == section] or [
        k for k in known if k.split(".")[-1] == key.rsplit(".", maxsplit=1)[-1]
    ]
    guess = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {guess[0]}?" if guess else ""
    return UserError(f"{where}: there is no option {key!r}.{hint} Valid: {', '.join(near or known)}")


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent rule that the last of two equal keys wins."""


def _mapping_once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found = [loader.construct_object(key) for key, _ in node.value]
    twice = sorted({str(k) for k in found if found.count(k) > 1})
    if twice:
        raise UserError(
            f"{node.start_mark.name}, line {node.start_mark.line + 1}: given twice: {', '.join(twice)}"
        )
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def _read(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a YAML file; raises a UserError unless all its keys are known. `what` names it."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_named(path))  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in QUICKSTART.parent.glob("*.yaml")))
        raise UserError(
            f"{what}: there is no such file. The recipes in {QUICKSTART.parent}: {near}"
        ) from None
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # YAML's own readers raise them too
        raise UserError(f"{what}: not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: expected sections with keys, as in 'optim:' and below it '  lr: 0.001'")
    known = set(keys())
    sections = {k.split(".")[0] for k in known if "." in k}
    for section, values in content.items():
        if section in sections:
            if not isinstance(values, dict):
                raise UserError(f"{what}: section {section!r} holds {values!r}: expected keys below it")
            for key in values:
                if f"{section}.{key}" not in known:
                    raise _unknown(f"{section}.{key}", what)
        elif section not in known:
            raise _unknown(str(section), what)
    return content


def _named(path: Path) -> type[yaml.SafeLoader]:
    """Return the strict loader, set to name this file in its errors."""

    class Loader(_StrictLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.name = str(path)

    return Loader


def _check_arguments(argv: Sequence[str]) -> list[str]:
    """Return argv with a bare `--debug` spelt out; raise a UserError for an option that does not exist."""
    known = {*keys(), "config", "help", "print_config", *(f.name for f in dataclasses.fields(Config))}
    normalize_name: list[str] = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        normalize_name.append(
            "--debug=true" if word == "--debug" and following not in ("true", "false") else word
        )
        if word.startswith("--"):
            key = word[2:].split("=", 1)[0].removesuffix("+")
            if key not in known:
                raise _unknown(key, "command line")
    return normalize_name


def parse(argv: Sequence[str]) -> Config:
    """Return the run that the command line and its YAML describe.

    `--help` and `--print_config` print and raise SystemExit(0).

    Raises:
        UserError: an unknown key, a wrong type, an impossible value or pair; it names the key.

    """
    arguments = _check_arguments(argv)
    given = [a.split("=", 1)[0] for a in arguments]
    if "--config" not in given and "--data.root" not in given:
        if not QUICKSTART.is_file():
            raise UserError(
                "neither --config nor --data.root was given: name a recipe, or the folder of your images"
            )
        arguments = [f"--config={QUICKSTART}", *arguments]
    arguments = insert_strategies(arguments, read=_read, complete=frozenset(keys()))
    parser = _parser()
    try:
        return _instantiate(parser, parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(_plain(str(error))) from None


def _instantiate(parser: ArgumentParser, namespace: Any) -> Config:
    values = parser.instantiate(namespace)
    return Config(**{item.name: values[item.name] for item in dataclasses.fields(Config)})


def _plain(message: str) -> str:
    """Return jsonargparse's message with our words for a key."""
    message = message.replace('Parser key "', 'option "')
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", message)


def dump(config: Config) -> str:
    """Return the configuration as YAML that `parse(['--config', file])` reads again to the same."""
    return yaml.safe_dump(_plain_values(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain_values(v) for k, v in value.items()}
    return [_plain_values(v) for v in value] if isinstance(value, list | tuple) else value

"""Write a config as YAML."""

import dataclasses
from typing import Any

import yaml

from trainer.config.schema import Config


def dump(config: Config) -> str:
    """Return a config as YAML; parsed as a config file, it gives the same config."""
    return yaml.safe_dump(_to_yaml(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _to_yaml(value: Any) -> Any:
    """Return a value with lists for tuples, for which YAML has no type."""
    if isinstance(value, dict):
        return {key: _to_yaml(item) for key, item in value.items()}
    return [_to_yaml(item) for item in value] if isinstance(value, list | tuple) else value


def given_options(config: Config) -> dict[str, Any]:
    """Return the options of a command without its run folder, as they are in JSON: two such commands do the same."""
    options: dict[str, Any] = _to_yaml(dataclasses.asdict(config))
    del options["run"]["dir"]
    return options

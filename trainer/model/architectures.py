"""Names of the architectures that regraft can build: torchvision's classification models, and timm's as `timm/NAME`."""

import difflib
from types import ModuleType

from torchvision import models

from trainer.errors import UserError

TIMM = "timm/"
"""Prefix of the names of timm's models."""


def architectures() -> list[str]:
    """Return the names of torchvision's classification models."""
    return models.list_models(module=models)


def is_timm(name: str) -> bool:
    """Return whether a name is one of timm's models, such as `timm/convnext_tiny.fb_in22k`."""
    return name.startswith(TIMM)


def base_name(name: str) -> str:
    """Return a name without its library and the tag of its weights: `timm/resnet18.a1_in1k` -> `resnet18`."""
    return name.removeprefix(TIMM).partition(".")[0]


def same_architecture(name: str, other: str) -> bool:
    """Return whether two names differ in the tag of timm's weights alone."""
    return is_timm(name) == is_timm(other) and base_name(name) == base_name(other)


def import_timm(name: str) -> ModuleType:
    """Return the package timm.

    Raises:
        UserError: it is not installed; `name` is the model that needs it.

    """
    try:
        import timm  # noqa: PLC0415 (an optional package, which takes a second to import)
    except ImportError as error:
        raise UserError(
            f"{name} is a model of the package timm, which cannot be imported ({error}): pip install 'regraft[timm]'"
        ) from None
    return timm


def check_architecture(name: str) -> None:
    """Raise a UserError, with close matches, unless `name` is a model of torchvision or, with its prefix, of timm."""
    if is_timm(name):
        _check_timm_name(name)
        return
    names = architectures()
    if name not in names:
        close = _suggest(name.lower(), names)
        raise UserError(
            f"there is no model {name!r}.{close} The models are: {', '.join(names)}; and those of timm as timm/NAME"
        )


def _check_timm_name(name: str) -> None:
    timm = import_timm(name)
    model, _, tag = name.removeprefix(TIMM).partition(".")
    names = timm.list_models()
    if model not in names:
        raise UserError(
            f"timm {timm.__version__} has no model {model!r}.{_suggest(model.lower(), names, prefix=TIMM)} "
            "timm.list_models() lists all of them"
        )
    tagged = timm.list_models(model, include_tags=True)
    if tag and f"{model}.{tag}" not in tagged:
        raise UserError(
            f"timm {timm.__version__} has no weights {tag!r} of {model}: set model.name to {TIMM}{model}, or to one of "
            f"{', '.join(TIMM + other for other in tagged)}"
        )


def _suggest(name: str, names: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" Did you mean {' or '.join(prefix + other for other in close)}?" if close else ""

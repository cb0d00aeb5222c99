"""Names of the architectures that regraft can build: torchvision's classification models."""

import difflib

from torchvision import models

from trainer.errors import UserError


def architectures() -> list[str]:
    """Return the names of torchvision's classification models."""
    return models.list_models(module=models)


def check_architecture(name: str) -> None:
    """Raise a UserError, with close matches, unless `name` is one of `architectures()`."""
    names = architectures()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=3)
        suggestion = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"there is no model {name!r}.{suggestion} The models are: {', '.join(names)}")

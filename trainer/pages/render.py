"""Render the templates of `templates/` to HTML pages of one file.

Names of classes and files may contain any characters: every value is escaped for HTML, and unprintable characters are
escaped as on a terminal. The pages' content security policy allows their own script and images in the page alone.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **context: Any) -> str:
    """Return the text of a template of `templates/`, which extends `base.html.jinja`.

    Args:
        template: name of the file.
        context: values for the template. Plain strings are escaped; `Markup` is taken as it is.

    """
    return _environment().get_template(template).render(**context)


def render_markup(template: str, **context: Any) -> Markup:
    """Return the text of a template that is a part of a page."""
    return Markup(_environment().get_template(template).render(**context))  # noqa: S704 (the template escapes)


def preformatted(text: str) -> Markup:
    """Return a text of several lines for `<pre>`, escaped."""
    return Markup("\n").join(escape(escape_unprintable(line)) for line in text.splitlines())


def write_page(path: Path, page: str) -> None:
    """Write a page, atomically.

    Raises:
        OSError: it cannot be written.

    """
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8", errors="backslashreplace"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment.globals |= {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8").strip()),  # noqa: S704 (a file of ours)
        "script": Markup(script),  # noqa: S704
        "script_hash": digest,
    }
    environment.filters |= {
        "percent": percent,
        "decimal": decimal,
        "thousands": thousands,
        "duration": duration,
        "preformatted": preformatted,
        "printable": escape_unprintable,
    }
    return environment


def _printable(value: object) -> object:
    """Return a value of a template for output; a plain string is one line of printable characters."""
    return escape_unprintable(value) if type(value) is str else value


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"


def decimal(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def thousands(value: float | None) -> str:
    """Return a number with separators between thousands, or a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Parts of HTML pages: hostile names are escaped, charts and thumbnails are well formed."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from trainer.pages import render as pages
from trainer.pages.charts import Column, Series, column_chart, line_chart
from trainer.pages.render import preformatted, write_page
from trainer.pages.thumbnails import PictureBudget, thumbnail

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a\nb",
    "caf\udce9",
    "\u202egnp.exe",
    "{{ 7 * 7 }}",
)
PAGE = """{% extends "base.html.jinja" %}
{% from "macros.html.jinja" import section, stat, finding, sortable_table, facts, bars, strip, navigation %}
{% block title %}{{ name }}{% endblock %}
{% block nav %}{{ navigation([("a", name)]) }}{% endblock %}
{% block main %}{% call section("a", name, name) %}
{{ sortable_table(name, [(name, "text"), ("n", "number")], [[name, ("50.0 %", 0.5)], ["b", 3]], sorted_by=1) }}
{{ bars(name, [(name, [(0.5, 1, name)], name)], [(1, name)]) }}{{ finding("warning", name) }}{{ facts([(name, name)]) }}
{{ stat(name, name, name) }}{{ strip(name, [{"name": name, "seconds": 1, "fraction": 1, "tone": 1}]) }}
<pre>{{ text|preformatted }}</pre>
{{ chart }}{{ columns }}{% endcall %}{% endblock %}"""


class Elements(HTMLParser):
    """Collects the names of all elements, and of all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def render(name: str) -> str:
    chart = line_chart(
        name, [Series(name=name, points=[(0, 1), (1, 2)]), Series(name="b", points=[(0, 3)])], x_label=name
    )
    columns = column_chart(name, [Column(name, 3, name)], x_label=name)
    template = pages._environment().from_string(PAGE)
    return template.render(name=name, text=f"{name}\n{name}", chart=chart, columns=columns)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_add_no_elements_and_can_be_written(name: str, tmp_path: Path) -> None:
    page, plain = render(name), Elements(render("plain"))
    write_page(tmp_path / "page.html", page)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    hostile = Elements(page)
    assert (hostile.tags, hostile.attributes) == (plain.tags, plain.attributes)
    assert "\u202e" not in page
    assert preformatted("<a>\nb\udcff") == "&lt;a&gt;\nb\\xff"
    with pytest.raises(UndefinedError):
        pages._environment().from_string("{{ missing }}").render()


@pytest.mark.parametrize(
    ("points", "options", "ticks"),
    [
        ([(1, 0.5), (2, 0.25), (3, float("nan"))], {}, ["0.25", "0.3", "0.35", "0.4", "0.45", "0.5"]),
        (
            [(1, 0.0), (2, 0.9)],
            {"y_range": (0, 1), "y_format": "{:.0%}".format},
            ["0%", "20%", "40%", "60%", "80%", "100%"],
        ),
        ([(1, 1e-4), (2, 5e-2), (3, 0.0)], {"y_log": True}, ["0.0001", "0.001", "0.01", "0.1"]),
        ([(5, 2.0)], {"y_range": (0, None)}, ["0", "0.5", "1", "1.5", "2"]),
    ],
)
def test_line_charts_are_well_formed_and_have_round_ticks(points: list, options: dict, ticks: list[str]) -> None:
    chart = line_chart("loss", [Series(name="train", points=points)], x_label="epoch", **options)
    assert chart is not None
    figure = ElementTree.fromstring(chart)
    found = [text.text for text in figure.iter("text") if text.get("text-anchor") == "end"]
    assert found == ticks
    x, y, right, bottom = 46, 10, 390, 198
    for dot in figure.iter("circle"):
        assert x <= float(dot.get("cx", "")) <= right
        assert y <= float(dot.get("cy", "")) <= bottom
    assert line_chart("loss", [Series(name="train", points=[(0, float("inf"))])], x_label="epoch") is None


def test_a_long_line_is_thinned_and_ends_with_its_last_point() -> None:
    chart = line_chart("loss", [Series(name="train", points=[(x, x) for x in range(100_000)])], x_label="step")
    assert len(str(chart)) < 60_000
    assert chart is not None
    assert "to 100k" in chart


def test_thumbnails_are_small_and_stop_at_their_budget(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 600, 3), np.uint8)
    uri = thumbnail(pixels, 100)
    kind, _, data = uri.partition(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (100, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    budget = PictureBudget(int(1.5 * len(uri)))
    made = [
        budget.thumbnail(path, 100)
        for path in (tmp_path / "missing.jpg", tmp_path / "broken.jpg", tmp_path / "a.png", pixels)
    ]
    assert made == [None, None, uri, None]

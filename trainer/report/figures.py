"""Write figures as PNG files: `curves.png` of a run, with train and test loss, and accuracies over epochs.

matplotlib is imported by `write_figure` alone, since its import takes seconds and reads the user's settings.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.report.metrics import Row
from trainer.run.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Matplotlib draws each character with the first installed font that has it.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


def write_figure(path: Path, draw: Callable[["Figure"], None], *, size: tuple[float, float], dpi: int = 150) -> None:
    """Draw a figure with matplotlib's own settings, not the user's, and write it as PNG, atomically.

    Args:
        path: file to write.
        draw: draws on the empty figure.
        size: width and height [inches].
        dpi: pixels per inch.

    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing here, which fails at the import
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with warnings.catch_warnings(), mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc may ask for LaTeX, or for a style in which nothing can be read
        mpl.rcParams["font.family"] = _installed_fonts()
        # Characters that no installed font has are drawn as boxes. This is not worth a warning.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def try_write_figure(
    path: Path, draw: Callable[["Figure"], None], *, size: tuple[float, float], warn: Callable[[str], object]
) -> None:
    """Write a figure; if this fails for any reason, call `warn` with a message: a figure never ends a run."""
    try:
        write_figure(path, draw, size=size)
    except Exception as error:  # noqa: BLE001 (fonts, settings, a full disk, a broken installation)
        reason = " ".join(str(error).split())[:300]
        warn(f"warning: {path.name} was not drawn ({type(error).__name__}: {reason}); nothing else is affected")


def _installed_fonts() -> list[str]:
    """Return the installed font families for text in any script, in order of preference."""
    from matplotlib.font_manager import get_font_names  # noqa: PLC0415

    return [name for name in _FONTS if name in get_font_names()]


def set_title(axes: "Axes", title: str) -> None:
    """Set a title that may have names of files and classes in any script."""
    axes.set_title(title, fontsize=10, wrap=True, parse_math=False)


def draw_curves(rows: Sequence[Row], figure: "Figure", *, title: str) -> None:
    """Draw the rows of a metrics file: losses above, accuracies below.

    Rows of kind `train` are points within an epoch, evaluations are points at the end of an epoch.
    """
    loss_axes, accuracy_axes = figure.subplots(2, 1, sharex=True)
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] in ("start", "epoch")]
    for axes, quantity in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        lines = _draw_line(axes, train, f"train_{quantity}", "-", "tab:blue")
        for split, style, color in (("val", ":s", "tab:orange"), ("test", "-.o", "tab:green")):
            lines += _draw_line(axes, evaluations, f"{split}_{quantity}", style, color)
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=9, frameon=False)
    loss_axes.set_ylim(bottom=0)
    accuracy_axes.set_ylim(0, 1.03)
    accuracy_axes.set_xlabel("epoch")
    accuracy_axes.set_xlim(0, 1.02 * max([1, *(row["epoch"] for row in rows)]))
    accuracy_axes.xaxis.get_major_locator().set_params(integer=True)
    set_title(loss_axes, title)


def _draw_line(axes: "Axes", rows: Sequence[Row], key: str, style: str, color: str) -> "list[Line2D]":
    """Draw one column of the rows that have it."""
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    if not points:
        return []
    marker = "o" if len(points) < 3 and style == "-" else ""  # a line through one point is invisible
    x, y = zip(*points, strict=True)
    return axes.plot(x, y, style + marker, markersize=4, color=color, label=key.replace("_", " "))

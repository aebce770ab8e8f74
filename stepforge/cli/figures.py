"""Figures as inline SVG, for pages with a light and a dark set of colors.

The style sheet ``page.css`` sets the colors. Figures are drawn with placeholders for them.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "MARKS", "SERIES", "log_axis", "log_range", "svg"]

# Placeholders for the colors of the page, which has a light and a dark set.
INK, _GRID = "#010203", "#040506"
#: The colors of lines.
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
#: The colors of errors and warnings.
MARKS = {"error": "#0a0c01", "warning": "#0a0c02"}
_STYLE = {
    INK: "var(--muted)",
    _GRID: "var(--grid)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
    **{color: f"var(--{name})" for name, color in MARKS.items()},
}

_PARAMETERS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}


def log_range(values: Iterable[float]) -> tuple[int, int]:
    """Return the powers of ten around all positive finite values."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    if not logs:
        return (-8, 0)
    low = math.floor(min(logs))
    return low, max(math.ceil(max(logs)), low + 1)


def log_axis(axes: Axes, powers: tuple[int, int]) -> None:
    """Make the vertical axis logarithmic, between two powers of ten."""
    low, high = powers
    # No margin below zero: every tick is a power of ten, and its label plain text.
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    ticks = range(low, high + 1, math.ceil((high - low) / 5))
    axes.set_yticks([10.0**power for power in ticks], [_power(power) for power in ticks])
    axes.minorticks_off()


def _power(power: int) -> str:
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def svg(
    draw: Callable[[Figure], None],
    *,
    name: str,
    label: str,
    height: float,
    width: float = 3.6,
    has_grid: bool = True,
) -> str:
    """Draw a figure and return it as an inline SVG with its own ids.

    Args:
        draw: draws on an empty figure.
        name: the prefix of its ids, which must be unique on a page.
        label: what it shows, for readers who do not see it; plain text.
        height: its height in inches.
        width: its width in inches.
        has_grid: True for lines across at the ticks of the vertical axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PARAMETERS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))
        draw(figure)
        for axes in figure.axes:
            axes.grid(has_grid, axis="y")
            axes.tick_params(length=0)
            axes.set_axisbelow(True)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return "".join(_for_page(out.getvalue(), name, label))


def _for_page(svg: str, name: str, label: str) -> Iterator[str]:
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None  # matplotlib always writes one
    yield f'<svg {view_box.group()} role="img" aria-label="{html.escape(label)}">'
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # All charts are in one document, and its ids must be unique.
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for placeholder, color in _STYLE.items():
        body = body.replace(placeholder, color)
    yield body

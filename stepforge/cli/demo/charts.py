"""The demo's charts as SVG. The page's style sheet sets their colors."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stepforge.cli.demo.side_by_side import Comparison, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DASHES", "difference_charts", "training_charts"]

# Placeholders for the colors of the page, which has a light and a dark set.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_STYLE = {
    _INK: "var(--muted)",
    _GRID: "var(--grid)",
} | {color: f"var(--series-{i})" for i, color in enumerate(_SERIES)}

#: The dashes of the variants' lines, in points. A line on top lets the lines below show through.
DASHES = ("", "4 4", "2 2", "6 2 1 2")
_WIDTHS = (3.0, 1.4, 1.6, 1.4)

_PARAMETERS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}


def training_charts(comparisons: Sequence[Comparison], variants: Sequence[Variant]) -> list[str]:
    """Return an SVG per optimizer: training loss above test accuracy, all on one scale.

    Nudged variants and those that are only timed are left out.
    """
    shown = [
        (index, variant.name)
        for index, variant in enumerate(variants)
        if not variant.nudged and not variant.only_timed
    ]
    traces = [c.traces[name] for c in comparisons for _, name in shown]
    loss_range = _log_range(loss for trace in traces for loss in trace.losses)
    lowest = min(min(trace.accuracies) for trace in traces)

    def draw(comparison: Comparison, figure: Figure) -> None:
        loss, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for index, name in shown:
            trace = comparison.traces[name]
            epochs = range(1, len(trace.losses) + 1)
            loss.plot(epochs, trace.losses, **_line(index))
            accuracy.plot(epochs, [100 * share for share in trace.accuracies], **_line(index))
        _log_axis(loss, loss_range)
        accuracy.set_ylim(100 * lowest - 1, 100.5)
        loss.set_ylabel("training loss (nats)")
        accuracy.set_ylabel("test accuracy (%)")
        accuracy.set_xlabel("training time (epochs)")
        accuracy.xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()

    return [
        _svg(
            partial(draw, comparison),
            name=f"training-{comparison.optimizer}",
            label=f"{comparison.optimizer}: training loss and test accuracy by epoch",
            height=3.7,
        )
        for comparison in comparisons
    ]


def difference_charts(
    comparisons: Sequence[Comparison], variants: Sequence[Variant], twin: Variant
) -> list[str]:
    """Return an SVG per optimizer: each variant's difference from the twin, all on one scale.

    Variants that are only timed are left out.
    """
    shown = [
        (index, variant.name)
        for index, variant in enumerate(variants)
        if variant != twin and not variant.only_timed
    ]
    limits = _log_range(
        difference
        for c in comparisons
        for _, name in shown
        for difference in c.traces[name].differences
    )

    def draw(comparison: Comparison, figure: Figure) -> None:
        axes = figure.subplots()
        for index, name in shown:
            differences = comparison.traces[name].differences
            # A logarithmic axis cannot show a difference of zero.
            axes.plot(
                range(1, len(differences) + 1),
                [difference or math.nan for difference in differences],
                **_line(index),
            )
        _log_axis(axes, limits)
        axes.set_ylabel("largest difference (weight units)")
        axes.set_xlabel("training time (steps)")

    return [
        _svg(
            partial(draw, comparison),
            name=f"difference-{comparison.optimizer}",
            label=f"{comparison.optimizer}: largest difference from the twin by step",
            height=2.4,
        )
        for comparison in comparisons
    ]


def _line(index: int) -> dict[str, Any]:
    index %= len(_SERIES)
    dashes = tuple(float(length) for length in DASHES[index].split())
    return {
        "color": _SERIES[index],
        "linewidth": _WIDTHS[index],
        "linestyle": (0, dashes) if dashes else "solid",
    }


def _log_range(values: Iterable[float]) -> tuple[int, int]:
    """Return the powers of ten around all positive finite values."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    if not logs:
        return (-8, 0)
    low = math.floor(min(logs))
    return low, max(math.ceil(max(logs)), low + 1)


def _log_axis(axes: Axes, powers: tuple[int, int]) -> None:
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


def _svg(draw: Callable[[Figure], None], *, name: str, label: str, height: float) -> str:
    """Draw a figure and return it as an inline SVG with its own ids."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PARAMETERS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(3.6, height))
        draw(figure)
        for axes in figure.axes:
            axes.grid(axis="y")
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
    yield f'<svg {view_box.group()} role="img" aria-label="{label}">'
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # All charts are in one document, and its ids must be unique.
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for placeholder, color in _STYLE.items():
        body = body.replace(placeholder, color)
    yield body

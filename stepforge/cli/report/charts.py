"""The report's charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stepforge.cli.figures import INK, MARKS, SERIES, log_axis, log_range, svg
from stepforge.cli.report.bins import Bins, Spread
from stepforge.cli.report.findings import CLIPPED_FACTOR, Finding, skipped_lines
from stepforge.cli.report.run import Array, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LOST_COLORS", "RATIO_COLORS", "Chart", "HeatMap", "heat_maps", "line_charts"]

#: Colors of update-to-weight ratios, from a thousandth of the typical one to a thousand times that.
#: The one in the middle is as far from a light page as from a dark one.
RATIO_COLORS = ("#0b4fa8", "#5b9bd8", "#9aa0a6", "#e58a3c", "#c21f1f")
#: Powers of ten on each side of the typical ratio.
_DECADES = 3
#: Colors of the share of updates that are lost to rounding, from none to all.
LOST_COLORS = ("#9aa0a630", "#a06cc8c0", "#8a2be2ff")

#: Rows of a heat map. Of more layers, every other or so is shown, and those with findings.
_MOST_ROWS = 300
#: Rows that all have a label.
_LABELED_ROWS = 50
_LABEL_LENGTH = 44


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: its title.
        legend: names of lines, each with the number of its color.
        svg: the picture.
    """

    title: str
    legend: tuple[tuple[str, int], ...]
    svg: str


@dataclass(frozen=True)
class HeatMap:
    """A metric of all layers over time.

    Attributes:
        title: its title.
        colors: the colors of its scale.
        labels: the ends and the middle of the scale.
        shown: the number of layers that are shown.
        svg: the picture.
    """

    title: str
    colors: tuple[str, ...]
    labels: tuple[str, ...]
    shown: int
    svg: str


def line_charts(run: Run) -> list[Chart]:
    """Return the charts of the whole run. Those without numbers are left out."""
    bins = Bins(run.steps)
    rates = {f"group {index}": column for index, column in _different(run.lr)}
    if len(rates) == 1:
        rates = {"": next(iter(rates.values()))}
    ratios = {"whole model": run.metrics.get("update_ratio")}
    if "update_ratio" in run.by_layer:
        ratios["median layer"] = _median_layer(run.by_layer["update_ratio"])
    charts = [
        _chart(run, bins, "Loss", {"": run.metrics.get("loss")}),
        _chart(run, bins, "Learning rate", rates, axis="from zero"),
        _chart(
            run,
            bins,
            "Norms",
            {
                name: run.metrics.get(metric)
                for name, metric in (
                    ("gradients", "grad_norm"),
                    ("weights", "param_norm"),
                    ("updates", "update_norm"),
                )
            },
            axis="log",
        ),
        _chart(run, bins, "Update-to-weight ratio", ratios, axis="log"),
        _marks_chart(run, bins),
    ]
    return [chart for chart in charts if chart is not None]


def heat_maps(run: Run, findings: Sequence[Finding]) -> list[HeatMap]:
    """Return heat maps of layers: of their ratios, and of updates that are lost, if any."""
    marked = {
        layer: str(finding.severity)
        for finding in reversed(findings)  # errors come first, and so are entered last
        for layer in finding.layers
    }
    maps = []
    ratios = run.by_layer.get("update_ratio")
    if ratios is not None and np.isfinite(ratios).any():
        positive = ratios[np.isfinite(ratios) & (ratios > 0)]
        typical = float(np.median(positive)) if len(positive) else 1e-3
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(np.where(np.isfinite(ratios), ratios, np.nan) / typical)
        values = np.maximum(values, -_DECADES)  # and a ratio of 0
        maps.append(
            _heat_map(
                run,
                values,
                marked,
                title="Update-to-weight ratio by layer",
                colors=RATIO_COLORS,
                limits=(-_DECADES, _DECADES),
                labels=(
                    f"{typical / 10**_DECADES:.1e} or less",
                    f"{typical:.1e}, the median",
                    f"{typical * 10**_DECADES:.1e} or more",
                ),
            )
        )
    lost = run.by_layer.get("lost")
    if lost is not None and (lost[np.isfinite(lost)] >= 0.1).any():
        maps.append(
            _heat_map(
                run,
                lost,
                marked,
                title="Updates lost to rounding by layer",
                colors=LOST_COLORS,
                limits=(0, 1),
                labels=("none", "half", "all"),
            )
        )
    return maps


def _chart(
    run: Run,
    bins: Bins,
    title: str,
    lines: Mapping[str, Array | None],
    *,
    axis: Literal["log", "from zero"] | None = None,
) -> Chart | None:
    """Draw lines over steps, with a band from the lowest to the highest of each bin.

    An ``axis`` of None is logarithmic if the values span a factor of 20.
    """
    spreads = {
        name: bins.spread(values)
        for name, values in lines.items()
        if values is not None and np.isfinite(values).any()
    }
    if not spreads:
        return None
    every = np.concatenate([np.r_[spread.low, spread.high] for spread in spreads.values()])
    every = every[np.isfinite(every)]
    is_wide = axis is None and every.min() > 0 and every.max() > 20 * every.min()
    is_log = is_wide or (axis == "log" and bool((every > 0).any()))
    skips = bins.middles[bins.share(skipped_lines(run) > 0) > 0]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for x in skips:
            axes.axvline(x, color=MARKS["error"], linewidth=0.8, alpha=0.7)
        for index, spread in enumerate(spreads.values()):
            _line(axes, bins, spread, SERIES[index % len(SERIES)], is_log)
        if is_log:
            log_axis(axes, log_range(every))
        if axis == "from zero":  # or a constant has an axis of tiny differences
            axes.set_ylim(0, 1.05 * every.max() or 1)
        _steps_axis(axes, bins)

    legend = tuple((name, index) for index, name in enumerate(spreads) if name)
    name = title.lower().replace(" ", "-")
    return Chart(title, legend, svg(draw, name=name, label=f"{title} by step", height=2.3))


def _line(axes: Axes, bins: Bins, spread: Spread, color: str, is_log: bool) -> None:
    """Draw a line, gaps closed, and its band."""
    low, middle, high = (
        np.where(values > 0, values, np.nan) if is_log else values
        for values in (spread.low, spread.middle, spread.high)
    )
    known = np.isfinite(middle)
    x = bins.middles[known]
    if (spread.high > spread.low).any():
        bottom = np.where(np.isfinite(low), low, middle)
        axes.fill_between(x, bottom[known], high[known], color=color, alpha=0.25, linewidth=0)
    # A single point would be a line of no length.
    marker = "o" if known.sum() == 1 else ""
    axes.plot(x, middle[known], color=color, linewidth=1.4, marker=marker, markersize=3)


def _marks_chart(run: Run, bins: Bins) -> Chart | None:
    """Draw in which steps gradients were clipped, and which were skipped."""
    skipped = skipped_lines(run) > 0
    factors = run.metrics.get("clip_factor")
    with np.errstate(invalid="ignore"):
        clipped = np.zeros(len(run), bool) if factors is None else factors < CLIPPED_FACTOR
    if not (skipped.any() or clipped.any()):
        return None
    rows = (
        ("skipped", np.sign(bins.share(skipped)), MARKS["error"]),
        ("clipped", bins.share(clipped), MARKS["warning"]),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = np.diff(bins.edges)
        for place, (_, share, color) in enumerate(rows):
            axes.bar(
                bins.middles, 0.8 * share, width=width, bottom=1.1 - place, color=color, linewidth=0
            )
        axes.set_yticks([1.5, 0.5], [name for name, _, _ in rows])
        axes.set_ylim(0, 2)
        _steps_axis(axes, bins)

    label = "Skipped and clipped steps"
    picture = svg(draw, name="marks", label=label, height=2.3, has_grid=False)
    return Chart(label, (), picture)


def _heat_map(
    run: Run,
    values: Array,
    marked: Mapping[str, str],
    *,
    title: str,
    colors: tuple[str, ...],
    limits: tuple[float, float],
    labels: tuple[str, ...],
) -> HeatMap:
    """Draw a row for each layer. A cell is the highest value of its steps."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    bins = Bins(run.steps, limit=300)
    rows = _rows(run, values, marked)
    cells = bins.highest(values[:, rows]).T
    pixels = LinearSegmentedColormap.from_list("", colors)(Normalize(*limits, clip=True)(cells))
    pixels[..., 3] *= np.isfinite(cells)  # the page shows where nothing was measured
    names = [run.layers[row] for row in rows]
    skips = bins.middles[bins.share(skipped_lines(run) > 0) > 0]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        extent = (float(bins.edges[0]), float(bins.edges[-1]), len(rows), 0)
        axes.imshow(pixels, interpolation="none", aspect="auto", extent=extent)
        every = math.ceil(len(rows) / _LABELED_ROWS)
        labeled = [i for i, name in enumerate(names) if i % every == 0 or name in marked]
        labeled = [  # a label that would touch one of a layer with a finding gives way
            i
            for i in labeled
            if names[i] in marked
            or not any(0 < abs(i - j) < every * 0.8 for j in labeled if names[j] in marked)
        ]
        axes.set_yticks([i + 0.5 for i in labeled], [_shortened(names[i]) for i in labeled])
        for label, i in zip(axes.get_yticklabels(), labeled):
            if names[i] in marked:
                label.set_color(MARKS[marked[names[i]]])
                label.set_fontweight("bold")
        if len(skips):
            axes.plot(
                skips,
                np.full(len(skips), -0.012 * len(rows)),
                linestyle="",
                marker="v",
                markersize=4,
                color=MARKS["error"],
                clip_on=False,
            )
            axes.set_ylim(len(rows), 0)
        _steps_axis(axes, bins)
        axes.spines[:].set_visible(False)

    height = 0.75 + 0.17 * min(len(rows), _LABELED_ROWS) + 0.008 * max(0, len(rows) - _LABELED_ROWS)
    name = title.lower().replace(" ", "-")
    picture = svg(
        draw, name=name, label=f"{title}, by step", height=height, width=10.0, has_grid=False
    )
    return HeatMap(title, colors, labels, len(rows), picture)


def _rows(run: Run, values: Array, marked: Mapping[str, str]) -> list[int]:
    """Return the layers to show: those with findings, and of the others as many as fit."""
    known = np.flatnonzero(np.isfinite(values).any(axis=0))
    if len(known) <= _MOST_ROWS:
        return [int(row) for row in known]
    needed = [int(row) for row in known if run.layers[row] in marked][: _MOST_ROWS // 2]
    spaced = known[np.linspace(0, len(known) - 1, _MOST_ROWS - len(needed)).astype(int)]
    return sorted({*needed, *(int(row) for row in spaced)})


def _different(lr: Array) -> list[tuple[int, Array]]:
    """Return the learning rates that differ, as many as there are colors, with their groups."""
    found: list[tuple[int, Array]] = []
    for index, column in enumerate(lr.T):
        if len(found) == len(SERIES):
            break
        if not any(np.array_equal(column, other, equal_nan=True) for _, other in found):
            found.append((index, column))
    return found


def _median_layer(values: Array) -> Array:
    finite = np.where(np.isfinite(values), values, np.nan)
    some = np.isfinite(finite).any(axis=1)
    medians = np.full(len(values), np.nan)
    if some.any():
        medians[some] = np.nanmedian(finite[some], axis=1)
    return medians


def _steps_axis(axes: Axes, bins: Bins) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(bins.edges[0], bins.edges[-1])
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(_with_commas)


def _with_commas(step: float, _: Any) -> str:
    return f"{step:,.0f}"


def _shortened(name: str) -> str:
    """Return a name with its middle left out if it is long.

    Example:
        >>> _shortened("model.layers.0.weight")
        'model.layers.0.weight'
    """
    if len(name) <= _LABEL_LENGTH:
        return name
    half = (_LABEL_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"

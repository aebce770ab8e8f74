"""The demo's charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from stepforge.cli.demo.side_by_side import Comparison, Variant
from stepforge.cli.figures import SERIES, log_axis, log_range, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DASHES", "difference_charts", "training_charts"]

#: The dashes of the variants' lines, in points. A line on top lets the lines below show through.
DASHES = ("", "4 4", "2 2", "6 2 1 2")
_WIDTHS = (3.0, 1.4, 1.6, 1.4)


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
    loss_range = log_range(loss for trace in traces for loss in trace.losses)
    lowest = min(min(trace.accuracies) for trace in traces)

    def draw(comparison: Comparison, figure: Figure) -> None:
        loss, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for index, name in shown:
            trace = comparison.traces[name]
            epochs = range(1, len(trace.losses) + 1)
            loss.plot(epochs, trace.losses, **_line(index))
            accuracy.plot(epochs, [100 * share for share in trace.accuracies], **_line(index))
        log_axis(loss, loss_range)
        accuracy.set_ylim(100 * lowest - 1, 100.5)
        loss.set_ylabel("training loss (nats)")
        accuracy.set_ylabel("test accuracy (%)")
        accuracy.set_xlabel("training time (epochs)")
        accuracy.xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()

    return [
        svg(
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
    limits = log_range(
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
        log_axis(axes, limits)
        axes.set_ylabel("largest difference (weight units)")
        axes.set_xlabel("training time (steps)")

    return [
        svg(
            partial(draw, comparison),
            name=f"difference-{comparison.optimizer}",
            label=f"{comparison.optimizer}: largest difference from the twin by step",
            height=2.4,
        )
        for comparison in comparisons
    ]


def _line(index: int) -> dict[str, Any]:
    index %= len(SERIES)
    dashes = tuple(float(length) for length in DASHES[index].split())
    return {
        "color": SERIES[index],
        "linewidth": _WIDTHS[index],
        "linestyle": (0, dashes) if dashes else "solid",
    }

"""The demo's page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import stepforge
from stepforge.cli import machine
from stepforge.cli.demo import charts
from stepforge.cli.demo.result_tables import ResultTable
from stepforge.cli.demo.side_by_side import WARM_UP_STEPS, Comparison, Variant
from stepforge.cli.pages import render_page

__all__ = ["render"]


def render(
    tables: Sequence[ResultTable],
    comparisons: Sequence[Comparison],
    variants: Sequence[Variant],
    *,
    ours: Variant,
    twin: Variant,
    epochs: int,
    seed: int,
) -> str:
    """Return the page as text.

    Args:
        tables: the results as tables.
        comparisons: the results, at least one.
        variants: the variants of the comparisons.
        ours: this library's variant.
        twin: the variant that the others were compared with.
        epochs: the number of passes over the training images.
        seed: the seed of the initial weights and the batches.
    """
    our_traces = [c.traces[ours.name] for c in comparisons]
    twin_traces = [c.traces[twin.name] for c in comparisons]
    timed = [c.traces[v.name] for c in comparisons for v in variants if not v.nudged]
    nudged = [c.traces[v.name] for c in comparisons for v in variants if v.nudged]
    return render_page(
        "stepforge.cli.demo",
        tables=[(table, _groups(table), _starts(table)) for table in tables],
        variants=[
            (variant, charts.DASHES[i % len(charts.DASHES)], i)
            for i, variant in enumerate(variants)
        ],
        comparisons=comparisons,
        training=_named(comparisons, charts.training_charts(comparisons, variants)),
        differences=_named(comparisons, charts.difference_charts(comparisons, variants, twin)),
        explanations=[str(stepforge.explain(trace.optimizer)) for trace in our_traces],
        machine=machine.describe(),
        epochs=epochs,
        seed=seed,
        steps=len(our_traces[0].differences),
        warm_up=WARM_UP_STEPS,
        accuracy_gap=max(
            abs(a.accuracies[-1] - b.accuracies[-1])
            for a, b in zip(our_traces, twin_traces, strict=True)
        ),
        one_step=max(trace.one_step or 0.0 for trace in our_traces),
        largest_difference=max(trace.differences[-1] for trace in our_traces),
        nudged_difference=max((trace.differences[-1] for trace in nudged), default=0.0),
        spread=max(trace.spread for trace in timed),
        twin=twin,
    )


def _named(comparisons: Sequence[Comparison], svgs: Sequence[str]) -> list[tuple[str, str]]:
    return [(c.optimizer, svg) for c, svg in zip(comparisons, svgs, strict=True)]


def _groups(table: ResultTable) -> list[tuple[str, int]]:
    """Return the groups of columns with their sizes."""
    groups = groupby(table.columns, key=lambda column: column.group)
    return [(group, len(list(columns))) for group, columns in groups]


def _starts(table: ResultTable) -> frozenset[int]:
    """Return the indices of the columns that begin a group, except the first."""
    names = [column.group for column in table.columns]
    return frozenset(i for i in range(1, len(names)) if names[i] != names[i - 1])

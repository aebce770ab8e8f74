"""The demo's page: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby

import jinja2  # torch depends on it
from markupsafe import Markup

import stepforge
from stepforge.cli import charts, machine
from stepforge.cli.arms import Table
from stepforge.cli.lockstep import WARM_UP_STEPS, Arm, Comparison

__all__ = ["render"]


def render(
    tables: Sequence[Table],
    comparisons: Sequence[Comparison],
    arms: Sequence[Arm],
    *,
    ours: Arm,
    twin: Arm,
    epochs: int,
    seed: int,
) -> str:
    """The page as text.

    Args:
        tables: the results as tables.
        comparisons: the results, at least one.
        arms: what was compared.
        ours: the arm of this library.
        twin: the arm that the others were compared with.
        epochs: how often the training went through the images.
        seed: what the initial weights and the batches were made from.
    """
    mine = [c.traces[ours.name] for c in comparisons]
    theirs = [c.traces[twin.name] for c in comparisons]
    timed = [c.traces[arm.name] for c in comparisons for arm in arms if not arm.nudged]
    nudged = [c.traces[arm.name] for c in comparisons for arm in arms if arm.nudged]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("stepforge.cli").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        tables=[(table, _groups(table), _starts(table)) for table in tables],
        arms=[(arm, charts.DASHES[i % len(charts.DASHES)], i) for i, arm in enumerate(arms)],
        comparisons=comparisons,
        training=_named(comparisons, charts.training_charts(comparisons, arms)),
        differences=_named(comparisons, charts.difference_charts(comparisons, arms, twin)),
        explanations=[str(stepforge.explain(trace.optimizer)) for trace in mine],
        machine=machine.describe(),
        epochs=epochs,
        seed=seed,
        steps=len(mine[0].differences),
        warm_up=WARM_UP_STEPS,
        accuracy_gap=max(
            abs(a.accuracies[-1] - b.accuracies[-1]) for a, b in zip(mine, theirs, strict=True)
        ),
        one_step=max(trace.one_step or 0.0 for trace in mine),
        apart=max(trace.differences[-1] for trace in mine),
        nudged_apart=max((trace.differences[-1] for trace in nudged), default=0.0),
        spread=max(trace.spread for trace in timed),
        twin=twin,
    )


def _named(comparisons: Sequence[Comparison], pictures: Sequence[str]) -> list[tuple[str, Markup]]:
    return [(c.optimizer, Markup(svg)) for c, svg in zip(comparisons, pictures, strict=True)]


def _groups(table: Table) -> list[tuple[str, int]]:
    """The groups of columns, and how many each has."""
    groups = groupby(table.columns, key=lambda column: column.group)
    return [(group, len(list(columns))) for group, columns in groups]


def _starts(table: Table) -> frozenset[int]:
    """The numbers of the columns that begin a group."""
    names = [column.group for column in table.columns]
    return frozenset(i for i in range(1, len(names)) if names[i] != names[i - 1])

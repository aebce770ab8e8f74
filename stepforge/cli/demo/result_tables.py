"""Tables of the demo's results, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from stepforge.cli.demo.side_by_side import Comparison, Variant
from stepforge.cli.demo.variants import OURS, TWIN, VARIANTS

__all__ = ["Column", "ResultTable", "tabulate"]


@dataclass(frozen=True)
class Column:
    """The heading of a column. Adjacent columns with the same ``group`` share it."""

    group: str
    name: str


@dataclass(frozen=True)
class ResultTable:
    """A table of text."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def tabulate(
    comparisons: Sequence[Comparison], variants: Sequence[Variant] = VARIANTS
) -> tuple[ResultTable, ResultTable]:
    """Return a table of the training results and one of the step times, a row per optimizer."""
    return (
        _table("What the variants computed", comparisons, _training_columns(variants)),
        _table("How long their steps took", comparisons, _time_columns(variants)),
    )


def _table(
    title: str,
    comparisons: Sequence[Comparison],
    columns: Iterable[tuple[Column, Callable[[Comparison], str]]],
) -> ResultTable:
    headings, cells = zip(*[(Column("", "optimizer"), attrgetter("optimizer")), *columns])
    rows = tuple(tuple(cell(comparison) for cell in cells) for comparison in comparisons)
    return ResultTable(title, headings, rows)


def _training_columns(
    variants: Sequence[Variant],
) -> Iterator[tuple[Column, Callable[[Comparison], str]]]:
    trained = [variant for variant in variants if not variant.only_timed]
    not_nudged = [variant.name for variant in trained if not variant.nudged]
    for name in not_nudged:
        yield Column("test accuracy", name), partial(_accuracy, name)
    for name in [variant.name for variant in trained if variant != TWIN]:
        yield Column("final difference", name), partial(_difference, name)
    for name in [name for name in not_nudged if name != TWIN.name]:
        yield Column("in 1 step", name), partial(_one_step, name)


def _time_columns(
    variants: Sequence[Variant],
) -> Iterator[tuple[Column, Callable[[Comparison], str]]]:
    yield Column("step(), µs", OURS.name), partial(_microseconds, OURS.name)
    of_torch = [variant for variant in variants if variant.timing_label]
    for variant in of_torch:
        yield Column("torch.optim, µs", variant.timing_label), partial(_microseconds, variant.name)
    for variant in of_torch:
        yield Column("torch.optim / ours", variant.timing_label), partial(_ratio, variant.name)


def _accuracy(name: str, comparison: Comparison) -> str:
    return f"{comparison.traces[name].accuracies[-1]:.1%}"


def _difference(name: str, comparison: Comparison) -> str:
    return f"{comparison.traces[name].differences[-1]:.1e}"


def _one_step(name: str, comparison: Comparison) -> str:
    return f"{comparison.traces[name].one_step:.1e}"


def _microseconds(name: str, comparison: Comparison) -> str:
    return f"{comparison.traces[name].median_step * 1e6:,.0f}"


def _ratio(name: str, comparison: Comparison) -> str:
    traces = comparison.traces
    return f"{traces[name].median_step / traces[OURS.name].median_step:.2f}"

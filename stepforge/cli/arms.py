"""The arms of the demo, and the table that compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

import stepforge
from stepforge.cli.lockstep import Arm, Comparison

__all__ = ["ARMS", "OURS", "TWIN", "Column", "Table", "tabulate"]


def _of(module: ModuleType, **flags: Any) -> Callable[..., torch.optim.Optimizer]:
    def make(name: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(module, name)(params, lr=lr, **flags))

    return make


OURS = Arm("ours", "stepforge, default flags", _of(stepforge))
TWIN = Arm("twin", "torch.optim, default flags", _of(torch.optim))
#: Everything is made from this tuple: an arm more is a line more.
ARMS = (
    OURS,
    TWIN,
    Arm(
        "nudged",
        "the twin, started from weights one float32 unit up",
        _of(torch.optim),
        nudged=True,
    ),
)


@dataclass(frozen=True)
class Column:
    """The heading of a column: columns side by side with the same ``group`` share it."""

    group: str
    name: str


@dataclass(frozen=True)
class Table:
    """A table of text, to be printed and to be put on the page."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def tabulate(comparisons: Iterable[Comparison], arms: Sequence[Arm] = ARMS) -> Table:
    """The results as a table, with one row an optimizer."""
    columns = list(_columns(arms))
    return Table(
        tuple(column for column, _ in columns),
        tuple(
            (comparison.optimizer, *(cell(comparison) for _, cell in columns[1:]))
            for comparison in comparisons
        ),
    )


def _columns(arms: Sequence[Arm]) -> Iterator[tuple[Column, Callable[[Comparison], str]]]:
    runs = [arm.name for arm in arms if not arm.nudged]
    yield Column("", "optimizer"), attrgetter("optimizer")
    for name in runs:
        yield Column("test accuracy", name), partial(_accuracy, name)
    for name in [arm.name for arm in arms if arm != TWIN]:
        yield Column("final difference", name), partial(_difference, name)
    for name in [name for name in runs if name != TWIN.name]:
        yield Column("in 1 step", name), partial(_one_step, name)
    for name in runs:
        yield Column("step(), µs", name), partial(_microseconds, name)
    for name in [name for name in runs if name != OURS.name]:
        yield Column("ratio", f"{name}/{OURS.name}"), partial(_ratio, name)


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

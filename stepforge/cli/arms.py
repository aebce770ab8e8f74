"""The arms of the demo, and the tables that compare them."""

from __future__ import annotations

import inspect
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


def _fastest_of_torch(name: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """One kernel for all parameters where torch.optim has it, else operations on lists of them."""
    fused = "fused" in inspect.signature(getattr(torch.optim, name)).parameters
    return _of(torch.optim, **{"fused" if fused else "foreach": True})(name, params, lr)


OURS = Arm("ours", "stepforge, default flags", _of(stepforge))
TWIN = Arm("twin", "torch.optim, default flags", _of(torch.optim), way="default flags")
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
    Arm(
        "fastest",
        "torch.optim, fused=True, or foreach=True where there is no fused; only timed",
        _fastest_of_torch,
        way="fastest way",
        follows=True,
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

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def tabulate(comparisons: Sequence[Comparison], arms: Sequence[Arm] = ARMS) -> tuple[Table, Table]:
    """What the arms computed and how long they took: two tables with one row an optimizer."""
    return (
        _table("What the arms computed", comparisons, _numbers(arms)),
        _table("How long their steps took", comparisons, _times(arms)),
    )


def _table(
    title: str,
    comparisons: Sequence[Comparison],
    columns: Iterable[tuple[Column, Callable[[Comparison], str]]],
) -> Table:
    headings, cells = zip(*[(Column("", "optimizer"), attrgetter("optimizer")), *columns])
    return Table(title, headings, tuple(tuple(cell(c) for cell in cells) for c in comparisons))


def _numbers(arms: Sequence[Arm]) -> Iterator[tuple[Column, Callable[[Comparison], str]]]:
    trained = [arm for arm in arms if not arm.follows]
    runs = [arm.name for arm in trained if not arm.nudged]
    for name in runs:
        yield Column("test accuracy", name), partial(_accuracy, name)
    for name in [arm.name for arm in trained if arm != TWIN]:
        yield Column("final difference", name), partial(_difference, name)
    for name in [name for name in runs if name != TWIN.name]:
        yield Column("in 1 step", name), partial(_one_step, name)


def _times(arms: Sequence[Arm]) -> Iterator[tuple[Column, Callable[[Comparison], str]]]:
    yield Column("step(), µs", OURS.name), partial(_microseconds, OURS.name)
    ways = [arm for arm in arms if arm.way]
    for arm in ways:
        yield Column("torch.optim, µs", arm.way), partial(_microseconds, arm.name)
    for arm in ways:
        yield Column("torch.optim / ours", arm.way), partial(_ratio, arm.name)


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

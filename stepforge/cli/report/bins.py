"""Bins of steps, so that a page of a long run stays small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stepforge.cli.report.run import Array, Mask

__all__ = ["Bins", "Spread"]


@dataclass(frozen=True)
class Spread:
    """Values by bin, NaN for a bin without any: the lowest, the median and the highest."""

    low: Array
    middle: Array
    high: Array


class Bins:
    """Equal ranges of steps.

    Args:
        steps: ascending steps, at least one.
        limit: the largest number of bins.

    Attributes:
        edges: where bins begin, and where the last one ends, ``[bins + 1]``.

    Example:
        >>> bins = Bins(np.array([10, 20, 30, 40]), limit=2)
        >>> bins.edges.tolist()
        [10.0, 25.0, 40.0]
        >>> bins.highest(np.array([[1.0], [3.0], [np.nan], [2.0]])).tolist()
        [[3.0], [2.0]]
    """

    def __init__(self, steps: np.ndarray[Any, np.dtype[np.int64]], limit: int = 240) -> None:
        first, last = float(steps[0]), float(steps[-1])
        # Most bins have a line, also where a run was logged at different intervals.
        spacing = float(np.quantile(np.diff(steps), 0.9)) if len(steps) > 1 else 1.0
        count = int(min(limit, max(1.0, np.ceil((last - first) / spacing + 1))))
        self.edges = np.linspace(first, max(last, first + 1), count + 1)
        bins = np.clip(np.searchsorted(self.edges, steps, side="right") - 1, 0, count - 1)
        self._starts = np.searchsorted(bins, np.arange(count + 1))

    @property
    def middles(self) -> Array:
        """The middle of each bin, ``[bins]``."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def __len__(self) -> int:
        return len(self.edges) - 1

    def highest(self, values: Array) -> Array:
        """Return the highest finite value of each bin and column, ``[bins, columns]``."""
        found = np.full((len(self), values.shape[1]), np.nan)
        for index in range(len(self)):
            part = values[self._starts[index] : self._starts[index + 1]]
            if len(part):
                found[index] = np.where(np.isfinite(part), part, -np.inf).max(axis=0)
        return np.where(np.isfinite(found), found, np.nan)

    def spread(self, values: Array) -> Spread:
        """Return the spread of the finite values of each bin."""
        rows = np.full((len(self), 3), np.nan)
        for index in range(len(self)):
            part = values[self._starts[index] : self._starts[index + 1]]
            part = part[np.isfinite(part)]
            if len(part):
                rows[index] = part.min(), np.median(part), part.max()
        return Spread(*rows.T)

    def share(self, lines: Mask) -> Array:
        """Return the share of lines of each bin that are marked; 0 for a bin without lines."""
        totals = np.concatenate([[0], np.cumsum(lines)])[self._starts]
        marked, counts = np.diff(totals), np.diff(self._starts)
        return marked / np.maximum(counts, 1)

"""Addresses of tensors, and the check that no written memory is shared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Batch, Gradients, LazyColumns

__all__ = ["Aliasing", "Spans", "addresses", "extent", "increment_versions", "is_aliased"]


class Spans:
    """The memory that some tensors span, gaps included, in order of address."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        tensors = [x for x in tensors if x.numel()]
        begins = addresses(tensors)
        order = np.argsort(begins)
        self.begins = begins[order]
        self.ends = (begins + np.array([extent(x) for x in tensors], np.uint64))[order]
        #: True if any two of them overlap.
        self.overlap = bool((np.maximum.accumulate(self.ends[:-1]) > self.begins[1:]).any())

    def touch(self, begins: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> bool:
        """Return True if another span overlaps one of these, which do not overlap each other."""
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.begins, ends, side="left")
        return bool((last > first).any())


class Aliasing:
    """The memory of a batch; finds parameters and states that share it with another tensor.

    Args:
        batch: the tensors; gradients of the same layouts may be bound later.
        out: an array of uint64 for the addresses of the gradients.

    Attributes:
        gradients: the addresses of the gradients.
    """

    def __init__(self, batch: Batch, out: np.ndarray[Any, Any] | None = None) -> None:
        gradients = batch.columns["g"]
        self._states = Spans([x for name, c in batch.columns.items() if name != "g" for x in c])
        self._occupied = np.array([g.numel() > 0 for g in gradients])
        self._extents = np.array([extent(g) for g in gradients], np.uint64)
        self.gradients = np.empty(len(gradients), np.uint64) if out is None else out
        self.gradients[:] = addresses(gradients)
        self._disjoint = False

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts."""
        gradients.write_addresses(self.gradients)
        self._disjoint = gradients.disjoint

    def found(self) -> bool:
        """Return True if the memory of a parameter or state is also another tensor's."""
        if self._disjoint:
            return False
        begins = self.gradients[self._occupied]
        ends = begins + self._extents[self._occupied]
        return self._states.overlap or self._states.touch(begins, ends)


def is_aliased(batch: Batch) -> bool:
    """Return True if the memory of a parameter or state is also another tensor's of the batch."""
    return Aliasing(batch).found()


def increment_versions(batch: Batch) -> None:
    """Tell autograd of writes through pointers, so that it refuses a stale backward."""
    if isinstance(batch.columns, LazyColumns):
        batch.columns.increment_versions()
        return
    written = (batch.columns[name] for name in batch.spec.written)
    torch.autograd.graph.increment_version(list(itertools.chain.from_iterable(written)))


def extent(x: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last; 0 if it is empty."""
    if not x.numel():
        return 0
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape))
    return (last + 1) * x.element_size()


def addresses(tensors: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Return the address of each tensor's first element, as uint64."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))

"""What generated kernels are given, and ask of it as memory: whether tensors are, and share it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Batch
from stepforge.expr import Graph
from stepforge.formats import Format, tensor_name, tensors_of
from stepforge.sharding import is_plain, local


def columns_of(graph: Graph) -> tuple[str, ...]:
    """The columns of a kernel: what it reads, then what it only writes."""
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


def formats_of(graph: Graph, formats: Mapping[str, Format]) -> dict[str, Format]:
    """The formats of those that have one, in their order."""
    return {column: formats[column] for column in columns_of(graph) if column in formats}


def tensors_of_graph(graph: Graph, formats: Mapping[str, Format]) -> tuple[str, ...]:
    """The names of all tensors that a kernel is given for each row."""
    return tuple(name for column in columns_of(graph) for name in tensors_of(column, formats))


def elements_of_graph(graph: Graph, formats: Mapping[str, Format]) -> tuple[str, ...]:
    """The names of those that have an element for each element: of all but scales."""
    scales = {
        tensor_name(column, part)
        for column, format_ in formats.items()
        for part in format_.parts
        if part.of_block
    }
    return tuple(name for name in tensors_of_graph(graph, formats) if name not in scales)


def stored_dtypes(p: torch.Tensor, g: torch.Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """The real dtypes in which a parameter and its gradient lie in memory."""
    dtype, gradient = (
        x.dtype.to_real() if x.is_complex() else x.dtype for x in (p, p if g is None else g)
    )
    return dtype, gradient


def unreadable(
    p: torch.Tensor, g: torch.Tensor | None, storable: Container[torch.dtype]
) -> str | None:
    """Why a kernel cannot read a parameter or its gradient from memory; None if it can.

    Args:
        p: the parameter.
        g: its gradient, if it has one.
        storable: the dtypes that the kernel reads and writes.
    """
    for tensor in (p, p if g is None else g):
        if not is_plain(local(tensor)):
            return f"a {type(tensor).__name__} may have no memory of its own"
    if g is not None and g.is_sparse:
        return "its gradient is sparse"
    for stored in stored_dtypes(p, g):
        if stored not in storable:
            return f"it does not store {stored}"
    return None


class Spans:
    """The memory that some tensors span, gaps included, in order."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        tensors = [x for x in tensors if x.numel()]
        begins = addresses(tensors)
        order = np.argsort(begins)
        self.begins = begins[order]
        self.ends = (begins + np.array([extent(x) for x in tensors], np.uint64))[order]
        #: Whether any two of them do.
        self.overlap = bool((np.maximum.accumulate(self.ends[:-1]) > self.begins[1:]).any())

    def touch(self, begins: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> bool:
        """Whether any other span touches one of these, which do not overlap."""
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.begins, ends, side="left")
        return bool((last > first).any())


class Aliasing:
    """Tells whether the memory of a parameter or state is also another tensor's of a batch.

    Args:
        batch: the rows; it may be aimed at other gradients of the same layouts.

    Attributes:
        gradients: where the gradients begin.
    """

    def __init__(self, batch: Batch) -> None:
        gradients = batch.columns["g"]
        self._kept = Spans([x for name, c in batch.columns.items() if name != "g" for x in c])
        self._occupied = np.array([g.numel() > 0 for g in gradients])
        self._extents = np.array([extent(g) for g in gradients], np.uint64)
        self.aim(gradients)

    def aim(self, gradients: Sequence[torch.Tensor]) -> None:
        """Takes other gradients of the same layouts."""
        self.gradients = addresses(gradients)

    def found(self) -> bool:
        """True if any memory that is kept is also another tensor's."""
        begins = self.gradients[self._occupied]
        ends = begins + self._extents[self._occupied]
        return self._kept.overlap or self._kept.touch(begins, ends)


def overlaps(batch: Batch) -> bool:
    """True if the memory of a parameter or state is also another tensor's of the batch."""
    return Aliasing(batch).found()


def count_writes(batch: Batch) -> None:
    """Tells autograd of writes through pointers, so that it refuses a stale backward."""
    written = (batch.columns[name] for name in batch.written)
    torch.autograd.graph.increment_version(list(itertools.chain.from_iterable(written)))


def extent(x: torch.Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last; 0 without elements."""
    if not x.numel():
        return 0
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape))
    return (last + 1) * x.element_size()


def addresses(tensors: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
    """Where tensors begin, as uint64."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))

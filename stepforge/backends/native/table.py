"""The table of rows that one call of a kernel steps, and the memory that it touches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stepforge.backends import reference
from stepforge.backends.batch import Batch
from stepforge.backends.native.kernel import kernel_for
from stepforge.backends.native.source import columns_of


class Table:
    """Rows of dense memory and of the same dtypes, which one call steps: where they are.

    Args:
        batch: the rows; it may be aimed at other gradients, and run with other coefficients.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        graph = batch.graph
        names = columns_of(graph)
        columns = [batch.columns[name] for name in names]
        dtypes = tuple(column[0].dtype for column in columns)
        kernel = kernel_for(graph, dtypes, batch.dtype)
        if isinstance(kernel, str):
            raise RuntimeError(f"there is no kernel for {', '.join(map(str, dtypes))}: {kernel}")
        self.kernel = kernel
        self.sizes = np.array([x.numel() for x in columns[0]], dtype=np.int64)
        self.occupied = self.sizes > 0
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])
        self.pointers = np.ascontiguousarray(np.stack([*map(_addresses, columns)], axis=1))
        self.numbers = np.empty((len(batch), len(graph.coefficients)), dtype=kernel.number)
        self.arguments = (
            len(batch),
            int(self.starts[-1]),
            self.starts.ctypes.data,
            self.pointers.ctypes.data,
            self.numbers.ctypes.data,
        )
        self.written = [x for name in graph.results for x in batch.columns[name]]
        self.gradient = names.index("g") if "g" in names else None
        self.gradient_bytes = self.sizes * batch.columns["g"][0].element_size()
        self.kept = Spans([x for n, c in zip(names, columns) if n != "g" for x in c])
        self._check_memory()

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes other gradients of the same layout.

        Raises:
            RuntimeError: one has no memory.
        """
        if self.gradient is not None:
            addresses = _addresses(gradients)
            self.pointers[:, self.gradient] = addresses
            if not addresses.all():
                self._check_memory()

    def overlaps(self) -> bool:
        """Whether memory that is kept is also another tensor's of these rows."""
        if self.gradient is None:
            return self.kept.overlap
        begins = self.pointers[:, self.gradient][self.occupied]
        return self.kept.overlap or self.kept.touch(
            begins, begins + self.gradient_bytes[self.occupied].astype(np.uint64)
        )

    def run(self, batch: Batch) -> None:
        """Steps the rows with the coefficients of a batch of just these rows.

        Its gradients are those that the table was made with, or has been aimed at since.
        """
        if self.overlaps():
            reference.run(batch)
            return
        if any(isinstance(values, np.ndarray) for values in batch.coefficients):
            for position, values in enumerate(batch.coefficients):
                self.numbers[:, position] = values
        else:
            self.numbers[:] = batch.coefficients
        self.kernel.launch(*self.arguments, unscale=batch.unscale)
        # A write through a pointer is unknown to autograd, which must refuse a stale backward.
        torch.autograd.graph.increment_version(self.written)

    def _check_memory(self) -> None:
        if (self.pointers[self.occupied] == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")


class Spans:
    """The memory that some tensors span, gaps included, in order."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        tensors = [x for x in tensors if x.numel()]
        begins = _addresses(tensors)
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


def overlaps(batch: Batch) -> bool:
    """Whether the memory of a parameter or state is also another tensor's of the batch."""
    kept = Spans([x for name, c in batch.columns.items() if name != "g" for x in c])
    gradients = [g for g in batch.columns["g"] if g.numel()]
    begins = _addresses(gradients)
    extents = np.array([extent(g) for g in gradients], np.uint64)
    return kept.overlap or kept.touch(begins, begins + extents)


def extent(x: torch.Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape))
    return (last + 1) * x.element_size()


def _addresses(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))

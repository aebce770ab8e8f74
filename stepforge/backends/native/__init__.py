"""The native backend: a graph compiled to C, one call for all tensors, on all threads.

Serves tensors on a CPU whose memory is dense: a row's tensors are read and written in memory order,
which is the same for all of them. A row whose tensors differ in layout goes through small
contiguous buffers, a part at a time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends import reference
from stepforge.backends.batch import CACHED, Batch
from stepforge.backends.native import build
from stepforge.backends.native.source import OPERATIONS, STORAGE, c_source, columns_of
from stepforge.expr import Graph

__all__ = ["OPERATIONS", "Kernel", "Table", "kernel_for", "name", "prepare", "refuses", "run"]

name = "native"

#: Elements below which waking the other threads costs more than they save.
SERIAL = 2**15


class Kernel:
    """A compiled kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype of each of :func:`columns_of`, in order.
        arithmetic: float32 or float64.

    Raises:
        BuildError: it cannot be compiled.
    """

    def __init__(
        self, graph: Graph, dtypes: tuple[torch.dtype, ...], arithmetic: torch.dtype
    ) -> None:
        self.columns = columns_of(graph)
        self.number = np.float64 if arithmetic == torch.float64 else np.float32
        source = c_source(graph, dict(zip(self.columns, dtypes)), arithmetic)
        self._run = build.load(source).stepforge_run
        pointer = ctypes.c_void_p
        self._run.argtypes = [
            ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int, pointer, pointer, pointer
        ]  # fmt: skip
        self._run.restype = None

    def __call__(
        self,
        starts: np.ndarray[Any, Any],
        pointers: np.ndarray[Any, Any],
        numbers: np.ndarray[Any, Any],
    ) -> None:
        """Steps rows of dense memory.

        Args:
            starts: int64 of rows + 1; the number of elements before each row, and of all.
            pointers: uint64 of rows x columns; where each tensor begins.
            numbers: of rows x coefficients, in the dtype of the arithmetic.
        """
        tables = (array.ctypes.data for array in (starts, pointers, numbers))
        self.launch(len(starts) - 1, int(starts[-1]), *tables)

    def launch(self, rows: int, elements: int, starts: int, pointers: int, numbers: int) -> None:
        """The same, given where the tables are.

        Args:
            rows: how many they are.
            elements: how many elements they have together.
            starts: the address of rows + 1 int64: the elements before each row, and all.
            pointers: the address of rows x columns addresses of tensors.
            numbers: the address of rows x coefficients in the dtype of the arithmetic.
        """
        pool = build.thread_pool() if elements >= SERIAL and not _forked else None
        threads = torch.get_num_threads() if pool else 1
        self._run(rows, starts, pointers, numbers, threads, *(pool or (0, 0, 0)))


# A child of fork has the pool's memory but not its threads: waiting for them would never end.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_building = threading.Lock()


def kernel_for(
    graph: Graph, dtypes: tuple[torch.dtype, ...], arithmetic: torch.dtype
) -> Kernel | str:
    """The kernel, compiled at its first use; or why it cannot be had.

    Args:
        graph: what it computes.
        dtypes: the dtype of each of :func:`columns_of`, in order.
        arithmetic: float32 or float64.
    """
    with _building:
        return _kernel_for(graph, dtypes, arithmetic, os.environ.get("STEPFORGE_ISA"))


@functools.cache
def _kernel_for(
    graph: Graph, dtypes: tuple[torch.dtype, ...], arithmetic: torch.dtype, _isa: str | None
) -> Kernel | str:
    try:
        return Kernel(graph, dtypes, arithmetic)
    except build.BuildError as error:
        return str(error)


def refuses(
    p: torch.Tensor, g: torch.Tensor | None, group: Mapping[str, Any], graph: Graph
) -> str | None:
    """Why this backend cannot serve a parameter, or None if it can."""
    if group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    if group["capturable"]:
        return "capturable keeps its numbers on the device, out of the reach of a C call"
    if p.device.type != "cpu":
        return f"it runs on a CPU, not on {p.device.type}"
    for tensor in (p, p if g is None else g):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a {type(tensor).__name__} may have no memory of its own"
    if g is not None and g.is_sparse:
        return "its gradient is sparse"
    dtype, gradient = (_real_dtype(x.dtype) for x in (p, p if g is None else g))
    for stored in (dtype, gradient):
        if stored not in STORAGE:
            return f"it does not store {stored}"
    dtypes = tuple(gradient if column == "g" else dtype for column in columns_of(graph))
    kernel = kernel_for(graph, dtypes, _arithmetic(dtype))
    if isinstance(kernel, str):
        if not group["fused"]:
            _warn_once(kernel)
        return kernel
    return None


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"steps run on torch operations, several times slower than a compiled kernel: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def prepare(batch: Batch) -> Table | None:
    """The table of a batch that one call can step, to be kept while its tensors stay; or None."""
    names = columns_of(batch.graph)
    rows = list(zip(*(batch.columns[name] for name in names)))
    if len({tuple(x.dtype for x in row) for row in rows}) > 1 or not all(map(_is_dense, rows)):
        return None
    table = Table(batch)
    table.aim(batch.columns["g"])
    return None if table.overlaps() else table


def run(batch: Batch) -> None:
    """Steps all rows in place, one call for those that share their dtypes."""
    if isinstance(batch.prepared, Table):
        batch.prepared.run(batch)
        return
    if _overlaps(batch):
        reference.run(batch)  # which has an order of reads and writes
        return
    names = columns_of(batch.graph)
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    dense = set()
    for index, row in enumerate(zip(*(batch.columns[name] for name in names))):
        alike.setdefault(tuple(tensor.dtype for tensor in row), []).append(index)
        if _is_dense(row):
            dense.add(index)
    for rows in alike.values():
        part = batch.rows([index for index in rows if index in dense])
        if len(part):
            Table(part).run(part)
        for piece in batch.rows([index for index in rows if index not in dense]).pieces(CACHED):
            _run_through_buffers(piece)


def _run_through_buffers(batch: Batch) -> None:
    """Steps tensors of unlike layouts: contiguous copies of a part, and back."""
    copies = {
        name: [x.resolve_neg().contiguous() for x in column]
        for name, column in batch.columns.items()
    }
    part = batch.with_columns(copies)
    Table(part).run(part)
    for name in batch.graph.results:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)


class Table:
    """Rows of dense memory and of the same dtypes, which one call steps: where they are.

    Args:
        batch: the rows; their gradients and coefficients may be others when it runs.

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
            *(table.ctypes.data for table in (self.starts, self.pointers, self.numbers)),
        )
        self.written = [x for name in graph.results for x in batch.columns[name]]
        self.gradient = names.index("g") if "g" in names else None
        self.gradient_bytes = self.sizes * batch.columns["g"][0].element_size()
        self.kept = _Spans([x for n, c in zip(names, columns) if n != "g" for x in c])
        self._check_memory()

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes other gradients of the same layout.

        Raises:
            RuntimeError: one has no memory.
        """
        if self.gradient is not None:
            self.pointers[:, self.gradient] = _addresses(gradients)
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
        """Steps the rows with the gradients and coefficients of a batch of just these rows."""
        self.aim(batch.columns["g"])
        if self.overlaps():
            reference.run(batch)
            return
        if any(isinstance(values, np.ndarray) for values in batch.coefficients):
            for position, values in enumerate(batch.coefficients):
                self.numbers[:, position] = values
        else:
            self.numbers[:] = batch.coefficients
        self.kernel.launch(*self.arguments)
        # A write through a pointer is unknown to autograd, which must refuse a stale backward.
        torch.autograd.graph.increment_version(self.written)

    def _check_memory(self) -> None:
        if (self.pointers[self.occupied] == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")


class _Spans:
    """The memory that some tensors span, gaps included, in order."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        tensors = [x for x in tensors if x.numel()]
        begins = _addresses(tensors)
        order = np.argsort(begins)
        self.begins = begins[order]
        self.ends = (begins + np.array([_extent(x) for x in tensors], np.uint64))[order]
        #: Whether any two of them do.
        self.overlap = bool((np.maximum.accumulate(self.ends[:-1]) > self.begins[1:]).any())

    def touch(self, begins: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> bool:
        """Whether any other span touches one of these, which do not overlap."""
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.begins, ends, side="left")
        return bool((last > first).any())


def _overlaps(batch: Batch) -> bool:
    """Whether the memory of a parameter or state is also another tensor's of the batch."""
    kept = _Spans([x for name, c in batch.columns.items() if name != "g" for x in c])
    gradients = [g for g in batch.columns["g"] if g.numel()]
    begins = _addresses(gradients)
    extents = np.array([_extent(g) for g in gradients], np.uint64)
    return kept.overlap or kept.touch(begins, begins + extents)


def _extent(x: torch.Tensor) -> int:
    """The bytes from the first element of a tensor to the end of its last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape))
    return (last + 1) * x.element_size()


def _addresses(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))


def _is_dense(row: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors of a row have their elements in one order and without gaps."""
    first = row[0]
    if any(tensor.is_neg() for tensor in row):  # the memory holds what it is not
        return False
    if all(tensor.is_contiguous() for tensor in row):
        return True
    strides = first.stride()
    return all(tensor.stride() == strides for tensor in row) and _without_gaps(first)


def _without_gaps(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

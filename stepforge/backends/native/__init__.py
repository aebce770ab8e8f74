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
from collections.abc import Mapping
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
            ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int, pointer, pointer
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
        parallel, thread = pool or (0, 0)
        self._run(rows, starts, pointers, numbers, threads, thread, parallel)


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
    if type(p) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(p).__name__} may have no memory of its own"
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


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"steps run on torch operations, several times slower than a compiled kernel: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def prepare(batch: Batch) -> Table | None:
    """The table of a batch that one call can step, to be kept while its tensors stay; or None."""
    rows = list(range(len(batch)))
    table = _table(batch, rows)
    return table if table is not None and len(table) == len(rows) else None


def run(batch: Batch) -> None:
    """Steps all rows in place, one call for those that share their dtypes."""
    if isinstance(batch.prepared, Table):
        batch.prepared.run(batch)
        return
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    columns = [batch.columns[name] for name in columns_of(batch.graph)]
    for index, row in enumerate(zip(*columns)):
        alike.setdefault(tuple(tensor.dtype for tensor in row), []).append(index)
    for rows in alike.values():
        table = _table(batch, rows)
        if table is None:  # memory that overlaps has an order of reads and writes to keep
            reference.run(batch.rows(rows))
            continue
        table.run(batch.rows(table.origins))
        others = sorted(set(rows) - set(table.origins))
        for part in batch.rows(others).pieces(CACHED):
            _run_through_buffers(part)


def _run_through_buffers(batch: Batch) -> None:
    """Steps tensors of unlike layouts: contiguous copies of a part, and back."""
    copies = {
        name: [x.resolve_neg().contiguous() for x in column]
        for name, column in batch.columns.items()
    }
    run(batch.with_columns(copies))
    for name in batch.graph.results:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)


class Table:
    """Rows of dense memory that one call steps: where their tensors are, and how long.

    Args:
        batch: the rows and others.
        origins: the numbers of those rows in the batch, which share their dtypes.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch, origins: list[int]) -> None:
        graph = batch.graph
        names = columns_of(graph)
        columns = [[batch.columns[name][i] for i in origins] for name in names]
        kernel = kernel_for(graph, tuple(column[0].dtype for column in columns), batch.dtype)
        if isinstance(kernel, str):
            dtypes = ", ".join(str(column[0].dtype) for column in columns)
            raise RuntimeError(f"there is no kernel for {dtypes}: {kernel}")
        self.kernel = kernel
        self.origins = origins
        self.sizes = np.array([p.numel() for p in columns[0]], dtype=np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])
        self.pointers = np.ascontiguousarray(np.stack([*map(_addresses, columns)], axis=1))
        self.occupied = self.sizes > 0
        self.gradient = names.index("g") if "g" in names else None
        self.numbers = np.empty((len(origins), len(graph.coefficients)), dtype=kernel.number)
        self.arguments = (
            len(origins),
            int(self.starts[-1]),
            self.starts.ctypes.data,
            self.pointers.ctypes.data,
            self.numbers.ctypes.data,
        )
        self.gradient_bytes = self.sizes * batch.columns["g"][origins[0]].element_size()
        self.written = [x for n in graph.results for x in columns[names.index(n)]]
        kept = [position for position in range(len(names)) if position != self.gradient]
        begins = self.pointers[:, kept].ravel()
        lengths = np.stack([self.sizes * columns[k][0].element_size() for k in kept], axis=1)
        filled = lengths.ravel() > 0
        order = np.argsort(begins[filled])
        self.begins = begins[filled][order]
        self.ends = (begins + lengths.ravel().astype(np.uint64))[filled][order]
        self._check_memory()

    def __len__(self) -> int:
        return len(self.origins)

    def run(self, batch: Batch) -> None:
        """Steps the rows with the gradients and coefficients of a batch of just these rows."""
        if self.gradient is not None:
            self.pointers[:, self.gradient] = _addresses(batch.columns["g"])
            self._check_memory()
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

    def overlaps(self) -> bool:
        """Whether memory that is written is also another tensor's of these rows."""
        if (self.ends[:-1] > self.begins[1:]).any():
            return True
        if self.gradient is None or not len(self.begins):
            return False
        begins = self.pointers[:, self.gradient]
        ends = begins + self.gradient_bytes.astype(np.uint64)
        # Parameters and states lie apart, so their ends are in order too.
        first = np.searchsorted(self.ends, begins, side="right")
        last = np.searchsorted(self.begins, ends, side="left")
        return bool((last > first).any())

    def _check_memory(self) -> None:
        if (self.pointers[self.occupied] == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")


def _table(batch: Batch, rows: list[int]) -> Table | None:
    """The dense ones of some rows as a table; None if memory overlaps or none is dense."""
    names = columns_of(batch.graph)
    dtypes = {tuple(batch.columns[name][i].dtype for name in names) for i in rows}
    dense = [i for i in rows if _is_dense([batch.columns[name][i] for name in names])]
    if len(dtypes) > 1 or not dense:
        return None
    table = Table(batch, dense)
    return None if table.overlaps() else table


def _addresses(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, len(tensors))


def _is_dense(row: list[torch.Tensor]) -> bool:
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

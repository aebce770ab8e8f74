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
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import CACHED, Batch
from stepforge.backends.native import build
from stepforge.backends.native.source import OPERATIONS, STORAGE, c_source, columns_of
from stepforge.expr import Graph

__all__ = ["OPERATIONS", "Kernel", "kernel_for", "name", "refuses", "run"]

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
        pool = build.thread_pool() if starts[-1] >= SERIAL and not _forked else None
        threads = torch.get_num_threads() if pool else 1
        parallel, thread = pool or (0, 0)
        self._run(
            len(starts) - 1,
            starts.ctypes.data,
            pointers.ctypes.data,
            numbers.ctypes.data,
            threads,
            thread,
            parallel,
        )


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
    return kernel if isinstance(kernel, str) else None


def run(batch: Batch) -> None:
    """Steps all rows in place, one call for those that share their dtypes."""
    columns = columns_of(batch.graph)
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, row in enumerate(zip(*(batch.columns[column] for column in columns))):
        alike.setdefault(tuple(tensor.dtype for tensor in row), []).append(index)
    for dtypes, rows in alike.items():
        kernel = kernel_for(batch.graph, dtypes, batch.dtype)
        if isinstance(kernel, str):
            raise RuntimeError(f"no kernel for {', '.join(map(str, dtypes))}: {kernel}")
        dense = [i for i in rows if _is_dense([batch.columns[c][i] for c in columns])]
        _run_dense(kernel, batch, dense)
        others = sorted(set(rows) - set(dense))
        for part in batch.rows(others).pieces(CACHED):
            _run_through_buffers(kernel, part)
    written = [t for c in batch.graph.results for t in batch.columns[c]]
    torch.autograd.graph.increment_version(written)


def _run_dense(kernel: Kernel, batch: Batch, rows: list[int]) -> None:
    if not rows:
        return
    table = [[batch.columns[column][i] for column in kernel.columns] for i in rows]
    pointers = np.array([[t.data_ptr() for t in row] for row in table], dtype=np.uint64)
    sizes = np.array([row[0].numel() for row in table], dtype=np.int64)
    if not (pointers[sizes > 0] != 0).all():
        raise RuntimeError("a tensor has no memory (its data pointer is null)")
    numbers = np.empty((len(rows), len(batch.coefficients)), dtype=kernel.number)
    for position, values in enumerate(batch.coefficients):
        assert isinstance(values, np.ndarray)
        numbers[:, position] = values[rows]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    kernel(starts, pointers, numbers)


def _run_through_buffers(kernel: Kernel, batch: Batch) -> None:
    """The same for tensors of unlike layouts: contiguous copies of a part, and back."""
    copies = {
        name: [x.resolve_neg().contiguous() if name in kernel.columns else x for x in column]
        for name, column in batch.columns.items()
    }
    _run_dense(kernel, batch.with_columns(copies), list(range(len(batch))))
    for name in batch.graph.results:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)


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

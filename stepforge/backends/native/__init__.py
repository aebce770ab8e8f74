"""The native backend: a graph compiled to C, one call for all tensors, on all threads.

Serves tensors on a CPU whose memory is dense: a row's tensors are read and written in memory order,
which is the same for all of them. A row whose tensors differ in layout goes through small
contiguous buffers, a part at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepforge.backends import reference
from stepforge.backends.batch import CACHED, Batch, arithmetic
from stepforge.backends.memory import overlaps, stored_dtypes, unreadable
from stepforge.backends.native.expressions import OPERATIONS
from stepforge.backends.native.kernel import SERIAL, Kernel, kernel_for
from stepforge.backends.native.source import Record
from stepforge.backends.native.storage import NUMBERS
from stepforge.backends.native.table import Table
from stepforge.expr import Graph
from stepforge.formats import Format, Storage

__all__ = [
    "OPERATIONS",
    "SERIAL",
    "Kernel",
    "Table",
    "asynchronous",
    "kernel_for",
    "name",
    "prepare",
    "refuses",
    "run",
]

name = "native"
asynchronous = False


def refuses(
    p: torch.Tensor,
    g: torch.Tensor | None,
    group: Mapping[str, Any],
    graph: Graph,
    storage: Storage,
) -> str | None:
    """Why this backend cannot serve a parameter, or None if it can."""
    if group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    if p.device.type != "cpu":
        return f"it runs on a CPU, not on {p.device.type}"
    why_not = unreadable(p, g, NUMBERS)
    if why_not:
        return why_not
    dtype, gradient = stored_dtypes(p, g)
    names = Record.of(graph, storage.formats).tensors
    dtypes = tuple(gradient if name == "g" else storage.real_dtype(name) for name in names)
    kernel = kernel_for(graph, dtypes, arithmetic(dtype), storage.formats)
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
    names = Record.of(batch.graph, batch.formats).tensors
    rows = list(zip(*(batch.columns[name] for name in names)))
    dtypes, *others = {tuple(x.dtype for x in row) for row in rows}
    if others or not all(_is_dense(row, batch.formats) for row in rows):
        return None
    if isinstance(kernel_for(batch.graph, dtypes, batch.dtype, batch.formats), str):
        return None
    table = Table(batch)
    return None if table.overlaps() else table


def run(batch: Batch) -> None:
    """Steps all rows in place, one call for those that share their dtypes."""
    if isinstance(batch.prepared, Table):
        batch.prepared.run(batch)
        return
    if overlaps(batch):
        reference.run(batch)  # which has an order of reads and writes
        return
    names = Record.of(batch.graph, batch.formats).tensors
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    dense = set()
    for index, row in enumerate(zip(*(batch.columns[name] for name in names))):
        alike.setdefault(tuple(tensor.dtype for tensor in row), []).append(index)
        if _is_dense(row, batch.formats):
            dense.add(index)
    for dtypes, rows in alike.items():
        kernel = kernel_for(batch.graph, dtypes, batch.dtype, batch.formats)
        if isinstance(kernel, str):  # states of another dtype: `refuses` knows of none
            _warn_once(kernel)
            reference.run(batch.rows(rows))
            continue
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
    for name in batch.written:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)


def _is_dense(row: Sequence[torch.Tensor], formats: Mapping[str, Format]) -> bool:
    """Whether all tensors of a row have their elements in one order and without gaps.

    Blocks and random bits follow the index of an element, which is its order in memory only where
    all are contiguous.
    """
    first = row[0]
    if any(tensor.is_neg() for tensor in row):  # the memory holds what it is not
        return False
    if all(tensor.is_contiguous() for tensor in row):
        return True
    strides = first.stride()
    return (
        not formats and all(tensor.stride() == strides for tensor in row) and _without_gaps(first)
    )


def _without_gaps(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

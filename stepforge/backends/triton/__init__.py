"""The Triton backend: a graph compiled for a GPU, one launch for all tensors of the same dtypes.

Serves CUDA and ROCm devices, and Intel's where Triton does. With ``TRITON_INTERPRET=1`` and
``STEPFORGE_BACKEND=triton`` it serves a CPU too, slowly: the same kernels run in Python there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepforge.backends import reference
from stepforge.backends.batch import Batch, arithmetic
from stepforge.backends.native.source import columns_of
from stepforge.backends.native.table import overlaps
from stepforge.backends.triton.kernel import is_interpreted, kernel_for
from stepforge.backends.triton.source import OPERATIONS, STORAGE
from stepforge.backends.triton.strides import dimensions, may_overlap
from stepforge.backends.triton.table import Table
from stepforge.expr import Graph

__all__ = ["OPERATIONS", "Tables", "asynchronous", "name", "prepare", "refuses", "run"]

name = "triton"
asynchronous = True

#: The types of the devices that Triton compiles for.
_DEVICES = ("cuda", "xpu")


def refuses(
    p: torch.Tensor, g: torch.Tensor | None, group: Mapping[str, Any], graph: Graph
) -> str | None:
    """Why this backend cannot serve a parameter, or None if it can."""
    interpreted = is_interpreted() and os.environ.get("STEPFORGE_BACKEND") == name
    if p.device.type not in _DEVICES and not (interpreted and p.device.type == "cpu"):
        return f"it runs on a GPU, not on {p.device.type}"
    if not _is_installed():
        return "Triton is not installed: pip install triton"
    if group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    given = p if g is None else g
    for tensor in (p, given):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a {type(tensor).__name__} may have no memory of its own"
    if given.is_sparse:
        return "its gradient is sparse"
    dtype, gradient = (x.dtype.to_real() if x.is_complex() else x.dtype for x in (p, given))
    for stored in (dtype, gradient):
        if stored not in STORAGE:
            return f"it does not store {stored}"
    dtypes = tuple(gradient if column == "g" else dtype for column in columns_of(graph))
    kernel = kernel_for(graph, dtypes, arithmetic(dtype))
    return kernel if isinstance(kernel, str) else None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Tables:
    """The rows of a batch, in a table for each launch.

    Args:
        batch: the rows; they may be aimed at other gradients, and run with other coefficients.

    Raises:
        RuntimeError: there is no kernel for some of them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        names = columns_of(batch.graph)
        alike: dict[Any, list[int]] = {}
        for index, row in enumerate(zip(*(batch.columns[name] for name in names))):
            kind = (tuple(x.dtype for x in row), _is_dense(row))
            alike.setdefault(kind, []).append(index)
        self.tables = [
            (indices, Table(batch.rows(indices), dense=dense))
            for (_, dense), indices in alike.items()
        ]

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes other gradients of the same layouts.

        Raises:
            RuntimeError: one has no memory.
        """
        for indices, table in self.tables:
            table.aim([gradients[index] for index in indices])

    def run(self, batch: Batch) -> None:
        """Steps the rows with the coefficients of a batch of just these rows."""
        for indices, table in self.tables:
            table.run(batch.rows(indices) if len(self.tables) > 1 else batch)


def prepare(batch: Batch) -> Tables | None:
    """The tables of a batch, to be kept while its tensors stay; None if it needs another way."""
    return None if _needs_order(batch) else Tables(batch)


def run(batch: Batch) -> None:
    """Steps all rows in place, one launch for those that share their dtypes."""
    if isinstance(batch.prepared, Tables) and not overlaps(batch):
        batch.prepared.run(batch)
    elif _needs_order(batch):
        reference.run(batch)  # which has an order of reads and writes
    else:
        Tables(batch).run(batch)


def _needs_order(batch: Batch) -> bool:
    """Whether tensors share memory that is written, or stand for the negative of what it holds."""
    kept = [x for name in batch.graph.results for x in batch.columns[name]]
    tensors = [x for column in batch.columns.values() for x in column]
    return overlaps(batch) or any(map(may_overlap, kept)) or any(x.is_neg() for x in tensors)


def _is_dense(row: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors of a row have their elements in one order without gaps."""
    return not row[0].numel() or all(x.is_contiguous() for x in row) or not dimensions(row)

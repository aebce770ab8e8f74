"""The native backend: a graph compiled to C, one call for all parameters, on all threads.

It serves CPU tensors whose memory is dense: a parameter's tensors are read and written in memory
order, which is the same for all of them. Tensors of unlike layouts go through small contiguous
buffers, chunk by chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stepforge.backends import reference
from stepforge.backends.aliasing import is_aliased
from stepforge.backends.batch import CHUNK_ELEMENTS, Batch, KernelTable, Scalars, Seeds
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.expressions import OPERATIONS
from stepforge.backends.native.kernel import PARALLEL_MIN, Kernel, kernel_for
from stepforge.backends.native.reduction import ReductionTable
from stepforge.backends.native.table import Table
from stepforge.backends.reduction import (
    PassTable,
    Totals,
    in_one_order,
    totals_by_torch,
    totals_of,
)
from stepforge.backends.spec import KernelSpec, ParamSpec, memory_problem

__all__ = [
    "OPERATIONS",
    "PARALLEL_MIN",
    "Kernel",
    "Table",
    "device_scalars",
    "kernel_for",
    "name",
    "prepare",
    "prepare_pass",
    "reduce",
    "run",
    "uniform_kernel",
    "unsupported_reason",
]

name = "native"
device_scalars = False


def unsupported_reason(param: ParamSpec) -> str | None:
    """Say why this backend cannot step a parameter; None if it can."""
    if param.group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    if param.p.device.type != "cpu":
        return f"it runs on a CPU, not on {param.p.device.type}"
    problem = memory_problem(param, STORABLE)
    if problem:
        return problem
    kernel = kernel_for(param.kernel)
    if isinstance(kernel, str):
        if not param.group["fused"]:
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
    """Return the table of a batch that one call can step; None for any other batch."""
    if not all(_dense(batch)) or isinstance(kernel_for(batch.spec), str):
        return None
    table = Table(batch)
    return None if table.aliasing.found() else table


def uniform_kernel(spec: KernelSpec, scalars: Mapping[str, Scalars], seeds: Seeds | None) -> None:
    """Return None: it runs on a CPU."""


def prepare_pass(batch: Batch) -> ReductionTable | None:
    """Return the table of a batch whose tensors all are dense; None for any other batch."""
    if batch.spec.formats or not all(_dense(batch)):
        return None
    return None if isinstance(kernel_for(batch.spec), str) else ReductionTable(batch)


def reduce(
    batch: Batch, table: PassTable | None = None, grad_scale: GradScale | None = None
) -> Totals:
    """Return the reductions of a pass."""
    if isinstance(table, ReductionTable):
        return table.run(batch, grad_scale)
    if batch.spec.formats:
        return totals_by_torch(batch, grad_scale)
    kernel = kernel_for(batch.spec)
    if isinstance(kernel, str):
        _warn_once(kernel)
        return totals_by_torch(batch, grad_scale)
    dense = _dense(batch)
    columns = {
        name: [
            x if is_dense else x.resolve_neg().contiguous() for x, is_dense in zip(column, dense)
        ]
        for name, column in batch.columns.items()
        if name in batch.spec.tensors
    }
    part = replace(batch, columns={"p": batch.columns["p"], **columns})
    return ReductionTable(part).run(part, grad_scale)


def run(
    batch: Batch, table: KernelTable | None = None, grad_scale: GradScale | None = None
) -> Totals | None:
    """Step all parameters in place."""
    if isinstance(table, Table):
        return table.run(batch, grad_scale)
    kernel = kernel_for(batch.spec)
    if isinstance(kernel, str):  # states of another dtype than the layout's
        _warn_once(kernel)
    if is_aliased(batch) or isinstance(kernel, str):
        # The reference reads and writes in a defined order, and needs no compiler.
        return reference.run(batch, grad_scale=grad_scale)
    rows = np.empty((len(batch), kernel.reductions))
    dense = _dense(batch)
    together = [index for index, is_dense in enumerate(dense) if is_dense]
    if together:
        part = batch.select(together)
        _enter(rows, together, Table(part).run(part, grad_scale))
    others = [index for index, is_dense in enumerate(dense) if not is_dense]
    if kernel.reductions:  # their order is that of whole parameters
        for index in others:
            _enter(rows, [index], _run_through_buffers(batch.select([index]), grad_scale))
        return totals_of(batch.spec.graph, torch.from_numpy(rows))
    for chunk in batch.select(others).chunks(CHUNK_ELEMENTS):
        _run_through_buffers(chunk, grad_scale)
    return None


def _enter(rows: np.ndarray[Any, Any], indices: list[int], totals: Totals | None) -> None:
    """Enter the reductions of some parameters, if there are any, into those of all."""
    if totals is not None:
        rows[indices] = totals[:-1]


def _run_through_buffers(batch: Batch, grad_scale: GradScale | None) -> Totals | None:
    """Step tensors of unlike layouts: make contiguous copies, step those, and copy back."""
    copies = {
        name: [x.resolve_neg().contiguous() for x in column]
        for name, column in batch.columns.items()
    }
    part = batch.with_columns(copies)
    totals = Table(part).run(part, grad_scale)
    for name in batch.spec.written:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)
    return totals


def _dense(batch: Batch) -> list[bool]:
    """Return, for each parameter, True if all its tensors are dense in the same order."""
    rows = zip(*(batch.columns[name] for name in batch.spec.tensors))
    is_flat = bool(batch.spec.formats)
    return [in_one_order(row, is_flat=is_flat) for row in rows]

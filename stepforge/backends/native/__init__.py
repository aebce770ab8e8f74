"""The native backend: a graph compiled to C, one call for all parameters, on all threads.

It serves CPU tensors whose memory is dense: a parameter's tensors are read and written in memory
order, which is the same for all of them. Tensors of unlike layouts go through small contiguous
buffers, chunk by chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from stepforge.backends import reference
from stepforge.backends.aliasing import is_aliased
from stepforge.backends.batch import CHUNK_ELEMENTS, Batch, KernelTable, Scalars, Seeds
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.expressions import OPERATIONS
from stepforge.backends.native.kernel import PARALLEL_MIN, Kernel, kernel_for
from stepforge.backends.native.table import Table
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


def run(
    batch: Batch, table: KernelTable | None = None, grad_scale: GradScale | None = None
) -> None:
    """Step all parameters in place."""
    if isinstance(table, Table):
        table.run(batch, grad_scale)
        return
    kernel = kernel_for(batch.spec)
    if isinstance(kernel, str):  # states of another dtype than the layout's
        _warn_once(kernel)
    if is_aliased(batch) or isinstance(kernel, str):
        # The reference reads and writes in a defined order, and needs no compiler.
        reference.run(batch, grad_scale=grad_scale)
        return
    dense = _dense(batch)
    together = [index for index, is_dense in enumerate(dense) if is_dense]
    if together:
        part = batch.select(together)
        Table(part).run(part, grad_scale)
    others = batch.select([index for index, is_dense in enumerate(dense) if not is_dense])
    for chunk in others.chunks(CHUNK_ELEMENTS):
        _run_through_buffers(chunk, grad_scale)


def _run_through_buffers(batch: Batch, grad_scale: GradScale | None) -> None:
    """Step tensors of unlike layouts: make contiguous copies, step those, and copy back."""
    copies = {
        name: [x.resolve_neg().contiguous() for x in column]
        for name, column in batch.columns.items()
    }
    part = batch.with_columns(copies)
    Table(part).run(part, grad_scale)
    for name in batch.spec.written:
        for tensor, copy in zip(batch.columns[name], copies[name]):
            if copy is not tensor:
                tensor.copy_(copy)


def _dense(batch: Batch) -> list[bool]:
    """Return, for each parameter, True if all its tensors are dense in the same order."""
    rows = zip(*(batch.columns[name] for name in batch.spec.tensors))
    in_order = bool(batch.spec.formats)
    return [_is_dense(row, in_order=in_order) for row in rows]


def _is_dense(row: Sequence[torch.Tensor], *, in_order: bool) -> bool:
    """Return True if all tensors have their elements in one order and without gaps.

    Args:
        row: the tensors of a parameter.
        in_order: True if it must be the order of a contiguous tensor. Blocks and random bits follow
            the flat index, which is the order in memory only of contiguous tensors.
    """
    first = row[0]
    if any(tensor.is_neg() for tensor in row):  # the memory holds the negated values
        return False
    if all(tensor.is_contiguous() for tensor in row):
        return True
    strides = first.stride()
    return not in_order and all(tensor.stride() == strides for tensor in row) and _is_gapless(first)


def _is_gapless(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

"""The Triton backend: a graph compiled for a GPU, one launch for all parameters.

It serves CUDA and ROCm devices, and Intel's where Triton does. With ``TRITON_INTERPRET=1`` and
``STEPFORGE_BACKEND=triton`` it serves a CPU too, slowly: the same kernels then run in Python.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stepforge.backends import reference
from stepforge.backends.aliasing import Aliasing, increment_versions, is_aliased
from stepforge.backends.batch import Batch, Gradients, KernelTable, Scalars, Seeds
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import (
    PassTable,
    Totals,
    as_totals,
    totals_at_rest,
    totals_by_torch,
)
from stepforge.backends.spec import KernelSpec, ParamSpec, memory_problem
from stepforge.backends.triton import reduction
from stepforge.backends.triton.dtypes import STORABLE
from stepforge.backends.triton.expressions import OPERATIONS
from stepforge.backends.triton.kernel import is_interpreted, kernel_for
from stepforge.backends.triton.rounds import Rounds, numbers_of_blocks
from stepforge.backends.triton.strides import dimensions, may_overlap
from stepforge.backends.triton.table import Table
from stepforge.backends.triton.uniform import UniformKernel
from stepforge.backends.triton.variant import begins_rows_with_words

__all__ = [
    "OPERATIONS",
    "Tables",
    "device_scalars",
    "name",
    "prepare",
    "prepare_pass",
    "reduce",
    "run",
    "uniform_kernel",
    "unsupported_reason",
]

name = "triton"
device_scalars = True

#: The types of the devices that Triton compiles for.
_DEVICES = ("cuda", "xpu")
#: The lowest compute capability of NVIDIA's devices that it compiles for.
_CAPABILITY = (7, 0)


def unsupported_reason(param: ParamSpec) -> str | None:
    """Say why this backend cannot step a parameter; None if it can."""
    why_not = _device_problem(param.p.device)
    if not (why_not or is_interpreted()):
        why_not = _driver_problem() or _capability_problem(param.p.device)
    if why_not:
        return why_not
    if param.group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    problem = memory_problem(param, STORABLE)
    if problem:
        return problem
    kernel = kernel_for(param.kernel)
    return kernel if isinstance(kernel, str) else None


def _device_problem(device: torch.device) -> str | None:
    if device.type in _DEVICES:
        if is_interpreted():
            return "TRITON_INTERPRET has kernels run in Python, which cannot read a GPU's memory"
    elif not (is_interpreted() and os.environ.get("STEPFORGE_BACKEND") == name):
        return f"it runs on a GPU, not on {device.type}"
    elif device.type != "cpu":
        return f"TRITON_INTERPRET has kernels run on a CPU, not on {device.type}"
    return None if _is_installed() else "Triton is not installed: pip install triton"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _driver_problem() -> str | None:
    """Say why an installed Triton can launch nothing here; None if it can."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # of any kind: it calls compilers and loads libraries
        return f"Triton does not work here: {(str(error).splitlines() or [''])[0]}"
    return None


@functools.cache
def _capability_problem(device: torch.device) -> str | None:
    """Say why Triton compiles nothing for an NVIDIA device; None if it does, or for AMD's."""
    if device.type != "cuda" or torch.version.hip:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= _CAPABILITY:
        return None
    major, minor = found
    return f"Triton needs compute capability {_CAPABILITY[0]}, and the device has {major}.{minor}"


class Tables:
    """The parameters of a batch, one table for each launch.

    Strided parameters have one of their own, as they take another kernel. So have those whose rows
    begin anywhere, if elements share scales: one of them would have all others moved in narrow
    words.

    Args:
        batch: the parameters. Other gradients may be bound later, and the tables run with other
            coefficients.

    Raises:
        RuntimeError: there is no kernel for some of them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        spec = batch.spec
        rows = zip(*(batch.columns[name] for name in spec.elements))
        members: dict[tuple[bool, bool], list[int]] = {}
        for index, row in enumerate(rows):
            is_dense = _is_dense(row, in_order=bool(spec.formats))
            is_wide = is_dense and begins_rows_with_words(spec, row[0].shape)
            members.setdefault((is_dense, is_wide), []).append(index)
        self.tables = [Table(batch, own, dense=is_dense) for (is_dense, _), own in members.items()]
        self.aliasing = Aliasing(batch)
        self._ops = [node.op for node in spec.graph.reductions]
        self._rounds = self._rounds_of(batch) if self._ops else None

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts.

        Raises:
            RuntimeError: one has no memory.
        """
        self.aliasing.bind_gradients(gradients)
        for table in self.tables:
            table.bind_gradients(self.aliasing.gradients)

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> Totals | None:
        """Step the parameters with the gradients that are bound.

        Args:
            batch: the same parameters and gradients, with the coefficients of this step.
            grad_scale: the scale of the gradients.

        Returns:
            The reductions of what is stored then; None if the graph has none.
        """
        if self._rounds is None:
            for table in self.tables:
                table.run(batch, grad_scale)
            increment_versions(batch)
            return None
        # A table's numbers are in memory of their own, which begins as any other memory does.
        parts = [numbers_of_blocks(len(self._ops), t.blocks, t.device) for t in self.tables]
        for table, partial in zip(self.tables, parts):
            table.run(batch, grad_scale, partial)
        increment_versions(batch)
        return as_totals(self._rounds.run(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]))

    def _rounds_of(self, batch: Batch) -> Rounds:
        """Return the rounds that combine the numbers of all tables, one table's after another's."""
        indices = np.concatenate([table.indices for table in self.tables])
        of_tables = np.concatenate([table.counts for table in self.tables])
        counts, first = np.zeros((2, len(batch)), np.int64)
        counts[indices] = of_tables
        first[indices] = np.cumsum(of_tables) - of_tables
        return Rounds(self._ops, counts, first, batch.device)

    def is_aliased(self) -> bool:
        """Return True if the memory of a parameter or state is also another tensor's."""
        return self.aliasing.found()


def prepare(batch: Batch) -> Tables | None:
    """Return the tables of a batch; None if no kernel can step its tensors."""
    return None if _needs_reference(batch) else Tables(batch)


def uniform_kernel(
    spec: KernelSpec, scalars: Mapping[str, Scalars], seeds: Seeds | None
) -> UniformKernel | None:
    """Return the kernel of a launch's uniform values; None if it cannot use the scalars."""
    return UniformKernel(spec, scalars, seeds) if UniformKernel.serves(scalars) else None


def prepare_pass(batch: Batch) -> reduction.PassTable | None:
    """Return the table of a batch whose tensors all are dense; None for any other batch."""
    return reduction.PassTable(batch) if reduction.serves(batch) else None


def reduce(
    batch: Batch, table: PassTable | None = None, grad_scale: GradScale | None = None
) -> Totals:
    """Return the reductions of a pass."""
    if isinstance(table, reduction.PassTable):
        return as_totals(table.run(batch, grad_scale))
    return totals_by_torch(batch, grad_scale)


def run(
    batch: Batch, table: KernelTable | None = None, grad_scale: GradScale | None = None
) -> Totals | None:
    """Step all parameters in place."""
    if isinstance(table, Tables) and not table.is_aliased():
        return table.run(batch, grad_scale)
    if _needs_reference(batch):
        return _run_reference(batch, grad_scale)
    return Tables(batch).run(batch, grad_scale)


def _run_reference(batch: Batch, grad_scale: GradScale | None) -> Totals | None:
    """Step all parameters by the reference, which reads and writes in a defined order.

    It computes with Python numbers, so it synchronizes the device of the gradient scale.
    """
    scale = grad_scale and grad_scale.read()
    if scale and scale.found_inf:
        return totals_at_rest(batch, scale)
    return reference.run(batch, grad_scale=scale)


def _needs_reference(batch: Batch) -> bool:
    """Return True if the memory of a tensor is not its values, laid out as a kernel expects.

    Written memory is shared, or holds negated values, or scales are not contiguous.
    """
    spec = batch.spec
    written = [x for name in spec.written for x in batch.columns[name]]
    tensors = [x for column in batch.columns.values() for x in column]
    scales = [x for name in spec.written if name not in spec.elements for x in batch.columns[name]]
    return (
        is_aliased(batch)
        or any(map(may_overlap, written))
        or any(x.is_neg() for x in tensors)
        or not all(x.is_contiguous() for x in scales)
    )


def _is_dense(row: Sequence[torch.Tensor], *, in_order: bool) -> bool:
    """Return True if all tensors of a parameter have their elements in one order without gaps.

    Args:
        row: the tensors.
        in_order: True if it must be the order of a contiguous tensor.
    """
    return (
        not row[0].numel()
        or all(x.is_contiguous() for x in row)
        or not dimensions(row, in_order=in_order)
    )

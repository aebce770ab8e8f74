"""The reference: a graph evaluated with torch operations, one parameter at a time.

It serves everything: differentiable steps, sparse gradients, any device and tensor subclass. The
other backends are held to its bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepforge.backends.batch import CHUNK_ELEMENTS, Batch, KernelTable, Scalars, Seeds
from stepforge.backends.exact import OPERATIONS, operations_in
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import (
    PassTable,
    Totals,
    reduce_stored,
    totals_by_torch,
    totals_of,
)
from stepforge.backends.spec import KernelSpec, ParamSpec
from stepforge.program import evaluate

__all__ = [
    "OPERATIONS",
    "device_scalars",
    "name",
    "prepare",
    "prepare_pass",
    "reduce",
    "run",
    "uniform_kernel",
    "unsupported_reason",
]

name = "reference"
device_scalars = False


def unsupported_reason(param: ParamSpec) -> str | None:
    """Return None: the reference supports every parameter."""
    return None


def prepare(batch: Batch) -> None:
    """Return None: the reference keeps nothing between steps."""


def uniform_kernel(spec: KernelSpec, scalars: Mapping[str, Scalars], seeds: Seeds | None) -> None:
    """Return None: it needs Python numbers."""


def prepare_pass(batch: Batch) -> None:
    """Return None: nothing is kept between passes."""


def reduce(
    batch: Batch, table: PassTable | None = None, grad_scale: GradScale | None = None
) -> Totals:
    """Return the reductions of a pass."""
    return totals_by_torch(batch, grad_scale)


def run(
    batch: Batch, table: KernelTable | None = None, grad_scale: GradScale | None = None
) -> Totals | None:
    """Step each parameter in place."""
    graph = batch.spec.graph
    # Reductions follow the order of whole parameters.
    whole = batch.differentiable or batch.device.type != "cpu" or graph.reductions
    rows = []
    for chunk in [batch] if whole else batch.chunks(CHUNK_ELEMENTS):
        chunk = chunk.unscaled(grad_scale)
        coefficients = chunk.coefficients_by_param()
        for index in range(len(chunk)):
            kept = _step_param(chunk, index, [column[index] for column in coefficients])
            if graph.reductions:
                rows.append(reduce_stored(chunk, index, kept))
    return totals_of(graph, torch.stack(rows)) if rows else None


def _step_param(batch: Batch, index: int, given: list[Any]) -> list[torch.Tensor]:
    """Step a parameter, and return what the measure of the graph is given."""
    program, arithmetic = batch.spec.graph.varying, batch.spec.arithmetic
    tensors = {name: column[index] for name, column in batch.columns.items()}
    sparse = tensors["g"].is_sparse
    if sparse:
        named = _named_elements(tensors)
        inputs = {name: named[name].to(arithmetic) for name in program.inputs}
    else:
        inputs = {name: batch.read(name, index) for name in program.inputs}
    if batch.differentiable:
        # Autograd keeps operands for the backward pass, and the step overwrites them.
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    operations = _operations(arithmetic, batch.differentiable)
    results = evaluate(program, inputs, given, operations)
    # Storing one result must not change another.
    results = [
        result.clone() if program.may_alias(register) else result
        for register, result in zip(program.outputs, results)
    ]
    for name, result in zip(batch.spec.graph.results, results):
        if sparse:
            tensors[name][_indices(tensors["g"])] = result.to(tensors[name].dtype)
        else:
            batch.store(name, index, result)
    return results[len(batch.spec.graph.results) :]


def _indices(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(g._indices())


def _named_elements(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the elements of a parameter's tensors that its sparse, coalesced gradient names."""
    where = _indices(tensors["g"])
    return {name: x._values() if name == "g" else x[where] for name, x in tensors.items()}


@functools.cache
def _operations(dtype: torch.dtype, differentiable: bool) -> dict[str, Callable[..., Any]]:
    """Return the operations in a dtype. Autograd cannot see a root through numpy."""
    operations = operations_in(dtype)
    return operations | {"sqrt": torch.sqrt} if differentiable else operations

"""Reductions: one number of a value of every element, with the same bits on every backend.

Sums in float64 depend on their order, so there is one order, whatever the number of threads. The
elements of a parameter are in blocks of 1,024, in the order of :func:`in_one_order`. A block is a
table of 16 parts x 4 rows x 16 lanes; what a last one lacks is zero. The rows of each part are
added up first, then the parts, then the lanes: always the second half to the first, until there is
one. A processor has the rows of a part in registers, and begins with the next part meanwhile. The
sums of the blocks are added in the same way, as often as there are several. So are the sums of
parameters, in the order of the optimizer, where a reduction is over all of them.

A GPU whose float64 is slow adds up a block in pairs of float32, in this order, too. Its sums differ
from those of others by 2**-44 at most: backends/triton/pairs.py.

A step whose states share scales goes through chunks of 128 elements, which restart at every row of
dimension 0. Its blocks are of eight such chunks, of which each row's last may be filled with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from stepforge.backends.batch import Batch, Gradients
from stepforge.backends.exact import operations_in
from stepforge.backends.grad_scale import GradScale
from stepforge.formats import BLOCK as CHUNK
from stepforge.program import NEW_P, Graph, evaluate

__all__ = [
    "BLOCK",
    "LANES",
    "ROWS",
    "PassTable",
    "Totals",
    "as_totals",
    "combined",
    "in_one_order",
    "reduce_by_torch",
    "reduce_stored",
    "totals_at_rest",
    "totals_by_torch",
    "totals_of",
]

#: The elements of a block, and the lanes and rows of its parts.
BLOCK, LANES, ROWS = 1024, 16, 4
#: The elements whose sum is one number after two rounds of blocks.
_CHUNK = BLOCK * BLOCK

#: Float64: the reductions of each parameter, and in a last row those of all, in their order. On the
#: device of the parameters; an array for a CPU, unless autograd must see them.
Totals: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"


class PassTable(Protocol):
    """The part of a batch that a backend keeps for further passes over the same parameters."""

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take the gradients of the next step."""


def reduce_by_torch(batch: Batch, grad_scale: GradScale | None = None) -> torch.Tensor:
    """Return the reductions of a pass, by torch's operations.

    Args:
        batch: the parameters, with the graph of the pass and its coefficients.
        grad_scale: the scale of the gradients.

    Returns:
        The reductions of each parameter, and in a last row those of all.
    """
    batch = batch.unscaled(grad_scale)
    coefficients = batch.coefficients_by_param()
    rows = [
        _reduce_param(batch, index, [column[index] for column in coefficients])
        for index in range(len(batch))
    ]
    return _with_those_of_all(batch.spec.graph, torch.stack(rows))


def reduce_stored(batch: Batch, index: int, kept: Sequence[Any]) -> torch.Tensor:
    """Return the reductions of a step for a parameter, once it is stored; by torch's operations.

    Args:
        batch: the parameters.
        index: the index of the parameter.
        kept: what the measure of the graph is given, of the shape of the parameter.
    """
    graph = batch.spec.graph
    operations = operations_in(batch.spec.arithmetic)
    operands = evaluate(graph.measure, {NEW_P: batch.read("p", index)}, kept, operations)
    return _reduced_in_step(batch, index, operands)


def totals_of(graph: Graph, rows: torch.Tensor) -> Totals:
    """Return the totals of reductions of parameters, as a backend does.

    Args:
        graph: the graph.
        rows: parameters x reductions.
    """
    return as_totals(_with_those_of_all(graph, rows))


def _with_those_of_all(graph: Graph, rows: torch.Tensor) -> torch.Tensor:
    """Return the reductions of parameters, and in a last row those of all."""
    of_all = [combined(node.op, x) for node, x in zip(graph.reductions, rows.unbind(1))]
    return torch.cat([rows, torch.stack(of_all)[None]])


def totals_by_torch(batch: Batch, grad_scale: GradScale | None = None) -> Totals:
    """Return :func:`reduce_by_torch` as a backend does: on a host in an array.

    Args:
        batch: the parameters, with the graph of the pass and its coefficients.
        grad_scale: the scale of the gradients.
    """
    return as_totals(reduce_by_torch(batch, grad_scale))


def as_totals(rows: torch.Tensor) -> Totals:
    """Return reductions as a backend does: on a host in an array, unless autograd sees them."""
    on_host = rows.device.type == "cpu" and not rows.requires_grad
    return rows.numpy() if on_host else rows


def totals_at_rest(batch: Batch, grad_scale: GradScale | None = None) -> Totals | None:
    """Return the reductions of a step that is skipped, as a backend does; None if it has none.

    They are in the order of the step.

    Args:
        batch: the parameters, with the graph of the step; its coefficients need not be known.
        grad_scale: the scale of the gradients.
    """
    graph = batch.spec.graph.at_rest
    if graph is None:
        return None
    batch = batch.unscaled(grad_scale)
    operations = operations_in(batch.spec.arithmetic)
    rows = []
    for index in range(len(batch)):
        inputs = {name: batch.read(name, index) for name in graph.varying.inputs}
        if batch.differentiable:
            # Autograd keeps operands for the backward pass, and later steps overwrite them.
            inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        kept = evaluate(graph.varying, inputs, (), operations)
        operands = evaluate(graph.measure, {}, kept, operations)
        rows.append(_reduced_in_step(batch, index, operands))
    return totals_of(graph, torch.stack(rows))


def combined(op: str, values: np.ndarray[Any, Any] | torch.Tensor) -> Any:
    """Return one number of several, in the order of this module.

    Args:
        op: the reduction.
        values: float64, one dimension; an array or a tensor.

    Example:
        >>> combined("total", torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).item()
        7.0
    """
    while True:
        values = _of_blocks(op, values)
        if len(values) == 1:
            return values[0] + 0.0  # no zero is -0


def _of_blocks(op: str, values: Any) -> Any:
    """Return one number for each block, of which there is one at least."""
    width = BLOCK if len(values) > BLOCK else 1 << max(0, len(values) - 1).bit_length()
    lanes = min(width, LANES)
    rows = min(width // lanes, ROWS)
    blocks = _filled(values, _neutral(op), width).reshape(-1, width // lanes // rows, rows, lanes)
    for axis in (2, 1, 3):
        while blocks.shape[axis] > 1:
            one, other = _halves(blocks, axis)
            blocks = _larger(one, other) if op == "largest" else one + other
    return blocks.reshape(-1)


def _halves(values: Any, axis: int) -> tuple[Any, Any]:
    """Return the first and the second half of an even number of slices."""
    half = values.shape[axis] // 2
    before = (slice(None),) * axis
    return values[(*before, slice(half))], values[(*before, slice(half, None))]


def _filled(values: Any, neutral: float, width: int) -> Any:
    """Return the values, and numbers that change no result up to a multiple of a width."""
    missing = -len(values) % width if len(values) else width
    if not missing:
        return values
    if isinstance(values, torch.Tensor):
        return torch.cat([values, values.new_full((missing,), neutral)])
    return np.concatenate([values, np.full(missing, neutral)])


def _larger(one: Any, other: Any) -> Any:
    return torch.maximum(one, other) if isinstance(one, torch.Tensor) else np.maximum(one, other)


def _reduce_param(batch: Batch, index: int, given: list[Any]) -> torch.Tensor:
    """Return the reductions of one parameter."""
    graph = batch.spec.graph
    columns = [_flat(batch, index, batch.read(x, index)) for x in graph.varying.inputs]
    if batch.differentiable:
        # Autograd keeps operands for the backward pass, and the step overwrites them.
        columns = [x.clone() for x in columns]
    operations = operations_in(batch.spec.arithmetic)
    parts = []
    for part in _chunks(columns):
        inputs = dict(zip(graph.varying.inputs, part))
        kept = evaluate(graph.varying, inputs, given, operations)
        parts.append(_reduced(graph, evaluate(graph.measure, {}, kept, operations)))
    columns = list(torch.stack(parts).unbind(1))
    return torch.stack([combined(node.op, x) for node, x in zip(graph.reductions, columns)])


def _reduced_in_step(batch: Batch, index: int, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the reductions of a parameter's operands, in the order of a step."""
    lines = batch.columns["p"][index].shape[0] if batch.spec.in_blocks else 1
    return _reduced(batch.spec.graph, [_flat(batch, index, x) for x in operands], lines)


def _reduced(graph: Graph, operands: Sequence[torch.Tensor], lines: int = 1) -> torch.Tensor:
    """Return the reductions of operands, each of one dimension.

    Args:
        graph: the graph.
        operands: the operand of each reduction.
        lines: the number of lines of which each is filled up to whole chunks.
    """
    found = []
    for node, operand in zip(graph.reductions, operands):
        wide = operand.to(torch.float64)
        wide = wide * wide if node.op == "squares" else wide
        if lines > 1:
            width = len(wide) // lines
            missing = (0, -width % CHUNK)
            wide = torch.nn.functional.pad(
                wide.view(lines, width), missing, value=_neutral(node.op)
            )
        found.append(combined(node.op, wide.reshape(-1)))
    return torch.stack(found)


def _neutral(op: str) -> float:
    """Return the number that changes no result of a reduction."""
    return -float("inf") if op == "largest" else 0.0


def _chunks(columns: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield parts of columns, each of as many whole blocks as two rounds make one number of."""
    for begin in range(0, max(1, len(columns[0])), _CHUNK):
        yield [x[begin : begin + _CHUNK] for x in columns]


def _flat(batch: Batch, index: int, values: torch.Tensor) -> torch.Tensor:
    """Return values of a parameter's elements in the order of the reduction."""
    if values.is_sparse:
        return values.coalesce()._values().reshape(-1)
    row = [
        column[index] for tensor, column in batch.columns.items() if tensor in batch.spec.tensors
    ]
    if in_one_order(row, is_flat=bool(batch.spec.formats)) and not row[0].is_contiguous():
        by_stride = sorted(range(values.dim()), key=row[0].stride, reverse=True)
        values = values.permute(by_stride)
    return values.reshape(-1)


def in_one_order(row: Sequence[torch.Tensor], *, is_flat: bool) -> bool:
    """Return True if all tensors have their elements in one order, and without gaps.

    A kernel steps them in that order. All others are stepped by the flat index of an element.

    Args:
        row: the tensors of a parameter.
        is_flat: True if it must be the order of a contiguous tensor. Blocks and random bits follow
            the flat index, which is the order in memory only of contiguous tensors.
    """
    first = row[0]
    if any(tensor.is_neg() for tensor in row):  # the memory holds the negated values
        return False
    if all(tensor.is_contiguous() for tensor in row):
        return True
    steps = _steps(first)
    return not is_flat and all(_steps(tensor) == steps for tensor in row) and _is_gapless(first)


def _steps(tensor: torch.Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def _is_gapless(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True

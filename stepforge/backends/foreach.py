"""The foreach backend: a graph evaluated by torch's operations on many parameters at a time.

On an accelerator each operation is one call of ``torch._foreach_*`` for all parameters, and one
launch. On a CPU, where such a call is a loop, plain parameters go through chunk.py.

No form that fuses a product into a sum (``alpha``, ``value``, ``addcmul``) is used: those round
once where the graph rounds twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from stepforge.backends import chunk, reference
from stepforge.backends.aliasing import Aliasing
from stepforge.backends.batch import CHUNK_ELEMENTS, Batch, KernelTable, Scalars, Seeds
from stepforge.backends.exact import choose, correct_sqrt, divide
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import (
    PassTable,
    Totals,
    reduce_stored,
    totals_by_torch,
    totals_of,
)
from stepforge.backends.spec import KernelSpec, ParamSpec
from stepforge.expr import UNIFORM_ONLY
from stepforge.ops import VOCABULARY
from stepforge.state.sharding import is_plain

name = "foreach"
device_scalars = False

Tensors: TypeAlias = list[torch.Tensor]
#: A uniform value: one number for all parameters, or a list with one per parameter.
Uniform: TypeAlias = "float | list[Any]"


def unsupported_reason(param: ParamSpec) -> str | None:
    """Say why this backend cannot step a parameter; None if it can."""
    if param.group["differentiable"]:
        return "autograd does not go through torch._foreach operations"
    if param.g is not None and param.g.is_sparse:
        return "its gradient is sparse"
    return None


def prepare(batch: Batch) -> Aliasing | None:
    """Return the check for shared memory; None if a tensor may have no memory."""
    tensors = itertools.chain.from_iterable(batch.columns.values())
    return Aliasing(batch) if all(map(is_plain, tensors)) else None


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
    """Step all parameters together, in place."""
    if isinstance(table, Aliasing) and table.found():
        # The reference reads and writes in a defined order.
        return reference.run(batch, grad_scale=grad_scale)
    if batch.spec.graph.reductions:
        # Their order is that of whole parameters.
        return _run_lists(batch.unscaled(grad_scale))
    if chunk.takes(batch):
        scratch = chunk.Scratch()
        for part in batch.by_coefficients():
            for each in part.chunks(chunk.ELEMENTS):
                chunk.run(each.unscaled(grad_scale), scratch, in_place=table is not None)
    else:
        for each in batch.chunks(CHUNK_ELEMENTS) if batch.device.type == "cpu" else [batch]:
            _run_lists(each.unscaled(grad_scale))
    return None


def _run_lists(batch: Batch) -> Totals | None:
    graph = batch.spec.graph
    columns = {name: batch.read_all(name) for name in graph.varying.inputs}
    results = _evaluate(batch.spec, columns, batch.coefficients_by_param())
    for name, result in zip(graph.results, results):
        batch.store_all(name, result)
    if not graph.reductions:
        return None
    kept = zip(*results[len(graph.results) :])
    rows = [reduce_stored(batch, index, each) for index, each in enumerate(kept)]
    return totals_of(graph, torch.stack(rows))


def _evaluate(
    spec: KernelSpec, columns: dict[str, Tensors], coefficients: list[list[Any]]
) -> list[Tensors]:
    """Evaluate the varying program on lists of tensors; no result aliases another or an input."""
    program = spec.graph.varying
    registers = program.registers(columns, coefficients)
    owned: set[int] = set()  # registers whose tensors nothing else refers to: free to overwrite
    for instruction in program.instructions:
        op, first = instruction.op, instruction.args[0]
        args = [registers[register] for register in instruction.args]
        reusable = first in owned and first in instruction.last
        if op in IN_PLACE and reusable and first not in instruction.args[1:]:
            IN_PLACE[op](*args)
            registers[instruction.out] = args[0]
        elif op == "where":
            condition, x, y = args
            registers[instruction.out] = _where(condition, x, y, spec.arithmetic)
        else:
            registers[instruction.out] = list(OPERATIONS[op](*args))
        if program.may_alias(instruction.out):
            owned.difference_update(instruction.args)
        else:
            owned.add(instruction.out)
        for register in instruction.last:
            registers[register] = None
    # Storing one result must not change another.
    return [
        [x.clone() for x in registers[register]]
        if program.may_alias(register)
        else registers[register]
        for register in program.outputs
    ]


def _is_list_of_tensors(x: Any) -> bool:
    return isinstance(x, list) and isinstance(x[0], torch.Tensor)


def _sub(x: Any, y: Any) -> Sequence[torch.Tensor]:
    if _is_list_of_tensors(x):
        return torch._foreach_sub(x, y)
    difference = torch._foreach_neg(y)  # x - y is -y + x, also where that is a zero
    torch._foreach_add_(difference, x)
    return difference


def _div(x: Any, y: Tensors) -> Sequence[torch.Tensor]:
    if _is_list_of_tensors(x):
        return torch._foreach_div(x, y)
    return [divide(*pair) for pair in zip(_per_param(x, y), y, strict=True)]


def _sqrt(x: Tensors) -> Sequence[torch.Tensor]:
    if x[0].device.type == "cpu":
        return [correct_sqrt(each) for each in x]
    return torch._foreach_sqrt(x)


def _with_positive_zeros(
    function: Callable[..., tuple[torch.Tensor, ...]],
) -> Callable[..., Sequence[torch.Tensor]]:
    """Return +0 for any zero: torch's choice between 0 and -0 depends on the length."""

    def on_lists(x: Tensors, y: Any) -> Sequence[torch.Tensor]:
        chosen = function(x, y)
        torch._foreach_add_(chosen, 0.0)
        return chosen

    return on_lists


def _finite(x: Tensors) -> Sequence[torch.Tensor]:
    largest = torch.finfo(x[0].dtype).max
    clamped = torch._foreach_clamp_max(x, largest)
    torch._foreach_clamp_min_(clamped, -largest)
    return clamped


def _where(condition: list[Any], x: Any, y: Any, dtype: torch.dtype = torch.float32) -> Tensors:
    like = next(operand for operand in (x, y, condition) if _is_list_of_tensors(operand))
    rows = zip(condition, _per_param(x, like), _per_param(y, like), like, strict=True)
    return [choose(*row, dtype) for row in rows]


def _per_param(x: Uniform | Tensors, like: Tensors) -> list[Any]:
    return x if isinstance(x, list) else [x] * len(like)


def _one_by_one(function: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    def on_lists(*operands: Any) -> Tensors:
        like = next(x for x in operands if isinstance(x, list))
        rows = zip(*(_per_param(x, like) for x in operands), strict=True)
        return [function(*row) for row in rows]

    return on_lists


#: The function of lists for each operation of the vocabulary.
OPERATIONS: dict[str, Callable[..., Any]] = {
    # One parameter after the other, for operations that torch has no list form of.
    **{op: _one_by_one(VOCABULARY[op]) for op in VOCABULARY.keys() - UNIFORM_ONLY},
    "add": torch._foreach_add,
    "sub": _sub,
    "mul": torch._foreach_mul,
    "div": _div,
    "neg": torch._foreach_neg,
    "abs": torch._foreach_abs,
    "sqrt": _sqrt,
    "sign": torch._foreach_sign,
    "maximum": _with_positive_zeros(torch._foreach_maximum),
    "minimum": _with_positive_zeros(torch._foreach_minimum),
    "finite": _finite,
    "where": _where,
}

#: The operations that can overwrite their first operand when nothing reads it again.
IN_PLACE: dict[str, Callable[..., None]] = {
    "add": torch._foreach_add_,
    "sub": torch._foreach_sub_,
    "mul": torch._foreach_mul_,
    "div": torch._foreach_div_,
    "neg": torch._foreach_neg_,
    "abs": torch._foreach_abs_,
    "sign": torch._foreach_sign_,
}

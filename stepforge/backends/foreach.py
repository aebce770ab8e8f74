"""The foreach backend: a graph evaluated on lists of tensors through ``torch._foreach_*``.

One call for each operation and all parameters together, which on an accelerator is one launch.
No form that fuses a product into a sum (``alpha``, ``value``, ``addcmul``) is used, as those round
once where the graph rounds twice.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from stepforge.backends import reference
from stepforge.backends.batch import CACHED, Batch
from stepforge.backends.exact import choose, correct_sqrt, divide
from stepforge.backends.memory import Aliasing
from stepforge.expr import WORDS, Graph
from stepforge.formats import Storage
from stepforge.ops import VOCABULARY
from stepforge.sharding import is_plain

name = "foreach"
asynchronous = False

Tensors: TypeAlias = list[torch.Tensor]
#: What stands for a uniform value: one number for all rows, or a list with one for each row.
Uniform: TypeAlias = "float | list[Any]"


def refuses(
    p: torch.Tensor,
    g: torch.Tensor | None,
    group: Mapping[str, Any],
    graph: Graph,
    storage: Storage,
) -> str | None:
    """Why this backend cannot serve a parameter, or None if it can."""
    if group["differentiable"]:
        return "autograd does not go through torch._foreach operations"
    if g is not None and g.is_sparse:
        return "its gradient is sparse"
    return None


def prepare(batch: Batch) -> Aliasing | None:
    """What finds shared memory in every step; None for tensors that may have no memory."""
    tensors = itertools.chain.from_iterable(batch.columns.values())
    return Aliasing(batch) if all(map(is_plain, tensors)) else None


def run(batch: Batch) -> None:
    """Computes all rows together and stores their results."""
    if isinstance(batch.prepared, Aliasing) and batch.prepared.found():
        reference.run(batch)  # which has an order of reads and writes
        return
    on_cpu = batch.columns["p"][0].device.type == "cpu"
    for part in batch.pieces(CACHED) if on_cpu else [batch]:
        _run_part(part.unscaled())


def _run_part(batch: Batch) -> None:
    program = batch.graph.varying
    rows = range(len(batch))
    columns = {name: [batch.read(name, row) for row in rows] for name in program.inputs}
    registers = program.registers(columns, batch.numbers())
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
            registers[instruction.out] = _where(condition, x, y, batch.dtype)
        else:
            registers[instruction.out] = list(OPERATIONS[op](*args))
        if program.may_alias(instruction.out):
            owned.difference_update(instruction.args)
        else:
            owned.add(instruction.out)
        for register in instruction.last:
            registers[register] = None
    # No result may change because another is stored first.
    results = [
        [x.clone() for x in registers[register]]
        if program.may_alias(register)
        else registers[register]
        for register in program.outputs
    ]
    for name, result in zip(batch.graph.results, results):
        if name in batch.formats:
            for row in rows:
                batch.store(name, row, result[row])
        elif any(x.is_neg() for x in batch.columns[name]):  # which _foreach_copy_ does not take
            for x, value in zip(batch.columns[name], result):
                x.copy_(value)
        else:
            torch._foreach_copy_(batch.columns[name], result)


def _is_list_of_tensors(x: Any) -> bool:
    return isinstance(x, list) and isinstance(x[0], torch.Tensor)


def _sub(x: Any, y: Any) -> Sequence[torch.Tensor]:
    if _is_list_of_tensors(x):
        return torch._foreach_sub(x, y)
    difference = torch._foreach_sub(y, x)  # y - x is -(x - y), exactly
    torch._foreach_neg_(difference)
    return difference


def _div(x: Any, y: Tensors) -> Sequence[torch.Tensor]:
    if _is_list_of_tensors(x):
        return torch._foreach_div(x, y)
    return [divide(*pair) for pair in zip(_for_each_row(x, y), y, strict=True)]


def _sqrt(x: Tensors) -> Sequence[torch.Tensor]:
    if x[0].device.type == "cpu":
        return [correct_sqrt(row) for row in x]
    return torch._foreach_sqrt(x)


def _with_positive_zeros(
    function: Callable[..., tuple[torch.Tensor, ...]],
) -> Callable[..., Sequence[torch.Tensor]]:
    """As the vocabulary has it: torch's choice between 0 and -0 depends on the length."""

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
    rows = zip(condition, _for_each_row(x, like), _for_each_row(y, like), like, strict=True)
    return [choose(*row, dtype) for row in rows]


def _for_each_row(x: Uniform | Tensors, like: Tensors) -> list[Any]:
    return x if isinstance(x, list) else [x] * len(like)


def _row_by_row(function: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    def on_lists(*operands: Any) -> Tensors:
        like = next(x for x in operands if isinstance(x, list))
        rows = zip(*(_for_each_row(x, like) for x in operands), strict=True)
        return [function(*row) for row in rows]

    return on_lists


#: What each operation of the vocabulary does here.
OPERATIONS: dict[str, Callable[..., Any]] = {
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
    "lt": _row_by_row(operator.lt),
    "le": _row_by_row(operator.le),
    "eq": _row_by_row(operator.eq),
    "ne": _row_by_row(operator.ne),
    **{op: _row_by_row(VOCABULARY[op]) for op in (*WORDS, "from_bits", "number")},
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

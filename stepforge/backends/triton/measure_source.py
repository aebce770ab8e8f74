"""The part of a step's Triton source that makes reductions of what the step stores.

A step that is skipped on the device stores nothing, but what is stored then is reduced all the
same. Its operands are those of a step that changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepforge.backends.triton.expressions import commented, function
from stepforge.backends.triton.reduction_source import (
    in_pairs,
    operand_of,
    reduction_functions,
    way,
)
from stepforge.backends.triton.variant import Target
from stepforge.program import NEW_P, Graph, Program

__all__ = ["kept_names", "measure_functions", "measure_helpers", "measure_lines", "read_at_rest"]


# Integers add up to a count in any order.
_COUNT = '''\
@triton.jit
def count_of(x):
    """The elements of a block that are true."""
    return tl.sum(x.to(tl.int32), axis=0).to(tl.float64) + tl.zeros((1,), tl.float64)


'''


def kept_names(graph: Graph) -> list[str]:
    """Return the variables that the measure is given, which follow the results of an update."""
    return [f"kept{position}" for position in range(len(graph.measure.given))]


def read_at_rest(graph: Graph) -> tuple[str, ...]:
    """Return the columns that the reductions of a skipped step are made of."""
    return _at_rest(graph)[1].inputs


def measure_helpers(arithmetic: torch.dtype, target: Target) -> str:
    """Return the functions that make one number of a block."""
    return reduction_functions(pairs=in_pairs(arithmetic, target)) + _COUNT


def measure_functions(graph: Graph, arithmetic: torch.dtype, target: Target) -> list[str]:
    """Return the functions that compute what is reduced: of a step, and of a skipped one."""
    arguments = [*graph.measure.inputs, *kept_names(graph)]
    about = '"""What is reduced once the step is stored."""'
    texts = [function("measured", graph.measure, arguments, arithmetic, target, about)]
    positions, program = _at_rest(graph)
    if positions:
        arguments = [f"{name}_in" for name in program.inputs]
        about = '"""What differs if the step is skipped."""'
        texts.append(function("at_rest", program, arguments, arithmetic, target, about))
    return texts


def measure_lines(
    graph: Graph, new_p: Sequence[str], *, shape: str, masked: bool, pairs: bool
) -> list[str]:
    """Return the lines that store the reductions of a block.

    Args:
        graph: the graph.
        new_p: the lines that find :data:`NEW_P`.
        shape: the expression of a block in one dimension, in which ``{}`` stands for it.
        masked: True if there may be elements outside the parameter, or the step may be skipped.
        pairs: True if sums are in pairs of float32.
    """
    operands = [f"y{position}" for position in range(len(graph.reductions))]
    lines = list(new_p if NEW_P in graph.measure.inputs else ())
    given = ", ".join([*graph.measure.inputs, *kept_names(graph)])
    lines.append(f"{', '.join(operands)} = measured({given})")
    positions, program = _at_rest(graph)
    if masked and positions:
        others = [f"{operands[position]}_at_rest" for position in positions]
        inputs = ", ".join(f"{name}_in" for name in program.inputs)
        lines += ["if SCALED:", f"    {', '.join(others)} = at_rest({inputs})"]
        for position, other in zip(positions, others):
            operand = operands[position]
            lines.append(f"    {operand} = tl.where(left > 0, {operand}, {other})")
    lines.append("to = partial + block + tl.arange(0, 1)")
    for position, (node, operand) in enumerate(zip(graph.reductions, operands)):
        if node.op == "count":
            made, value = "count_of", f"{operand} & inside" if masked else operand
        else:
            wide, neutral = (text.format(operand) for text in operand_of(node.op, pairs=pairs))
            made = way(node.op, pairs=pairs)
            value = f"tl.where(inside, {wide}, {neutral})" if masked else wide
        lines += [
            commented(f"{operand} = {value}", node, 92),
            f"tl.store(to + {position} * blocks, {made}({shape.format(operand)}))",
        ]
    return lines


def _at_rest(graph: Graph) -> tuple[list[int], Program]:
    """Return the reductions that differ in a skipped step, and what computes their operands."""
    assert graph.at_rest is not None
    pairs = list(zip(graph.reductions, graph.at_rest.reductions))
    differing = [position for position, (node, other) in enumerate(pairs) if other is not node]
    return differing, Program.of([pairs[position][1].args[0] for position in differing])

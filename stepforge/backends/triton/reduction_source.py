"""The Triton source of a pass over the tensors that makes reductions, and of what follows it.

One program of the pass writes a number for each block and reduction. Launches of another kernel
combine those of a parameter, then those of all parameters, in the order that backends/reduction.py
states.
"""

from __future__ import annotations

import torch

from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.dtypes import BFLOAT16_FUNCTIONS, triton_type
from stepforge.backends.triton.expressions import SQRT_FUNCTION, function, type_name
from stepforge.backends.triton.pairs import PAIR_FUNCTIONS, folds
from stepforge.backends.triton.variant import Target

__all__ = [
    "combine_source",
    "in_pairs",
    "operand_of",
    "pass_source",
    "reduction_functions",
    "way",
]

_HEAD = "import triton\nimport triton.language as tl\n\n\n"


def _sum_function() -> str:
    """Return the function that adds up the rows of each part, then the parts, then the lanes."""
    lines = ["@triton.jit", "def sum_of(x):", '    """The sum of a block."""']
    lines += [f"    x = tl.sum(tl.reshape(x, {shape}), axis=1)" for shape in folds()]
    return "\n".join([*lines, "    return tl.reshape(x, (1,))", "", "", ""])


_LARGEST = '''\
@triton.jit
def largest_of(x):
    """The largest of a block; NaN if any is."""
    is_nan = tl.max((x != x).to(tl.int32), axis=0)
    found = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    return tl.where(is_nan != 0, float("nan"), found) + tl.zeros((1,), tl.float64)


'''

_FUNCTIONS = _sum_function() + _LARGEST

#: The number that is kept of an operand, in float64, and that of elements that are not there.
_OPERANDS = {
    "total": ("{0}.to(tl.float64)", "0.0"),
    "squares": ("{0}.to(tl.float64) * {0}.to(tl.float64)", "0.0"),
    "largest": ("{0}.to(tl.float64)", 'float("-inf")'),
    "count": ("{0}.to(tl.float64)", "0.0"),
}
_SUMS = ("total", "squares")  # of numbers; counts are of integers


def in_pairs(arithmetic: torch.dtype, target: Target) -> bool:
    """Return True if sums of blocks are in pairs of float32, not in float64."""
    return arithmetic == torch.float32 and not target.has_fast_float64


def reduction_functions(*, pairs: bool) -> str:
    """Return the functions that :func:`way` names."""
    return _FUNCTIONS + (PAIR_FUNCTIONS if pairs else "")


def operand_of(op: str, *, pairs: bool) -> tuple[str, str]:
    """Return what is kept of an operand ``{0}``, and the number for elements that are not there."""
    return ("{0}", "0.0") if pairs and op in _SUMS else _OPERANDS[op]


def way(op: str, *, pairs: bool = False) -> str:
    """Return the function that makes one number of a block."""
    if pairs and op in _SUMS:
        return f"{op}_in_pairs"
    return "largest_of" if op == "largest" else "sum_of"


def pass_source(spec: KernelSpec, target: Target) -> str:
    """Return the source of a module whose function ``reduce`` is the pass.

    Its rows are of int64: the first block, the number of elements, the address of each tensor but
    the gradient.

    Args:
        spec: its computation and storage; no column has a format, and it takes no coefficients.
        target: the GPU.
    """
    graph, program = spec.graph, spec.graph.varying
    inputs = [f"{name}_in" for name in program.inputs]
    text = f'"""Reductions in {type_name(spec.arithmetic)}; written by stepforge."""\n\n{_HEAD}'
    update = function("operands", program, inputs, spec.arithmetic, target)
    pairs = in_pairs(spec.arithmetic, target)
    text += reduction_functions(pairs=pairs)
    if torch.bfloat16 in spec.dtypes and not target.rounds_bfloat16:
        text += BFLOAT16_FUNCTIONS
    if " sqrt(" in update:
        text += SQRT_FUNCTION
    text += f"{update}\n\n\n"
    states = [name for name in spec.tensors if name != "g"]
    lines = [
        "block = tl.program_id(0)",
        "row = tl.load(owners + block)",
        f"this = rows + row * {2 + len(states)}",
        "begin = (block - tl.load(this + 0)) * BLOCK  # in 64 bits",
        "inside = tl.arange(0, BLOCK) < tl.load(this + 1) - begin",
        f"factor = tl.full((), 1.0, {type_name(spec.arithmetic)})",
        "if SCALED:",
        "    factor = tl.load(unscale)",
    ]
    for name in program.inputs:
        kind = triton_type(spec.dtype_of[name], target)
        at = "gradients + row" if name == "g" else f"this + {2 + states.index(name)}"
        read = kind.read.format("word", number=type_name(spec.arithmetic))
        lines += [
            f"base = tl.load({at}).to(tl.pointer_type({kind.memory})) + begin",
            "word = tl.load(base + tl.arange(0, BLOCK), inside, other=0)",
            f"{name}_in = {read}{' * factor' if name == 'g' else ''}",
        ]
    kept = [f"y{position}" for position in range(len(program.outputs))]
    lines.append(f"{', '.join(kept)} = operands({', '.join(inputs)})")
    results = [kept[register] for register in graph.measure.outputs]
    lines.append("one = tl.arange(0, 1)")
    for position, (node, result) in enumerate(zip(graph.reductions, results)):
        wide, neutral = operand_of(node.op, pairs=pairs)
        masked = f"tl.where(inside, {wide.format(result)}, {neutral})"
        to = f"partial + {position} * blocks + block + one"
        lines.append(f"tl.store({to}, {way(node.op, pairs=pairs)}({masked}))  # {node}")
    body = "\n    ".join(lines)
    return f"""{text}@triton.jit(do_not_specialize=["blocks"])
def reduce(
    owners,  # the row of each block
    rows,  # of each row its first block, its size, and addresses
    gradients,  # of each row the address of its gradient
    unscale,  # what gradients are multiplied by before all else
    partial,  # a number for each reduction and block
    blocks,
    SCALED: tl.constexpr,  # whether there is unscale
    BLOCK: tl.constexpr,
):
    {body}
"""


def combine_source(ops: tuple[str, ...]) -> str:
    """Return the source of a module whose function ``combine`` makes one number of some.

    Args:
        ops: the reductions.
    """
    lines = [
        "result = tl.program_id(0)",
        "begin, count = tl.load(begins + result), tl.load(counts + result)",
        "inside = tl.arange(0, BLOCK) < count",
        "one = tl.arange(0, 1)",
    ]
    for position, op in enumerate(ops):
        at = f"numbers + {position} * size + begin + tl.arange(0, BLOCK)"
        lines += [
            f"x = tl.load({at}, inside, other={_OPERANDS[op][1]})",
            # No zero is -0.
            f"tl.store(out + {position} * results + result + one, {way(op)}(x) + 0.0)  # {op}",
        ]
    body = "\n    ".join(lines)
    return f"""\
\"\"\"Numbers made of the numbers of blocks; written by stepforge.\"\"\"

{_HEAD}{_FUNCTIONS}@triton.jit(do_not_specialize=["size", "results"])
def combine(
    numbers,  # of each reduction
    size,  # of each reduction's numbers
    begins,  # of each result the position of its first number
    counts,  # of each result the count of its numbers
    out,  # the results of each reduction
    results,
    BLOCK: tl.constexpr,
):
    {body}
"""

"""Programs as functions in Triton, one operation per line.

Every operation is one expression on float32 (float64 for float64 parameters), in the program's
order, in the form that rounds once and correctly.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from stepforge.backends.triton.variant import Target
from stepforge.program import Program

__all__ = ["OPERATIONS", "SQRT_FUNCTION", "commented", "function", "type_name"]

#: The Triton expression of each operation. Operands are names of variables; ``{number}`` is the
#: type of the arithmetic. Triton's ``-x`` is ``0 - x``, and its ``maximum`` may return either zero.
OPERATIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt({0})",
    "sign": "({0} > 0).to({number}) - ({0} < 0).to({number})",
    "maximum": "tl.where(({0} >= {1}) | ({0} != {0}), {0}, {1}) + 0.0",
    "minimum": "tl.where(({0} <= {1}) | ({0} != {0}), {0}, {1}) + 0.0",
    "finite": "tl.where({0} > {largest}, {largest}, tl.where({0} < -{largest}, -{largest}, {0}))",
    "where": "tl.where({0}, {1}, {2})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "u32_add": "{0} + {1}",
    "u32_sub": "{0} - {1}",
    "u32_mul": "{0} * {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    "bitcast_u32": "{0}.to(tl.uint32, bitcast=True)",
    "bitcast_f32": "{0}.to(tl.float32, bitcast=True)",
    "i32_to_f32": "{0}.to(tl.int32, bitcast=True).to({number})",
    "f32_to_i32": "{0}.to(tl.int32).to(tl.uint32, bitcast=True)",
}
#: The expressions for float32, where Triton's ``/`` and ``sqrt`` are approximations.
FLOAT32_OPERATIONS = {"div": "tl.div_rn({0}, {1})", "sqrt": "tl.sqrt_rn({0})"}
#: The root of float32 where that of a denormal is NaN. All factors are powers of two.
SQRT_FUNCTION = '''\
@triton.jit
def sqrt(x):
    """The root, rounded to nearest; a small number is scaled into the range of normal ones."""
    small = x < 2.0**-96
    root = tl.sqrt_rn(tl.where(small, x * 2.0**32, x))
    return root * tl.where(small, 2.0**-16, 1.0)


'''


def type_name(dtype: torch.dtype) -> str:
    """Return the Triton type of a dtype.

    Example:
        >>> type_name(torch.float32)
        'tl.float32'
    """
    return f"tl.{str(dtype).removeprefix('torch.')}"


def function(
    name: str,
    program: Program,
    arguments: Sequence[str],
    arithmetic: torch.dtype,
    target: Target,
    *about: str,
    operations: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return a function that computes a program.

    Args:
        name: its name.
        program: the computation.
        arguments: the names of the program's inputs, then of its given values.
        arithmetic: the dtype of its numbers.
        target: the GPU.
        about: lines to begin with.
        operations: the expressions of further operations.
    """
    expressions = {**_operations(arithmetic, target), **operations}
    constants = [f"k{position}" for position in range(len(program.constants))]
    results = [f"x{position}" for position in range(len(program.instructions))]
    names = [*arguments, *constants, *results]
    lines = [f"@triton.jit\ndef {name}({', '.join(arguments)}):", *about]
    lines += [
        f"{constant} = {_literal(value, arithmetic)}"
        for constant, value in zip(constants, program.constants)
    ]
    if any(instruction.op == "finite" for instruction in program.instructions):
        lines.append(f"largest = {_literal(torch.finfo(arithmetic).max, arithmetic)}")
    for instruction in program.instructions:
        operands = (names[register] for register in instruction.args)
        expression = expressions[instruction.op].format(
            *operands, number=type_name(arithmetic), largest="largest"
        )
        lines.append(f"{names[instruction.out]} = {expression}")
    lines.append(f"return {', '.join(names[register] for register in program.outputs)}")
    return "\n    ".join(lines)


def _literal(value: float, arithmetic: torch.dtype) -> str:
    """Return a number in the arithmetic's own type, or a uint32; a bare one takes another type."""
    if isinstance(value, int):
        return f"tl.full((), {value:#x}, tl.uint32)"
    bits, form = (64, "d") if arithmetic == torch.float64 else (32, "f")
    try:
        packed = struct.pack(form, value)
    except OverflowError:
        packed = struct.pack(form, math.copysign(math.inf, value))
    (value,) = struct.unpack(form, packed)
    if math.isfinite(value) and (value or math.copysign(1, value) > 0):
        return f"tl.full((), {value!r}, tl.float{bits})"
    # Triton has no literal for an infinity or a NaN, and takes -0.0 for 0.0.
    pattern = int.from_bytes(packed, sys.byteorder)
    return f"tl.full((), {pattern:#x}, tl.uint{bits}).to(tl.float{bits}, bitcast=True)  # {value!r}"


def _operations(arithmetic: torch.dtype, target: Target) -> dict[str, str]:
    """Return the expression of each operation."""
    if arithmetic == torch.float64:
        return OPERATIONS
    scaled = {} if target.root_takes_denormals else {"sqrt": "sqrt({0})"}
    return OPERATIONS | FLOAT32_OPERATIONS | scaled


def commented(line: str, about: object, width: int = 96) -> str:
    """Return a line with a comment, which is cut where the line would be longer than ``width``.

    Example:
        >>> commented("c0 = x", "div(lr, sub(1, pow(betas[0], t)))", width=24)
        'c0 = x  # div(lr, sub...'
    """
    text, room = str(about), width - len(line) - len("  # ")
    return f"{line}  # {text if len(text) <= room else text[: room - 3] + '...'}"

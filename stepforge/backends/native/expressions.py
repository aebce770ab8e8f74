"""Programs as lines of C, an operation a line.

Numbers are ``float`` (``double`` where rules compute in float64), uint32 is ``uint32_t`` and
comparisons are ``int``.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from stepforge.program import Program

__all__ = ["OPERATIONS", "computed", "results", "to_finite"]

#: The C expression of each operation. Operands are names of variables, or numbers. ``{number}`` is
#: the type of the arithmetic, ``{f}`` the suffix of its functions: ``f``, or nothing for double.
OPERATIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "fabs{f}({0})",
    "sqrt": "sqrt{f}({0})",
    "sign": "({number})(({0} > 0) - ({0} < 0))",
    "maximum": "({0} >= {1} || {0} != {0} ? {0} : {1}) + 0",
    "minimum": "({0} <= {1} || {0} != {0} ? {0} : {1}) + 0",
    "finite": "to_finite({0})",
    "where": "{0} ? {1} : {2}",
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
    "bitcast_u32": "to_bits({0})",
    "bitcast_f32": "from_bits({0})",
    "i32_to_f32": "({number})(int32_t){0}",
    "f32_to_i32": "(uint32_t)(int32_t){0}",
}


# By integers: of comparisons and choices between floats GCC makes three times as many operations.
_TO_FINITE = """\
/* The largest number for an infinity, whose bits are one more; NaN stays. */
static inline number to_finite(number x) {{
    {bits} bits;
    memcpy(&bits, &x, sizeof bits);
    bits -= (bits & {size:#x}) == {infinity:#x};
    memcpy(&x, &bits, sizeof bits);
    return x;
}}
"""


def to_finite(*, double: bool) -> str:
    """Return the function that the operation ``finite`` calls."""
    if double:
        return _TO_FINITE.format(bits="uint64_t", size=2**63 - 1, infinity=0x7FF << 52)
    return _TO_FINITE.format(bits="uint32_t", size=2**31 - 1, infinity=0xFF << 23)


def computed(
    program: Program,
    given: Sequence[str],
    *,
    number: str = "float",
    double: bool = False,
    prefix: str = "f",
    finite: Container[int] = (),
) -> list[str]:
    """Return the lines that compute the instructions of a program.

    Args:
        program: the computation.
        given: the names of its inputs, then of its given values.
        number: the C type of its numbers.
        double: True if that is double.
        prefix: the prefix of the names of its registers.
        finite: the registers that never hold an infinity.
    """
    names = _registers(program, given, number, prefix, finite)
    suffix = "" if double else "f"
    lines = []
    for instruction in program.instructions:
        if names[instruction.out] == names[instruction.args[0]]:
            continue  # nothing to compute
        node = program.nodes[instruction.out]
        kind = "int" if node.boolean else "uint32_t" if node.uint32 else number
        operands = [names[register] for register in instruction.args]
        value = OPERATIONS[instruction.op].format(*operands, number=number, f=suffix)
        lines.append(f"const {kind} {names[instruction.out]} = {value};")
    return lines


def results(
    program: Program,
    given: Sequence[str],
    *,
    number: str = "float",
    prefix: str = "f",
    finite: Container[int] = (),
) -> list[str]:
    """Return the names of the results after the lines of :func:`computed`."""
    names = _registers(program, given, number, prefix, finite)
    return [names[register] for register in program.outputs]


def _registers(
    program: Program, given: Sequence[str], number: str, prefix: str, finite: Container[int]
) -> list[str]:
    """Return the name of each register; a constant is its literal."""
    names = [*given, *(_literal(value, number) for value in program.constants)]
    for position, instruction in enumerate(program.instructions):
        first = instruction.args[0]
        same = instruction.op == "finite" and first in finite
        names.append(names[first] if same else f"{prefix}{position}")
    return names


def _literal(value: float, number: str) -> str:
    if isinstance(value, int):
        return f"UINT32_C({value:#x})"
    if math.isfinite(value):
        return f"({number}){value.hex()}"
    if math.isnan(value):
        return f"({number})NAN"
    return f"({'-' if value < 0 else ''}({number})INFINITY)"

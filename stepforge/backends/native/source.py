"""The varying program of a graph as C: one function that steps any number of tensors.

Every operation is one C expression on ``float`` (``double`` for float64 parameters), in the
program's order; the compiler may vectorize but not re-associate or contract, so the result has the
reference's bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepforge.expr import Graph, Instruction

#: What an operation is in C; operands are names of variables, or numbers. ``{f}`` is the suffix of
#: functions and literals of the arithmetic: ``f``, or nothing for double.
OPERATIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "fabs{f}({0})",
    "sqrt": "sqrt{f}({0})",
    "sign": "(number)(({0} > 0) - ({0} < 0))",
    "maximum": "({0} >= {1} || {0} != {0} ? {0} : {1}) + 0",
    "minimum": "({0} <= {1} || {0} != {0} ? {0} : {1}) + 0",
    "finite": "{0} > LARGEST ? LARGEST : {0} < -LARGEST ? -LARGEST : {0}",
    "where": "{0} ? {1} : {2}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
}


@dataclass(frozen=True)
class Storage:
    """How C sees a dtype: its type, and how a number is read from and written to it."""

    ctype: str
    read: str = "{0}"
    write: str = "{0}"


#: The dtypes that parameters, gradients and states may be stored in.
STORAGE: dict[torch.dtype, Storage] = {
    torch.float32: Storage("float", "(number){0}", "(float){0}"),
    torch.float64: Storage("double", "(number){0}", "(double){0}"),
    torch.bfloat16: Storage("uint16_t", "(number)from_bfloat16({0})", "to_bfloat16((float){0})"),
    torch.float16: Storage("_Float16", "(number){0}", "(_Float16)(float){0}"),
}

_BFLOAT16 = """\
static inline float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* To nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}
"""

# One parallel region a call. libgomp is torch's own, handed in as pointers: linking would bring a
# second copy and with it a second pool of threads.
_DRIVER = """\
typedef struct {
    int64_t rows;
    const int64_t *starts;    /* rows + 1: the elements before each row */
    void *const *pointers;    /* rows x COLUMNS */
    const number *numbers;    /* rows x COEFFICIENTS */
    int (*thread)(void);      /* which thread this is; null where there is but one */
    int (*team)(void);        /* how many there are: perhaps fewer than were asked for */
} work;

static void share(void *argument) {
    const work *w = argument;
    int64_t total = w->starts[w->rows];
    int64_t threads = w->thread ? w->team() : 1;
    int64_t part = (total / threads + GRAIN) / GRAIN * GRAIN;
    int64_t begin = w->thread ? w->thread() * part : 0;
    int64_t end = begin + part < total ? begin + part : total;
    if (begin >= end) return;
    int64_t low = 0, high = w->rows;    /* the last row that starts at or before begin */
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (w->starts[middle] <= begin) low = middle; else high = middle;
    }
    for (int64_t row = low; begin < end; row++) {
        int64_t stop = w->starts[row + 1] < end ? w->starts[row + 1] : end;
        if (begin < stop)
            step(w->pointers + row * COLUMNS, w->numbers + row * COEFFICIENTS,
                 begin - w->starts[row], stop - w->starts[row]);
        begin = stop;
    }
}

void stepforge_run(int64_t rows, const int64_t *starts, void *const *pointers,
                   const number *numbers, int threads, int (*thread)(void), int (*team)(void),
                   void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int alone = threads <= 1;
    work w = {rows, starts, pointers, numbers, alone ? 0 : thread, alone ? 0 : team};
    if (alone)
        share(&w);
    else
        parallel(share, &w, (unsigned)threads, 0);
}
"""


def columns_of(graph: Graph) -> tuple[str, ...]:
    """The tensors a kernel is given for each row: what it reads, then what it only writes."""
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


def c_source(graph: Graph, dtypes: Mapping[str, torch.dtype], arithmetic: torch.dtype) -> str:
    """The C source of a kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype in which each of :func:`columns_of` is stored.
        arithmetic: float32 or float64.
    """
    program = graph.varying
    columns = columns_of(graph)
    double = arithmetic == torch.float64
    names = _register_names(graph)
    lines: list[str] = []
    for position, column in enumerate(columns):
        const = "" if column in graph.results else "const "
        ctype = STORAGE[dtypes[column]].ctype
        lines.append(f"{const}{ctype} *restrict {column} = at[{position}];")
    for position, node in enumerate(program.given):
        kind, test = ("int", " != 0") if node.boolean else ("number", "")
        lines.append(f"const {kind} c{position} = c[{position}]{test};  /* {_shown(node)} */")
    lines.append("for (int64_t i = low; i < high; i++) {")
    for name in program.inputs:
        read = STORAGE[dtypes[name]].read.format(f"{name}[i]")
        lines.append(f"    const number {names[program.inputs.index(name)]} = {read};")
    for instruction in program.instructions:
        kind = "int" if program.nodes[instruction.out].boolean else "number"
        expression = _expression(instruction, names, double)
        lines.append(f"    const {kind} {names[instruction.out]} = {expression};")
    for column, register in zip(graph.results, program.outputs):
        write = STORAGE[dtypes[column]].write.format(names[register])
        lines.append(f"    {column}[i] = {write};")
    lines.append("}")
    body = "\n".join(f"    {line}" for line in lines)
    return f"""\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef {"double" if double else "float"} number;
#define LARGEST {"DBL_MAX" if double else "FLT_MAX"}
#define COLUMNS {len(columns)}
#define COEFFICIENTS {len(program.given)}
#define GRAIN 64    /* a thread's share begins on a whole number of cache lines */

{_BFLOAT16 if torch.bfloat16 in dtypes.values() else ""}
static void step(void *const *at, const number *c, int64_t low, int64_t high) {{
{body}
}}

{_DRIVER}"""


def _register_names(graph: Graph) -> list[str]:
    """What each register is called in C; a constant is its literal."""
    program = graph.varying
    inputs = [f"{name}_in" for name in program.inputs]
    coefficients = [f"c{position}" for position in range(len(program.given))]
    constants = [_literal(number) for number in program.constants]
    results = [f"x{position}" for position in range(len(program.instructions))]
    return [*inputs, *coefficients, *constants, *results]


def _literal(number: float) -> str:
    if math.isfinite(number):
        return f"(number){number.hex()}"
    return "(number)NAN" if math.isnan(number) else f"({'-' if number < 0 else ''}(number)INFINITY)"


def _expression(instruction: Instruction, names: Sequence[str], double: bool) -> str:
    operands = [names[register] for register in instruction.args]
    return OPERATIONS[instruction.op].format(*operands, f="" if double else "f")


def _shown(node: object) -> str:
    text = str(node)
    return text if len(text) <= 60 else text[:57] + "..."

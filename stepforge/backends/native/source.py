"""The varying program of a graph as C: one function that steps any number of tensors.

Every operation is one C expression on ``float`` (``double`` for float64 parameters), in the
program's order; the compiler may vectorize but not re-associate or contract, so the result has the
reference's bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from stepforge.backends.native.storage import STORAGE, conversions
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


# One parallel region a call. libgomp is torch's own, handed in as pointers: linking would bring a
# second copy and with it a second pool of threads.
_DRIVER = """\
typedef struct {
    int64_t rows;
    const int64_t *starts;    /* rows + 1: the elements before each row */
    void *const *pointers;    /* rows x COLUMNS */
    const number *numbers;    /* rows x COEFFICIENTS */
    number unscale;           /* what gradients are multiplied by before all else */
    int (*thread)(void);      /* which thread this is; null where there is but one */
    int (*team)(void);        /* how many there are: perhaps fewer than were asked for */
} work;

/* Asks for where a row begins: the processor foresees what follows, but not that. */
static void fetch(const work *w, int64_t row) {
    for (int column = 0; row < w->rows && column < COLUMNS; column++)
        __builtin_prefetch(w->pointers[row * COLUMNS + column]);
}

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
        fetch(w, row + AHEAD);
        if (begin < stop)
            step_row(w->pointers + row * COLUMNS, w->numbers + row * COEFFICIENTS, w->unscale,
                     begin - w->starts[row], stop - w->starts[row]);
        begin = stop;
    }
}

void stepforge_run(int64_t rows, const int64_t *starts, void *const *pointers,
                   const number *numbers, double unscale,
                   int threads, int (*thread)(void), int (*team)(void),
                   void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int alone = threads <= 1;
    number factor = (number)unscale;
    work w = {rows, starts, pointers, numbers, factor, alone ? 0 : thread, alone ? 0 : team};
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
    double = arithmetic == torch.float64
    columns = columns_of(graph)
    return f"""\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef {"double" if double else "float"} number;
#define LARGEST {"DBL_MAX" if double else "FLT_MAX"}
#define COLUMNS {len(columns)}
#define COEFFICIENTS {len(graph.varying.given)}
#define GRAIN 64    /* a thread's share begins on a whole number of cache lines */
#define AHEAD 3     /* rows: far enough for small ones to arrive in time, as measured */
/* Of functions that are not inlined: with its call GCC forgets what restrict promised. */
#define APART __attribute__((noinline))

{conversions(dtypes[name] for name in columns)}
{_step_elements(graph, dtypes, double)}
{_step_row(graph, dtypes)}
{_DRIVER}"""


def _step_elements(graph: Graph, dtypes: Mapping[str, torch.dtype], double: bool) -> str:
    """The loop over elements: each operation of the program once."""
    program = graph.varying
    names = _register_names(graph)
    parameters = ["int64_t count", "const number *c", "number unscale"]
    for column in columns_of(graph):
        element = STORAGE[dtypes[column]].element
        parameters.append(f"{_const(graph, column)}{element} *restrict {column}_at")
    lines: list[str] = []
    for position, node in enumerate(program.given):
        kind, test = ("int", " != 0") if node.boolean else ("number", "")
        lines.append(f"const {kind} c{position} = c[{position}]{test};  /* {_shown(node)} */")
    lines.append("for (int64_t i = 0; i < count; i++) {")
    for column, name in zip(program.inputs, names):
        read = STORAGE[dtypes[column]].read.format(f"{column}_at[i]")
        if column == "g":
            read += " * unscale"
        lines.append(f"    const number {name} = {read};")
    for instruction in program.instructions:
        kind = "int" if program.nodes[instruction.out].boolean else "number"
        expression = _expression(instruction, names, double)
        lines.append(f"    const {kind} {names[instruction.out]} = {expression};")
    for column, register in zip(graph.results, program.outputs):
        write = STORAGE[dtypes[column]].write.format(names[register])
        lines.append(f"    {column}_at[i] = {write};")
    lines.append("}")
    return f"""\
static APART void step_elements(
    {_joined(parameters, ",")}
) {{
    {_joined(lines)}
}}
"""


def _step_row(graph: Graph, dtypes: Mapping[str, torch.dtype]) -> str:
    """What hands a part of a row to the loop: all at once, or in blocks where it must convert."""
    columns = {column: STORAGE[dtypes[column]] for column in columns_of(graph)}
    blocks = {column: storage for column, storage in columns.items() if storage.widen}
    lines = [
        f"{_const(graph, column)}{storage.memory} *{column}_at = at[{position}];"
        for position, (column, storage) in enumerate(columns.items())
    ]
    if blocks:
        lines += [f"{storage.element} {column}_block[BLOCK];" for column, storage in blocks.items()]
        lines.append("for (int64_t i = low; i < high; i += BLOCK) {")
        lines.append("    const int64_t count = high - i < BLOCK ? high - i : BLOCK;")
        for column, storage in blocks.items():
            if column in graph.varying.inputs:
                lines.append(f"    {storage.widen}(count, {column}_at + i, {column}_block);")
        given = [
            f"{column}_block" if column in blocks else f"{column}_at + i" for column in columns
        ]
        lines.append(f"    step_elements(count, c, unscale, {', '.join(given)});")
        for column, storage in blocks.items():
            if column in graph.results:
                lines.append(f"    {storage.narrow}(count, {column}_block, {column}_at + i);")
        lines.append("}")
    else:
        given = [f"{column}_at + low" for column in columns]
        lines.append(f"step_elements(high - low, c, unscale, {', '.join(given)});")
    return f"""\
static void step_row(void *const *at, const number *c, number unscale,
                     int64_t low, int64_t high) {{
    {_joined(lines)}
}}
"""


def _const(graph: Graph, column: str) -> str:
    return "" if column in graph.results else "const "


def _joined(lines: Sequence[str], separator: str = "") -> str:
    """The lines of a body, the first of which is indented already."""
    return f"{separator}\n    ".join(lines)


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

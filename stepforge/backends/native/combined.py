"""The C by which blocks are shared and their reductions combined, in passes and in steps.

Threads share the blocks of all parameters, and each writes one number for each block and reduction.
The calling thread then combines those of a parameter, in the order that backends/reduction.py
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepforge.backends.native.share import share_function
from stepforge.backends.reduction import BLOCK, LANES, ROWS
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Expr

__all__ = ["WAYS", "frame", "functions", "key_of"]

# The largest number and the count do not depend on the order: they are found by integers, whose
# loops GCC vectorizes.
_COMBINED = """\
/* Adds the second half to the first, until one is left, of a power of two; it is overwritten. */
static double sum_of_lanes(double *restrict x, int64_t width) {
    while (width > 1) {
        width /= 2;
        for (int64_t i = 0; i < width; i++) x[i] += x[width + i];
    }
    return x[0];
}

/* Adds up the numbers of a block, which are overwritten: rows, then parts, then lanes. */
static APART double sum_of(double *restrict x, int64_t count) {
    const int64_t unit = count > LANES ? ROWS * LANES : 1;
    int64_t width = unit;
    while (width < count) width *= 2;
    for (int64_t i = count; i < width; i++) x[i] = -0.0;    /* changes no sum, and is no memset */
    if (unit == 1) return sum_of_lanes(x, width);
    int64_t parts = width / unit;
    for (int64_t part = 0; part < parts; part++) {
        const double *y = x + part * unit;
        for (int64_t i = 0; i < LANES; i++)
            x[part * LANES + i] = (y[i] + y[2 * LANES + i]) + (y[LANES + i] + y[3 * LANES + i]);
    }
    while (parts > 1) {
        parts /= 2;
        for (int64_t i = 0; i < parts * LANES; i += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) x[i + lane] += x[parts * LANES + i + lane];
    }
    return sum_of_lanes(x, LANES);
}

/* The numbers of blocks are overwritten by those of blocks of blocks, until there is one. */
static double sum_of_all(double *x, int64_t count) {
    if (count == 0) return 0;
    while (count > 1) {
        int64_t blocks = (count + REDUCED - 1) / REDUCED;
        for (int64_t i = 0; i < blocks; i++) {
            int64_t left = count - i * REDUCED;
            double block[REDUCED];
            if (left > REDUCED) left = REDUCED;
            for (int64_t j = 0; j < left; j++)
                block[j] = x[i * REDUCED + j] + 0.0;    /* no memcpy */
            x[i] = sum_of(block, left);
        }
        count = blocks;
    }
    return x[0] + 0.0;    /* no zero is -0 */
}

/* Numbers in the order of their keys; NaN has the largest. */
static inline sort_key key_of(number x) {
    sort_key bits;
    memcpy(&bits, &x, sizeof bits);
    bits ^= bits >> (8 * sizeof bits - 1) & LARGEST_KEY;
    const sort_key is_nan = -(sort_key)(x != x);    /* all bits */
    return (bits & ~is_nan) | (is_nan & LARGEST_KEY);
}

/* The same of a number without a sign: its bits are in order already. */
static inline sort_key key_of_size(number x) {
    sort_key bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double number_of(sort_key k) {
    number x;
    k = k < 0 ? k ^ LARGEST_KEY : k;
    memcpy(&x, &k, sizeof x);
    return x;
}

static double largest_of_all(const double *x, int64_t count) {
    double result = -INFINITY;
    for (int64_t i = 0; i < count; i++) result = x[i] > result || x[i] != x[i] ? x[i] : result;
    return result + 0.0;
}
"""

_WORK = """\
typedef struct {
    int64_t rows;
    const int64_t *starts;    /* rows + 1: the blocks before each row, and of all */
    const int64_t *sizes;     /* rows: elements */
    void *const *records;     /* rows x COLUMNS: where tensors are */
    const number *numbers;    /* rows x COEFFICIENTS */
    number unscale;           /* what gradients are multiplied by before all else */
    double *partial;          /* REDUCTIONS x blocks */
    int (*thread)(void);      /* which thread this is; null where there is but one */
    int (*team)(void);        /* how many there are: perhaps fewer than were asked for */
} work;
"""

_EACH = """\
for (int64_t block = begin; block < stop; block++) {
    int64_t first = (block - w->starts[row]) * REDUCED;
    run_block(w->records + row * RECORD, w->numbers + row * COEFFICIENTS, w->unscale,
              first, w->sizes[row], w->partial + block, w->starts[w->rows]);
}
"""

_RUN = """\
/* Writes rows x REDUCTIONS numbers, and a row of those of all; the partial ones are overwritten. */
void stepforge_run(int64_t rows, const int64_t *starts, const int64_t *sizes,
                      void *const *records, const number *numbers, double unscale,
                      double *partial, double *totals,
                      int threads, int (*thread)(void), int (*team)(void),
                      void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int alone = threads <= 1;
    work w = {rows, starts, sizes, records, numbers, (number)unscale, partial,
              alone ? 0 : thread, alone ? 0 : team};
    if (alone)
        share(&w);
    else
        parallel(share, &w, (unsigned)threads, 0);
    for (int64_t row = 0; row < rows; row++)
        combine(partial + starts[row], starts[rows], starts[row + 1] - starts[row],
                totals + row * REDUCTIONS);
    for (int64_t i = 0; i < rows * REDUCTIONS; i++)
        partial[i % REDUCTIONS * rows + i / REDUCTIONS] = totals[i];
    combine(partial, rows, rows, totals + rows * REDUCTIONS);
}
"""


@dataclass(frozen=True)
class _Way:
    """The C of a reduction.

    Attributes:
        kind: the type of what is kept of an element.
        kept: the expression that makes it of ``{value}``.
        neutral: what changes no result.
        of_all: the function of the numbers of all blocks.
        is_sum: True if the result depends on the order.
    """

    kind: str
    kept: str
    neutral: str
    of_all: str = "sum_of_all"
    is_sum: bool = False


#: The C of each reduction.
WAYS = {
    "total": _Way("number", "{value}", "-0.0f", is_sum=True),
    "squares": _Way("number", "{value}", "-0.0f", is_sum=True),
    "largest": _Way("sort_key", "{key_of}({value})", "key_of(-INFINITY)", "largest_of_all"),
    "count": _Way("int32_t", "{value} ? 1 : 0", "0"),
}


def key_of(node: Expr) -> str:
    """Return the function of a number's key, for what a reduction finds the largest of."""
    return "key_of_size" if node.args[0].op == "abs" else "key_of"


def functions(spec: KernelSpec) -> str:
    """Return the functions that reduce the numbers of a block, and those of blocks."""
    double = spec.arithmetic == torch.float64
    return f"""\
typedef {"int64_t" if double else "int32_t"} sort_key;
#define LARGEST_KEY {"INT64_MAX" if double else "INT32_MAX"}
#define REDUCTIONS {len(spec.graph.reductions)}
#define REDUCED {BLOCK}    /* elements of a block */
#define LANES {LANES}
#define ROWS {ROWS}    /* of a part, whose numbers are added up first */

{_COMBINED}"""


def frame(spec: KernelSpec) -> str:
    """Return what follows the function of a block, ``run_block``: its callers, and the last step.

    ``run_block(at, c, unscale, first, size, partial, blocks)`` is given the record and the
    coefficients of a parameter, the factor of its gradient, the first element of the block, the
    number of all elements of the parameter, and where to write the number of the first reduction;
    that of the next is ``blocks`` later.
    """
    return f"{_combine_function(spec)}\n{_WORK}\n{share_function(_EACH)}{_RUN}"


def _combine_function(spec: KernelSpec) -> str:
    """Return the function that combines the numbers of a parameter's blocks."""
    lines = [
        f"totals[{n}] = {WAYS[node.op].of_all}(partial + {n} * blocks, count);"
        for n, node in enumerate(spec.graph.reductions)
    ]
    return f"""\
static void combine(double *partial, int64_t blocks, int64_t count, double *totals) {{
    {_joined(lines)}
}}
"""


def _joined(lines: Sequence[str]) -> str:
    """Join the lines of a body; the first one is indented already."""
    return "\n    ".join(lines)

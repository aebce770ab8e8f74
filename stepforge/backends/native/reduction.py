"""The C source of a pass over the tensors that makes reductions, and its call.

Threads share the blocks of all parameters, and each writes one number for each block and reduction.
The calling thread then combines those of a parameter, in the order that backends/reduction.py
states.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stepforge.backends import cache
from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import Batch, Gradients
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native import loops, prebuilt
from stepforge.backends.native.dtypes import C_TYPES, conversions
from stepforge.backends.native.expressions import computed, results
from stepforge.backends.native.kernel import threads_for
from stepforge.backends.native.share import share_function
from stepforge.backends.native.source import FETCH_AHEAD
from stepforge.backends.reduction import BLOCK
from stepforge.backends.spec import KernelSpec

__all__ = ["Reduction", "ReductionTable", "reduction_for", "reduction_source"]

# The largest number and the count do not depend on the order: they are found by integers, whose
# loops GCC vectorizes.
_COMBINED = """\
/* Adds the second half to the first, until one is left. The numbers are overwritten. */
static APART double sum_of(double *restrict x, int64_t count) {
    int64_t width = 1;
    while (width < count) width *= 2;
    for (int64_t i = count; i < width; i++) x[i] = -0.0;    /* changes no sum, and is no memset */
    if (width == BLOCK) {
        width /= 8;
        for (int64_t i = 0; i < BLOCK / 8; i++) {
            double parts[8];
            for (int part = 0; part < 8; part++) parts[part] = x[i + part * (BLOCK / 8)];
            x[i] = SUM_OF_8(parts);
        }
    }
    while (width >= 2 * LANES) {
        width /= 2;
        for (int64_t i = 0; i < width; i += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) x[i + lane] += x[width + i + lane];
    }
    while (width > 1) {
        width /= 2;
        for (int64_t i = 0; i < width; i++) x[i] += x[width + i];
    }
    return x[0];
}

/* The numbers of blocks are overwritten by those of blocks of blocks, until there is one. */
static double sum_of_all(double *x, int64_t count) {
    if (count == 0) return 0;
    while (count > 1) {
        int64_t blocks = (count + BLOCK - 1) / BLOCK;
        for (int64_t i = 0; i < blocks; i++) {
            int64_t left = count - i * BLOCK;
            double block[BLOCK];
            if (left > BLOCK) left = BLOCK;
            for (int64_t j = 0; j < left; j++) block[j] = x[i * BLOCK + j] + 0.0;    /* no memcpy */
            x[i] = sum_of(block, left);
        }
        count = blocks;
    }
    return x[0] + 0.0;    /* no zero is -0 */
}

/* Numbers in the order of their keys; NaN has the largest. */
static inline key key_of(number x) {
    key bits;
    memcpy(&bits, &x, sizeof bits);
    bits ^= bits >> (8 * sizeof bits - 1) & LARGEST_KEY;
    const key is_nan = -(key)(x != x);    /* all bits */
    return (bits & ~is_nan) | (is_nan & LARGEST_KEY);
}

/* The same of a number without a sign: its bits are in order already. */
static inline key key_of_size(number x) {
    key bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double number_of(key k) {
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
    int64_t first = (block - w->starts[row]) * BLOCK;
    int64_t left = w->sizes[row] - first;
    reduce_block(w->records + row * RECORD, w->numbers + row * COEFFICIENTS, w->unscale,
                 first, left < BLOCK ? left : BLOCK, w->partial + block, w->starts[w->rows]);
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
        kind: the type of what is kept: ``double`` of each element to be added, else of a block.
        declared: the declaration of what is kept of a block.
        kept: the statement that keeps ``{value}`` of an element.
        of_block: the number of a block.
        of_all: the function of the numbers of all blocks.
    """

    kind: str
    declared: str
    kept: str
    of_block: str
    of_all: str


_SUM = _Way(
    "double",
    "double {out}[BLOCK]",
    "*{out} = {value}",
    "sum_of({out}, count == BLOCK ? BLOCK / 8 : count)",
    "sum_of_all",
)
_WAYS = {
    "total": _SUM,
    "squares": replace(_SUM, kept="*{out} = (double){value} * (double){value}"),
    "largest": _Way(
        "key",
        "key {out} = key_of(-INFINITY)",
        "const key {out}_i = {key_of}({value}); *{out} = *{out} > {out}_i ? *{out} : {out}_i",
        "number_of({out})",
        "largest_of_all",
    ),
    "count": _Way(
        "int32_t", "int32_t {out} = 0", "*{out} += {value} ? 1 : 0", "{out}", "sum_of_all"
    ),
}


def reduction_source(spec: KernelSpec) -> str:
    """Return the C source of a pass."""
    graph = spec.graph
    double = spec.arithmetic == torch.float64
    bitcasts = bool(spec.formats)
    return f"""\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef {"double" if double else "float"} number;
typedef {"int64_t" if double else "int32_t"} key;
#define LARGEST {"DBL_MAX" if double else "FLT_MAX"}
#define LARGEST_KEY {"INT64_MAX" if double else "INT32_MAX"}
#define COLUMNS {len(spec.tensors)}
#define COEFFICIENTS {len(graph.coefficients)}
#define REDUCTIONS {len(graph.reductions)}
#define BLOCK {BLOCK}
#define RECORD COLUMNS
#define GRAIN 1
#define AHEAD 3     /* rows, as for steps */
#define LANES 16
#define APART __attribute__((noinline))
#define INLINE inline __attribute__((always_inline))
/* What halving makes of eight parts, one after the other in a block. */
#define SUM_OF_8(x) (((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])))

{conversions(spec.dtypes, bitcasts=bitcasts)}
{FETCH_AHEAD}
{_COMBINED}
{_element(spec, double=double)}
{_block(spec)}
{_combine(spec)}
{_WORK}
{share_function(_EACH)}{_RUN}"""


def _element(spec: KernelSpec, *, double: bool) -> str:
    """Return the function that computes what is reduced of an element."""
    graph, program = spec.graph, spec.graph.varying
    declared = ["int64_t i", "number unscale"]
    declared += [
        f"const {C_TYPES[spec.dtype_of[name]].element} *restrict {loops.in_c(name)}_at"
        for name in spec.tensors
    ]
    declared += [
        f"const {'int' if node.boolean else 'number'} c{n}"
        for n, node in enumerate(graph.coefficients)
    ]
    declared += [f"{_WAYS[node.op].kind} *out{n}" for n, node in enumerate(graph.reductions)]
    given = [*(f"{x}_in" for x in program.inputs), *(f"c{n}" for n in range(len(program.given)))]
    lines = [line for column in program.inputs for line in loops.read(column, spec)]
    lines += computed(program, given, number="number", double=double, prefix="x")
    values = results(program, given, number="number", prefix="x")
    for n, (node, value) in enumerate(zip(graph.reductions, values)):
        key_of = "key_of_size" if node.args[0].op == "abs" else "key_of"
        kept = _WAYS[node.op].kept.format(out=f"out{n}", value=value, key_of=key_of)
        lines.append(f"{kept};")
    return f"""\
static INLINE void element({", ".join(declared)}) {{
    {_joined(lines)}
}}
"""


def _block(spec: KernelSpec) -> str:
    """Return the function that reduces a block of a parameter.

    Of a whole block, eight parts are added in registers before any number is kept.
    """
    graph = spec.graph
    ways = {f"out{n}": _WAYS[node.op] for n, node in enumerate(graph.reductions)}
    sums = [out for out, way in ways.items() if way.kind == "double"]
    given, lines = ["unscale"], []
    for position, name in enumerate(spec.tensors):
        c_type, c = C_TYPES[spec.dtype_of[name]], loops.in_c(name)
        at = f"(const {c_type.memory} *)at[{position}] + first"
        lines.append(f"if (count == BLOCK) fetch_ahead({at}, sizeof({c_type.memory}));")
        if c_type.widen:
            lines += [f"float {c}_block[BLOCK];", f"{c_type.widen}(count, {at}, {c}_block);"]
            at = f"{c}_block"
        lines.append(f"const {c_type.element} *restrict {c}_at = {at};")
        given.append(f"{c}_at")
    for n, node in enumerate(graph.coefficients):
        kind, test = ("int", " != 0") if node.boolean else ("number", "")
        lines.append(f"const {kind} c{n} = c[{n}]{test};  /* {loops.shown(node)} */")
        given.append(f"c{n}")
    lines += [f"{way.declared.format(out=out)};" for out, way in ways.items()]
    of_part = [f"{out}_parts + part" if out in sums else f"&{out}" for out in ways]
    of_one = [f"{out} + i" if out in sums else f"&{out}" for out in ways]
    whole = [f"double {out}_parts[8];" for out in sums]
    whole += [
        "for (int part = 0; part < 8; part++)",
        f"    element(i + part * (BLOCK / 8), {', '.join([*given, *of_part])});",
    ]
    whole += [f"{out}[i] = SUM_OF_8({out}_parts);" for out in sums]
    lines += [
        "if (count == BLOCK)",
        "    for (int64_t i = 0; i < BLOCK / 8; i++) {",
        *(f"        {line}" for line in whole),
        "    }",
        "else",
        "    for (int64_t i = 0; i < count; i++)",
        f"        element(i, {', '.join([*given, *of_one])});",
    ]
    for n, (out, way) in enumerate(ways.items()):
        lines.append(f"partial[{n} * blocks] = {way.of_block.format(out=out)};")
    return f"""\
static APART void reduce_block(void *const *at, const number *c, number unscale,
                               int64_t first, int64_t count, double *partial, int64_t blocks) {{
    {_joined(lines)}
}}
"""


def _combine(spec: KernelSpec) -> str:
    """Return the function that combines the numbers of a parameter's blocks."""
    lines = [
        f"totals[{n}] = {_WAYS[node.op].of_all}(partial + {n} * blocks, count);"
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


class Reduction:
    """A compiled pass.

    Args:
        spec: its computation and storage.

    Raises:
        BuildError: it cannot be compiled.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.run = prebuilt.load(reduction_source(spec)).stepforge_run
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self.run.argtypes = [
            integer, pointer, pointer, pointer, pointer, ctypes.c_double, pointer, pointer,
            ctypes.c_int, pointer, pointer, pointer,
        ]  # fmt: skip
        self.run.restype = None


class ReductionTable:
    """The addresses and sizes of parameters with dense memory, for a pass.

    Args:
        batch: the parameters. Other gradients may be bound later, and the table run with other
            coefficients.

    Raises:
        RuntimeError: there is no kernel for them.
    """

    def __init__(self, batch: Batch) -> None:
        spec = batch.spec
        kernel = reduction_for(spec)
        if isinstance(kernel, str):
            raise RuntimeError(
                f"there is no kernel for {', '.join(map(str, spec.dtypes))}: {kernel}"
            )
        self._kernel = kernel
        columns = [batch.columns[name] for name in spec.tensors]
        self._records = np.stack([addresses(column) for column in columns], axis=1)
        self._gradients = self._records[:, spec.tensors.index("g")] if "g" in spec.tensors else None
        self._sizes = np.array([x.numel() for x in columns[0]], np.int64)
        blocks = -(-self._sizes // BLOCK)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        count = len(spec.graph.reductions)
        number = np.float64 if spec.arithmetic == torch.float64 else np.float32
        self._coefficients = np.empty((len(batch), len(spec.graph.coefficients)), number)
        self._partial = np.empty((count, max(len(batch), int(self._starts[-1]))))
        self._totals = np.empty((len(batch) + 1, count))
        self._elements = int(self._sizes.sum())
        tables = (self._starts, self._sizes, self._records, self._coefficients)
        written = (self._partial, self._totals)
        self._addresses = [len(batch), *(table.ctypes.data for table in (*tables, *written))]

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts."""
        if self._gradients is not None:
            gradients.write_addresses(self._gradients)

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> np.ndarray[Any, Any]:
        """Return the reductions of each parameter, and in a last row those of all."""
        for position, values in enumerate(batch.coefficients):
            self._coefficients[:, position] = values
        factor = 1.0 if grad_scale is None else grad_scale.factor(batch.spec.arithmetic)
        rows, *tables = self._addresses
        self._kernel.run(rows, *tables[:4], factor, *tables[4:], *threads_for(self._elements))
        return self._totals.copy()


def reduction_for(spec: KernelSpec) -> Reduction | str:
    """Return the kernel of a pass, compiled at its first use; or why there is none."""
    return _reduction_for(spec, os.environ.get("STEPFORGE_ISA"))


@cache.made_once(prebuilt.circumstances)
def _reduction_for(spec: KernelSpec, _isa: str | None) -> Reduction | str:
    try:
        return Reduction(spec)
    except BuildError as error:
        return str(error)

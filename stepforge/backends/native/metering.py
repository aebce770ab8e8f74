"""The C of a step that makes reductions of what it stores, and of a pass, which stores nothing.

It goes through a parameter in the blocks of backends/reduction.py. The loop of a part keeps a
number of each element for each reduction. Then the rows of the part are reduced to one, from the
cache: to convert a number as it is loaded is faster than in a register. The rest follows once a
block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepforge.backends.native import combined
from stepforge.backends.native.combined import WAYS
from stepforge.backends.reduction import LANES, ROWS
from stepforge.backends.spec import KernelSpec
from stepforge.formats import BLOCK as CHUNK

__all__ = ["PART", "arguments", "frame", "functions", "numbers", "parameters", "reduced"]

#: The elements whose rows are reduced in one go, or a multiple of them.
PART = ROWS * LANES

# GCC would take vectors of floats apart before it converts them; each intrinsic is one instruction.
# The product of two floats is exact in double, so a fused addition rounds as any other.
_FLOATS = """\
/* Numbers in vectors of double: as many as the processor adds up at once. */
#ifdef __AVX512F__
#include <immintrin.h>
#define WIDTH 8
#define WIDENED(x) (vector)_mm512_cvtps_pd(_mm256_loadu_ps(x))
#define SQUARES(x, y) (vector)_mm512_fmadd_pd((__m512d)(y), (__m512d)(y), (__m512d)((x) * (x)))
#elif defined __FMA__
#include <immintrin.h>
#define WIDTH 4
#define WIDENED(x) (vector)_mm256_cvtps_pd(_mm_loadu_ps(x))
#define SQUARES(x, y) (vector)_mm256_fmadd_pd((__m256d)(y), (__m256d)(y), (__m256d)((x) * (x)))
#else
#define WIDTH 2
#define WIDENED(x) (vector){(x)[0], (x)[1]}
#define SQUARES(x, y) ((x) * (x) + (y) * (y))
#endif
typedef double vector __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
"""

_DOUBLES = """\
/* Numbers in vectors: as many as the processor adds up at once. */
#ifdef __AVX512F__
#define WIDTH 8
#elif defined __AVX__
#define WIDTH 4
#else
#define WIDTH 2
#endif
typedef double vector __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
#define WIDENED(x) *(const vector *)(x)
#define SQUARES(x, y) ((x) * (x) + (y) * (y))
"""

_SUM = """\
/* Adds up the rows of {what} in each part, the second half to the first. */
static INLINE void {op}_of_parts(double *restrict sums, const number *restrict x, int64_t count) {{
    for (int64_t i = 0; i < count; i += ROWS * LANES)
        for (int lane = 0; lane < LANES; lane += WIDTH) {{
            vector row[ROWS];
            for (int j = 0; j < ROWS; j++) row[j] = WIDENED(x + i + j * LANES + lane);
            *(vector *)(sums + i / ROWS + lane) = {pair}(row[0], row[2]) + {pair}(row[1], row[3]);
        }}
}}
"""

# Not by sum_of, because loops of vectors whose number is known take half the time.
_SUM_OF_PARTS = """\
/* Adds up the rows of all parts of a block, then the lanes. */
static INLINE double sum_of_parts(const double *rows) {
    const vector *other = (const vector *)(rows + REDUCED / ROWS / 2);
    vector sums[REDUCED / ROWS / WIDTH / 2];
    for (int i = 0; i < REDUCED / ROWS / WIDTH / 2; i++)
        sums[i] = *(const vector *)(rows + i * WIDTH) + other[i];
    for (int half = REDUCED / ROWS / WIDTH / 4; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[half + i];
    double lanes[WIDTH];
    for (int i = 0; i < WIDTH; i++) lanes[i] = sums[0][i];
    return sum_of_lanes(lanes, WIDTH);
}
"""

_LARGEST = """\
static INLINE void largest_of_parts(sort_key *restrict most, const sort_key *restrict x,
                                    int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            most[lane] = most[lane] > x[i + lane] ? most[lane] : x[i + lane];
    for (; i < count; i++) most[0] = most[0] > x[i] ? most[0] : x[i];
}

static INLINE double largest_of_row(const sort_key *x) {
    sort_key most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = most > x[lane] ? most : x[lane];
    return number_of(most);
}
"""

_COUNT = """\
static INLINE void count_of_parts(int32_t *restrict sums, const int32_t *restrict x,
                                  int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += x[i + lane];
    for (; i < count; i++) sums[0] += x[i];
}

static INLINE double count_of_row(const int32_t *x) {
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}
"""

#: The functions that reduce the rows of parts to one, and that row to a number.
_OF_PARTS = {
    "total": "#define SUM(x, y) ((x) + (y))\n\n"
    + _SUM.format(what="numbers", op="total", pair="SUM"),
    "squares": _SUM.format(what="squares", op="squares", pair="SQUARES"),
    "largest": _LARGEST,
    "count": _COUNT,
}


@dataclass(frozen=True)
class _Kept:
    """Rows of numbers that are kept of a block for a reduction.

    A sum has a row for each part, because parts are added up in an order of their own; any other
    has one row for all parts.

    Attributes:
        position: the position of the reduction.
        op: the reduction.
    """

    position: int
    op: str

    @property
    def name(self) -> str:
        """The name of the rows."""
        return f"rows{self.position}"

    @property
    def kind(self) -> str:
        """The type of their numbers."""
        return "double" if WAYS[self.op].is_sum else WAYS[self.op].kind

    @property
    def size(self) -> str:
        """The number of their numbers."""
        return "REDUCED / ROWS" if WAYS[self.op].is_sum else "LANES"

    @property
    def result(self) -> str:
        """The expression of the number of a block."""
        rows = f"k.{self.name}"
        if WAYS[self.op].is_sum:
            return f"sum_of_parts({rows})"
        return f"{self.op}_of_row({rows})"

    def begin(self, first: str) -> str:
        """Return the address of the row of a part, given its first element; "" for the first."""
        moved = first and WAYS[self.op].is_sum
        return f"{self.name} + {first} / ROWS" if moved else self.name


def functions(spec: KernelSpec) -> str:
    """Return the functions that reduce rows of parts, and the type of what is kept of a block."""
    kept = _kept(spec)
    needed = [_OF_PARTS[op] for op in dict.fromkeys(x.op for x in kept)]
    if any(WAYS[x.op].is_sum for x in kept):
        vectors = _DOUBLES if spec.arithmetic == torch.float64 else _FLOATS
        needed = [vectors, *needed, _SUM_OF_PARTS]
    return "\n".join(
        [
            combined.functions(spec),
            *needed,
            "/* What is kept of a block. */",
            "typedef struct {",
            *(f"    {x.kind} {x.name}[{x.size}];" for x in kept),
            "} kept;",
            "",
        ]
    )


def parameters(spec: KernelSpec) -> dict[str, str]:
    """Return the declarations of what is kept of a block, by name."""
    return {x.name: f"{x.kind} *restrict {x.name}" for x in _kept(spec)}


def arguments(spec: KernelSpec, first: str) -> dict[str, str]:
    """Return the arguments for :func:`parameters`, by name.

    Args:
        spec: the kernel.
        first: the position in its block of the first element; "" for the beginning.
    """
    return {x.name: f"k->{x.begin(first)}" for x in _kept(spec)}


def numbers(spec: KernelSpec, count: str) -> list[str]:
    """Return the declarations of what loops keep of so many elements."""
    return [f"{WAYS[x.op].kind} out{x.position}[{count}];" for x in _kept(spec)]


def reduced(spec: KernelSpec, count: str, room: str, first: str = "") -> list[str]:
    """Return the lines that reduce the rows of parts.

    Args:
        spec: the kernel.
        count: their elements.
        room: the elements of parts that are whole.
        first: the position of the first in the slice; "" for its beginning.
    """
    kept = _kept(spec)
    lines = []
    sums = [f"out{x.position}[i]" for x in kept if WAYS[x.op].is_sum]
    if sums and count != room:
        filled = f"{' = '.join(sums)} = -0.0f;    /* changes no sum, and is no memset */"
        lines += [f"for (int64_t i = {count}; i < {room}; i++)", f"    {filled}"]
    for x in kept:
        elements = room if WAYS[x.op].is_sum else count
        lines.append(f"{x.op}_of_parts({x.begin(first)}, out{x.position}, {elements});")
    return lines


def frame(spec: KernelSpec) -> str:
    """Return what follows the function of a slice, ``step_row``."""
    kept = _kept(spec)
    # Chunks may lack a part at the end of any row.
    has_all = "0" if spec.in_blocks else "size - first >= REDUCED"
    unit, until = (f" / {CHUNK}", "") if spec.in_blocks else ("", " fetch_until(0, size),")
    lines = [
        "const int64_t end = size - first < REDUCED ? size : first + REDUCED;",
        f"const int has_all = {has_all};    /* parts */",
        "kept k;",
        *(
            f"for (int i = 0; i < {x.size}; i++) k.{x.name}[i] = {WAYS[x.op].neutral};"
            for x in kept
            if not WAYS[x.op].is_sum
        ),
        *(
            f"for (int i = 0; !has_all && i < {x.size}; i++) k.{x.name}[i] = -0.0;"
            for x in kept
            if WAYS[x.op].is_sum
        ),
        f"step_row(at, c, unscale, first{unit}, end{unit},{until} &k);",
        *(f"partial[{x.position} * blocks] = {x.result};" for x in kept),
    ]
    body = "\n    ".join(lines)
    return f"""\
static APART void run_block(void *const *at, const number *c, number unscale,
                            int64_t first, int64_t size, double *partial, int64_t blocks) {{
    {body}
}}

{combined.frame(spec)}"""


def _kept(spec: KernelSpec) -> list[_Kept]:
    return [_Kept(n, node.op) for n, node in enumerate(spec.graph.reductions)]

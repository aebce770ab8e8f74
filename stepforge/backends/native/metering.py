"""The C of a step that makes reductions of what it stores, and of a pass, which stores nothing.

It goes through a parameter in the blocks of backends/reduction.py. The loops of a step keep what is
to be added up, and find the largest and the counts themselves: that costs little while the
processor waits for roots and quotients. Then the sums follow, from the cache: to convert a number
as it is loaded is faster than in a register. Memory would rest meanwhile, so they ask for parts of
the block after the next.
"""

from __future__ import annotations

import torch

from stepforge.backends.native import combined
from stepforge.backends.native.combined import WAYS
from stepforge.backends.native.dtypes import C_TYPES
from stepforge.backends.native.loops import measures
from stepforge.backends.spec import KernelSpec
from stepforge.formats import BLOCK as CHUNK

__all__ = ["filled", "frame", "kept", "outputs"]

# GCC would take vectors of floats apart before it converts them; each intrinsic is one instruction.
_WIDENED = """\
/* Numbers in vectors of double: as many as the processor adds up at once. */
#ifdef __AVX512F__
#include <immintrin.h>
#define WIDTH 8
#define WIDENED(x) _mm512_cvtps_pd(_mm256_loadu_ps(x))
#elif defined __AVX__
#include <immintrin.h>
#define WIDTH 4
#define WIDENED(x) _mm256_cvtps_pd(_mm_loadu_ps(x))
#else
#define WIDTH 2
#define WIDENED(x) (vector){(x)[0], (x)[1]}
#endif
typedef double vector __attribute__((vector_size(8 * WIDTH)));
#define VECTORS (REDUCED / 8 / WIDTH)
#define LINES (VECTORS / COLUMNS)    /* of each tensor that a sum asks for */
"""

_DOUBLES = """\
typedef double vector __attribute__((vector_size(16)));
#define WIDTH 2
#define WIDENED(x) (vector){(x)[0], (x)[1]}
#define VECTORS (REDUCED / 8 / WIDTH)
#define LINES (VECTORS / COLUMNS)    /* of each tensor that a sum asks for */
"""

_SUM = """\
/* Adds up {what} of some eighths of a block, the second half to the first, until one is left. */
static INLINE double {name}_of_eighths(const number *restrict x, int count, char *const *ahead,
                                       int64_t line) {{
    vector sums[VECTORS];
    for (int i = 0; i < VECTORS; i++) {{
        vector each[8];
        for (int j = 0; j < count; j++) {{
            const vector y = (vector)WIDENED(x + j * (REDUCED / 8) + i * WIDTH);
            each[j] = {each};
        }}
        for (int half = count / 2; half; half /= 2)
            for (int j = 0; j < half; j++) each[j] += each[half + j];
        sums[i] = each[0];
        if (count == 8 && ahead)
            __builtin_prefetch(ahead[i % COLUMNS] + 64 * (line + i / COLUMNS), 0, 1);
    }}
    for (int half = VECTORS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[half + i];
    double last[WIDTH];
    for (int i = 0; i < WIDTH; i++) last[i] = sums[0][i];
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) last[i] += last[half + i];
    return last[0];
}}

static APART double {name}_of_kept(number *restrict x, int64_t count, char *const *ahead,
                                   int64_t line) {{
    int64_t filled = REDUCED / 8;
    while (filled < count) filled *= 2;
    for (int64_t i = count; i < filled; i++) x[i] = -0.0f;    /* changes no sum, and is no memset */
    switch (filled / (REDUCED / 8)) {{
        case 1: return {name}_of_eighths(x, 1, ahead, line);
        case 2: return {name}_of_eighths(x, 2, ahead, line);
        case 4: return {name}_of_eighths(x, 4, ahead, line);
        default: return {name}_of_eighths(x, 8, ahead, line);
    }}
}}
"""

_SUMS = {
    "total": _SUM.format(name="total", what="all", each="y"),
    "squares": _SUM.format(name="squares", what="the squares", each="y * y"),
}


def kept(spec: KernelSpec) -> str:
    """Return the functions and the type of what the loops keep of a block."""
    reductions = spec.graph.reductions
    ops = dict.fromkeys(node.op for node in reductions if WAYS[node.op].is_sum)
    members = [
        f"{WAYS[node.op].kind} out{n}{'[REDUCED]' if WAYS[node.op].is_sum else ''};"
        for n, node in enumerate(reductions)
    ]
    return "\n".join(
        [
            combined.functions(spec),
            _DOUBLES if spec.arithmetic == torch.float64 else _WIDENED,
            *(_SUMS[op] for op in ops),
            "/* What the elements of a block are reduced to, or what is to be added up of them. */",
            "typedef struct {",
            *(f"    {member}" for member in members),
            "} kept;",
            "",
        ]
    )


def outputs(spec: KernelSpec, offset: str) -> dict[str, str]:
    """Return the arguments of a loop for reductions, by the parameters' names.

    Args:
        spec: the kernel.
        offset: the first element of the loop in its block; "" for the first.
    """
    begin = f" + {offset}" if offset else ""
    return {
        name: f"k->out{n}{begin}" if WAYS[node.op].is_sum else f"&k->out{n}"
        for (n, node), name in zip(enumerate(spec.graph.reductions), measures(spec))
    }


def filled(spec: KernelSpec) -> list[str]:
    """Return the lines that fill up a chunk with what changes no sum."""
    sums = [n for n, node in enumerate(spec.graph.reductions) if WAYS[node.op].is_sum]
    if not sums:
        return []
    return [
        "    for (int64_t j = count; j < BLOCK; j++)",
        f"        {' = '.join(f'k->out{n}[(block - low) * BLOCK + j]' for n in sums)} = -0.0f;",
    ]


def frame(spec: KernelSpec) -> str:
    """Return what follows the function of a slice, ``step_row``."""
    reductions = list(enumerate(spec.graph.reductions))
    unit = f" / {CHUNK}" if spec.in_blocks else ""
    starts = [
        f"k.out{n} = {WAYS[node.op].neutral};" for n, node in reductions if not WAYS[node.op].is_sum
    ]
    sums = [n for n, node in reductions if WAYS[node.op].is_sum]
    ends = [
        f"{node.op}_of_kept(k.out{n}, count, ahead, {sums.index(n)} * LINES)"
        if WAYS[node.op].is_sum
        else WAYS[node.op].of_block.format(out=f"k.out{n}")
        for n, node in reductions
    ]
    lines = [
        *_ahead(spec),
        "kept k;",
        *starts,
        f"step_row(at, c, unscale, first{unit}, (first + count){unit}, &k);",
        *(f"partial[{n} * blocks] = {end};" for n, end in enumerate(ends)),
    ]
    body = "\n    ".join(lines)
    return f"""\
static APART void run_block(void *const *at, const number *c, number unscale,
                            int64_t first, int64_t count, double *partial, int64_t blocks) {{
    {body}
}}

{combined.frame(spec)}"""


def _ahead(spec: KernelSpec) -> list[str]:
    """Return the lines that find what sums ask for. Chunks with scales ask for it themselves."""
    if spec.in_blocks:
        return ["char *const *ahead = 0;"]
    sizes = [f"sizeof({C_TYPES[dtype].memory})" for dtype in spec.dtypes]
    places = [f"(char *)at[{n}] + (first + 2 * REDUCED) * {size}" for n, size in enumerate(sizes)]
    return ["char *const ahead[] = {", *(f"    {place}," for place in places), "};"]

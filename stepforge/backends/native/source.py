"""The C source of a kernel: one function that steps any number of parameters.

Every operation is one C expression, in the program's order. The compiler may vectorize, but not
re-associate or contract, so the result has the reference's bits.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch

from stepforge.backends.native import loops, metering, parts
from stepforge.backends.native.dtypes import C_TYPES, conversions
from stepforge.backends.native.expressions import to_finite
from stepforge.backends.native.share import share_function
from stepforge.backends.spec import KernelSpec

__all__ = ["KernelArgs", "c_source"]

# One parallel region a call. libgomp is torch's own, handed in as pointers: linking would bring a
# second copy and with it a second pool of threads.
_WORK = """\
typedef struct {
    int64_t rows;
    const int64_t *starts;    /* rows + 1: the units before each row: its elements, or its blocks */
    void *const *records;     /* rows x RECORD: where tensors are, and what else a row has */
    const number *numbers;    /* rows x COEFFICIENTS */
    number unscale;           /* what gradients are multiplied by before all else */
    int (*thread)(void);      /* which thread this is; null where there is but one */
    int (*team)(void);        /* how many there are: perhaps fewer than were asked for */
} work;
"""

_EACH = """\
if (begin < stop)
    step_row(w->records + row * RECORD, w->numbers + row * COEFFICIENTS, w->unscale,
             begin - w->starts[row], stop - w->starts[row]);
"""

_RUN = """\
void stepforge_run(int64_t rows, const int64_t *starts, void *const *records,
                   const number *numbers, double unscale,
                   int threads, int (*thread)(void), int (*team)(void),
                   void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int alone = threads <= 1;
    number factor = (number)unscale;
    work w = {rows, starts, records, numbers, factor, alone ? 0 : thread, alone ? 0 : team};
    if (alone)
        share(&w);
    else
        parallel(share, &w, (unsigned)threads, 0);
}
"""

_FRAME = f"{_WORK}\n{share_function(_EACH)}{_RUN}"


@dataclass(frozen=True)
class KernelArgs:
    """The record of a parameter in a kernel's table: words of 64 bits, in this order.

    Attributes:
        tensors: the names of the tensors whose addresses come first.
        row_length: True if the elements of a row of dimension 0 come next.
        random: True if the last word has the index of the first element above, the step seed below.
    """

    tensors: tuple[str, ...]
    row_length: bool
    random: bool

    @classmethod
    def of(cls, spec: KernelSpec) -> KernelArgs:
        """Return the record of a kernel's parameters."""
        return cls(spec.tensors, spec.in_blocks, spec.is_random)

    @property
    def width(self) -> int:
        """The number of words."""
        return len(self.tensors) + self.row_length + self.random


def c_source(spec: KernelSpec) -> str:
    """Return the C source of a kernel."""
    double = spec.arithmetic == torch.float64
    args = KernelArgs.of(spec)
    metered = bool(spec.graph.reductions)
    bitcasts = bool(spec.formats) or any(node.uint32 for node in spec.graph.varying.nodes)
    texts = [conversions(spec.dtypes, bitcasts=bitcasts, stores=metered)]
    if any(node.op == "finite" for node in spec.graph.varying.nodes):
        texts += [to_finite(double=double)]
    texts += [parts.constants(spec)]
    texts += [metering.functions(spec)] if metered else []
    texts += loops.functions(spec)
    for stage in loops.stages(spec):
        texts += [loops.loop(stage, spec, double=double), parts.functions(stage, spec)]
    grain = 1 if args.row_length or metered else 64
    return f"""\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef {"double" if double else "float"} number;
#define COLUMNS {len(args.tensors)}
#define RECORD {args.width}
#define COEFFICIENTS {len(spec.graph.varying.given)}
#define GRAIN {grain}    /* of which a thread has a whole number */
#define AHEAD 3     /* rows: far enough for small ones to arrive in time, as measured */
/* Of functions that are not inlined: with its call GCC forgets what restrict promised. */
#define APART __attribute__((noinline))
/* Of functions that are: GCC writes half the code if it knows how many elements there are. */
#define INLINE inline __attribute__((always_inline))

{_joined(texts, indent=0)}
{_step_row(spec, args)}
{metering.frame(spec) if metered else _FRAME}"""


def _step_row(spec: KernelSpec, args: KernelArgs) -> str:
    """Return the function that passes a slice of a parameter to the loops.

    It passes the whole slice at once, or block by block if elements are converted or share scales.
    """
    written, read = set(spec.written), set(spec.read)
    widened = [name for name in args.tensors if C_TYPES[spec.dtype_of[name]].widen]
    metered = bool(spec.graph.reductions)
    lines = []
    for position, name in enumerate(args.tensors):
        const = "" if name in written else "const "
        memory = C_TYPES[spec.dtype_of[name]].memory
        lines.append(f"{const}{memory} *{loops.in_c(name)}_at = at[{position}];")
    for position, node in enumerate(spec.graph.varying.given):
        if node.boolean:
            comment = f"/* {loops.shown(node)} */"
            lines.append(f"const int c{position} = c[{position}] != 0;  {comment}")
    if args.random:
        lines += [
            f"const uint64_t random = (uint64_t)(uintptr_t)at[{args.width - 1}];",
            "const uint32_t start = (uint32_t)(random >> 32), key = (uint32_t)random;",
        ]
    at = "i" if args.row_length or widened else "low"
    given = {name: name for name in parts.parameters(spec)}
    given |= {"index": f"start + (uint32_t){at}"} if args.random else {}
    for name in spec.elements:
        c = loops.in_c(name)
        given[f"{c}_at"] = f"{c}_block" if name in widened else f"{c}_at + {at}"
    if not args.row_length:
        lines += [] if metered else ["const int64_t until = fetch_until(low, high);"]
        given["fetched"] = f"until - {at}"
    offset = "(block - low) * BLOCK" if args.row_length else "(i - low)" if widened else ""
    given |= metering.arguments(spec, offset)
    given.pop("count")
    arguments = ", ".join(given.values())
    lines += [f"float {loops.in_c(name)}_block[BLOCK];" for name in widened]
    if args.row_length:
        lines += _in_blocks(arguments, spec, args)
    elif widened:
        lines += [
            "for (int64_t i = low; i < high; i += BLOCK) {",
            "    const int64_t count = high - i < BLOCK ? high - i : BLOCK;",
            "    if (i < until) {",
            *_indented([parts.fetch_of(name, "i", "BLOCK") for name in widened], 8),
            "    }",
            *_conversions("widen", read, spec),
            *_indented(_call("step_elements", f"count, {arguments}")),
            *_conversions("narrow", written, spec),
            "}",
        ]
    else:
        lines += _call("step_elements", f"high - low, {arguments}")
    more = ["int64_t until"] if metered and not args.row_length else []
    more += ["kept *k"] if metered else []
    return f"""\
static void step_row(void *const *at, const number *c, number unscale,
                     {", ".join(["int64_t low", "int64_t high", *more])}) {{
    {_joined(lines)}
}}
"""


def _in_blocks(arguments: str, spec: KernelSpec, args: KernelArgs) -> list[str]:
    """Return the lines that step block by block; blocks restart at every row of dimension 0."""
    with_scales = spec.block_columns
    results = spec.block_results
    written, read = set(spec.written), set(spec.read)
    names = [stage.name for stage in loops.stages(spec)]
    old = ", ".join(f"{column}_at_scale_at[block]" for column in with_scales)
    scales = [
        f"{c}_at_scale_at[block] = new[{with_scales.index(c)}] = "
        f"{loops.scale_function(spec, c)}(largest[{n}]);"
        for n, c in enumerate(results)
    ]
    ahead = [parts.fetch_of(name, "i", "BLOCK") for name in spec.elements]
    whole = [_call(f"{name}_whole", arguments) for name in names]
    part = [_call(name, f"count, {arguments}") for name in names]
    return [
        *(f"number {column}_numbers[BLOCK];" for column in results),
        f"float new[{len(with_scales)}];",
        f"uint32_t largest[{len(with_scales)}];",
        f"const int64_t length = (int64_t)at[{len(args.tensors)}];",
        "const int64_t blocks = (length + BLOCK - 1) / BLOCK;",
        "int64_t first = low / blocks * length, within = low % blocks * BLOCK;",
        "for (int64_t block = low; block < high; block++) {",
        "    const int64_t i = first + within;",
        "    const int64_t count = length - within < BLOCK ? length - within : BLOCK;",
        f"    const float old[] = {{{old}}};",
        *_indented(ahead),
        *_conversions("widen", read, spec),
        "    if (count == BLOCK) {",
        *_indented([*whole[0], *scales, *itertools.chain(*whole[1:])], 8),
        "    } else {",
        *_indented([*part[0], *scales, *itertools.chain(*part[1:])], 8),
        "    }",
        *_conversions("narrow", written, spec),
        "    within += BLOCK;",
        "    if (within >= length) { within = 0; first += length; }",
        "}",
    ]


def _conversions(way: str, wanted: Container[str], spec: KernelSpec) -> list[str]:
    """Return the calls that convert a block of each tensor a loop cannot, to ``widen`` or back."""
    lines = []
    for name in spec.tensors:
        function, c = getattr(C_TYPES[spec.dtype_of[name]], way), loops.in_c(name)
        if function and name in wanted:
            ends = [f"{c}_at + i", f"{c}_block"]
            source, target = ends if way == "widen" else reversed(ends)
            lines.append(f"    {function}(count, {source}, {target});")
    return lines


def _call(name: str, arguments: str) -> list[str]:
    """Return the lines of a call."""
    return textwrap.wrap(f"{name}({arguments});", 80, subsequent_indent="    ")


def _indented(lines: Sequence[str], indent: int = 4) -> list[str]:
    return [f"{' ' * indent}{line}" for line in lines]


def _joined(lines: Sequence[str], indent: int = 4) -> str:
    """Join the lines of a body; the first one is indented already."""
    return f"\n{' ' * indent}".join(lines)

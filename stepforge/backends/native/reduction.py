"""The C source of a pass over the tensors that makes reductions, and its call.

What follows the blocks is in combined.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends import cache
from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import Batch, Gradients
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native import loops, prebuilt
from stepforge.backends.native.combined import WAYS, frame, functions, key_of
from stepforge.backends.native.dtypes import C_TYPES, conversions
from stepforge.backends.native.expressions import computed, results
from stepforge.backends.native.kernel import threads_for
from stepforge.backends.native.source import FETCH_AHEAD
from stepforge.backends.reduction import BLOCK
from stepforge.backends.spec import KernelSpec

__all__ = ["Reduction", "ReductionTable", "reduction_for", "reduction_source"]


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
#define LARGEST {"DBL_MAX" if double else "FLT_MAX"}
#define COLUMNS {len(spec.tensors)}
#define COEFFICIENTS {len(graph.coefficients)}
#define BLOCK {BLOCK}
#define RECORD COLUMNS
#define GRAIN 1
#define AHEAD 3     /* rows, as for steps */
#define APART __attribute__((noinline))
#define INLINE inline __attribute__((always_inline))

{conversions(spec.dtypes, bitcasts=bitcasts)}
{FETCH_AHEAD}
{functions(spec)}
{_element(spec, double=double)}
{_block(spec)}
{frame(spec)}"""


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
    declared += [f"{WAYS[node.op].kind} *out{n}" for n, node in enumerate(graph.reductions)]
    given = [*(f"{x}_in" for x in program.inputs), *(f"c{n}" for n in range(len(program.given)))]
    lines = [line for column in program.inputs for line in loops.read(column, spec)]
    lines += computed(program, given, number="number", double=double, prefix="x")
    kept = results(program, given, number="number", prefix="x")
    values = results(graph.measure, kept)
    for n, (node, value) in enumerate(zip(graph.reductions, values)):
        line = WAYS[node.op].kept.format(out=f"out{n}", value=value, key_of=key_of(node))
        lines.append(line)
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
    ways = {f"out{n}": WAYS[node.op] for n, node in enumerate(graph.reductions)}
    sums = [out for out, way in ways.items() if way.is_sum]
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
    lines += [
        f"double {out}[BLOCK];" if way.is_sum else f"{way.kind} {out} = {way.neutral};"
        for out, way in ways.items()
    ]
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
static APART void run_block(void *const *at, const number *c, number unscale,
                            int64_t first, int64_t count, double *partial, int64_t blocks) {{
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

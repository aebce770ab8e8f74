"""The functions around the loops: they step a slice of a parameter part by part.

A processor foresees which memory a loop reads next, but only up to the end of a page. Where a slice
is long, each part therefore asks for a later one. A part is also as much as a step with reductions
adds up at a time: while it does, the processor begins with the next.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from stepforge.backends.native import loops, metering
from stepforge.backends.native.dtypes import C_TYPES
from stepforge.backends.native.loops import Stage
from stepforge.backends.spec import KernelSpec
from stepforge.formats import BLOCK

__all__ = ["constants", "fetch_of", "functions", "parameters"]

_FETCH = """\
/* Asks for memory that is FAR elements ahead. */
static inline void fetch_ahead(const void *at, uintptr_t size, uintptr_t count) {
    uintptr_t begin = (uintptr_t)at + FAR * size;
    for (uintptr_t line = 0; line < count * size; line += 64)
        __builtin_prefetch((const void *)(begin + line));
}
"""

_UNTIL = """\
/* The element of a slice up to which later ones are asked for: of a short one, for none. */
static inline int64_t fetch_until(int64_t low, int64_t high) {
    return high - low < LONG ? low : high - FAR;
}
"""


def constants(spec: KernelSpec) -> str:
    """Return the macros of lengths, in elements, and the functions that ask for memory."""
    if spec.in_blocks:
        return f"""\
#define BLOCK {BLOCK}    /* elements that share a scale */
#define FAR {4 * BLOCK}    /* to ask for memory, as measured */

{_FETCH}"""
    # Of narrow numbers a vector has more, and a part has some vectors.
    part = metering.PART * (2 if min(dtype.itemsize for dtype in spec.dtypes) < 4 else 1)
    return f"""\
#define BLOCK 512    /* elements that stay in the first cache */
#define PART {part}    /* elements between two looks ahead: with more, they come in gusts */
#define FAR {3584 // spec.arithmetic.itemsize}    /* to ask for memory; a page is worse */
#define LONG 16384    /* of a slice: in a shorter one the processor does as well alone */

{_FETCH}
{_UNTIL}"""


def fetch_of(tensor: str, first: str, count: str) -> str:
    """Return the call that asks for what is ahead of some elements of a tensor."""
    at = f"{loops.in_c(tensor)}_at"
    return f"fetch_ahead({at} + {first}, sizeof *{at}, {count});"


def parameters(spec: KernelSpec) -> dict[str, str]:
    """Return the declarations of the parameters of a function of parts, by name.

    The first is the number of elements. Those before ``fetched`` ask for later ones.
    """
    declared = loops.parameters(spec)
    count = {"count": declared.pop("count")}
    fetched = {} if spec.in_blocks else {"fetched": "int64_t fetched"}
    return count | fetched | declared | metering.parameters(spec)


def functions(stage: Stage, spec: KernelSpec) -> str:
    """Return the function that calls a loop; in blocks, also that of a whole one, ``..._whole``."""
    return _of_blocks(stage, spec) if spec.in_blocks else _of_slices(stage, spec)


def _of_slices(stage: Stage, spec: KernelSpec) -> str:
    in_memory = [name for name in spec.elements if not C_TYPES[spec.dtype_of[name]].widen]
    ahead = [fetch_of(name, "low", "PART") for name in in_memory]
    part = _call(stage, spec, "PART", "low")
    rest = _call(stage, spec, "count - low", "low")
    if not spec.graph.reductions:
        body = [
            "int64_t low = 0;",
            *_block("for (; low < fetched && low + PART <= count; low += PART)", ahead + part),
            *rest,
        ]
    else:
        body = [
            *metering.numbers(spec, "PART"),
            "int64_t low = 0;",
            *_block(
                "for (; low + PART <= count; low += PART)",
                [
                    *part,
                    *_block("if (low < fetched)", ahead),  # memory rests while numbers add up
                    *metering.reduced(spec, "PART", "PART", "low"),
                ],
            ),
            *_block(
                "if (low < count)",
                [*rest, *metering.reduced(spec, "count - low", "PART", "low")],
            ),
        ]
    return _function(stage.name, list(parameters(spec).values()), body)


def _of_blocks(stage: Stage, spec: KernelSpec) -> str:
    metered = bool(spec.graph.reductions) and not stage.holds
    numbers = metering.numbers(spec, "BLOCK") if metered else []
    # For a whole block with the usual arguments, the compiler drops operations without effect.
    usual = {"unscale": "1", **dict.fromkeys(loops.conditions(spec), "1")}
    is_usual = " && ".join(f"{name} == {value}" for name, value in usual.items())
    whole = [
        f"if ({is_usual})",
        *_indented(_call(stage, spec, "BLOCK", **usual)),
        "else",
        *_indented(_call(stage, spec, "BLOCK")),
    ]
    part = _call(stage, spec, "count")
    if metered:
        part += metering.reduced(spec, "count", "BLOCK")
        whole += metering.reduced(spec, "BLOCK", "BLOCK")
    declared = list(parameters(spec).values())
    return "\n".join(
        [
            _function(stage.name, declared, [*numbers, *part]),
            _function(f"{stage.name}_whole", declared[1:], [*numbers, *whole]),
        ]
    )


def _call(stage: Stage, spec: KernelSpec, count: str, first: str = "", **others: str) -> list[str]:
    """Return the lines that call a loop.

    Args:
        stage: the loop.
        spec: the kernel.
        count: the number of elements.
        first: the first of them; "" for the first of all.
        others: arguments that are not the variables of their names.
    """
    names = [*loops.parameters(spec), *(() if stage.holds else loops.kept(spec))]
    given = {name: name for name in names} | {"count": count} | others
    if first:
        given |= {at: f"{at} + {first}" for at in (f"{loops.in_c(x)}_at" for x in spec.elements)}
        if "index" in given:
            given["index"] = f"index + (uint32_t){first}"
    call = f"{stage.name}_inline({', '.join(given.values())});"
    return textwrap.wrap(call, 80, subsequent_indent="    ")


def _function(name: str, declared: Sequence[str], body: Sequence[str]) -> str:
    return f"""\
static APART void {name}(
    {_joined(declared, ",")}
) {{
    {_joined(body)}
}}
"""


def _block(head: str, body: Sequence[str]) -> list[str]:
    return [f"{head} {{", *_indented(body), "}"]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _joined(lines: Sequence[str], separator: str = "") -> str:
    """Join the lines of a body; the first one is indented already."""
    return f"{separator}\n    ".join(lines)

"""The loops over elements: what is read, computed by the rule's program, and written.

One loop does all of it, unless results share scales. Then there are two, for each block: the first
computes those results and finds the largest of each, of which its scale is made; the second encodes
them and computes the rest, so that the processor, which waits for roots and quotients, has other
work in the meantime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepforge.backends.memory import elements_of_graph
from stepforge.backends.native.expressions import computed, results
from stepforge.backends.native.storage import STORAGE
from stepforge.expr import Expr, Graph, Program
from stepforge.formats import DRAW, Format, apart, tensor_name

__all__ = ["Stage", "functions", "in_c", "loop", "parameters", "scaled", "shown", "stages"]


@dataclass(frozen=True)
class Stage:
    """What one loop computes.

    Attributes:
        name: of its function.
        program: what it computes.
        columns: the names of the results.
        known: the columns whose results the program is given.
    """

    name: str
    program: Program
    columns: tuple[str, ...]
    known: tuple[str, ...] = ()


def scaled(graph: Graph, formats: Mapping[str, Format]) -> list[str]:
    """The results that are stored with scales."""
    return [c for c in graph.results if c in formats and formats[c].in_blocks]


def stages(graph: Graph, formats: Mapping[str, Format]) -> list[Stage]:
    """The loops of a kernel, in order."""
    program = graph.varying
    first = tuple(scaled(graph, formats))
    if not first:
        return [Stage("step_elements", program, graph.results)]
    nodes = dict(zip(graph.results, (program.nodes[register] for register in program.outputs)))
    rest = tuple(column for column in graph.results if column not in first)
    known = list(dict.fromkeys(nodes[column] for column in first))
    return [
        Stage("begin_block", Program.of([nodes[c] for c in first], program.given), first),
        Stage(
            "finish_block",
            Program.of([nodes[c] for c in rest], [*program.given, *known]),
            rest,
            tuple(next(c for c in first if nodes[c] is node) for node in known),
        ),
    ]


def functions(formats: Mapping[str, Format]) -> list[str]:
    """The functions that the loops call."""
    texts = []
    if any(format_.is_random for format_ in formats.values()):
        texts.append(f"""\
static inline uint32_t draw(uint32_t index, uint32_t key) {{
    {_joined(computed(DRAW, ["index", "key"]))}
    return {results(DRAW, ["index", "key"])[0]};
}}
""")
    # All formats with scales make them in the same way.
    for scale in [format_.scale for format_ in formats.values() if format_.scale][:1]:
        texts.append(f"""\
static inline float scale_of(uint32_t largest) {{
    {_joined(computed(scale, ["largest"]))}
    return {results(scale, ["largest"])[0]};
}}
""")
    return texts


def parameters(
    graph: Graph, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format]
) -> dict[str, str]:
    """What every loop of a kernel is given: declarations by name, the number of elements first."""
    declared = {"count": "int64_t count", "c": "const number *c", "unscale": "number unscale"}
    declared |= {name: f"int {name}" for name in _choices(graph)}
    if any(format_.is_random for format_ in formats.values()):
        declared |= {"index": "uint32_t index", "key": "uint32_t key"}
    for name in elements_of_graph(graph, formats):
        const = "" if name.partition(".")[0] in graph.results else "const "
        c = f"{in_c(name)}_at"
        declared[c] = f"{const}{STORAGE[dtypes[name]].element} *restrict {c}"
    with_scales = scaled(graph, formats)
    declared |= {f"{c}_numbers": f"number *restrict {c}_numbers" for c in with_scales}
    if any(format_.in_blocks for format_ in formats.values()):
        declared |= {
            "old": "const float *restrict old",  # scales
            "new": "const float *restrict new",
            "largest": "uint32_t *restrict largest",
        }
    return declared


def loop(
    stage: Stage,
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    formats: Mapping[str, Format],
    *,
    double: bool,
) -> str:
    """The function of a loop; in blocks, also that of a whole block, ``..._whole``."""
    program = stage.program
    with_scales = scaled(graph, formats)
    coefficients = graph.varying.given
    lines = [
        f"const number c{position} = c[{position}];  /* {shown(node)} */"
        for position, node in enumerate(coefficients)
        if not node.boolean
    ]
    begins = stage.name == "begin_block"
    stored = [*stage.columns, *([] if begins else with_scales)]
    if begins:
        lines += [f"uint32_t {column}_largest = 0;" for column in with_scales]
    else:
        lines += [
            f"uint32_t {column}_word = draw(index, key + {_apart(graph, column)});"
            for column in stored
            if column in formats and formats[column].is_random
        ]
    body = []
    for column in program.inputs:
        body += _read(column, dtypes, formats)
    known = [f"{column}_new" for column in stage.known]
    body += [f"const number {column}_new = {column}_numbers[i];" for column in stage.known]
    given = [*(f"{c}_in" for c in program.inputs), *(f"c{n}" for n in range(len(coefficients)))]
    given += known
    # Codes stand for no infinity, which saves a kernel that has no time for it the test.
    finite = {n for n, c in enumerate(program.inputs) if c in formats and formats[c].in_blocks}
    body += computed(program, given, number="number", double=double, prefix="x", finite=finite)
    values = results(program, given, number="number", prefix="x", finite=finite)
    for column, value in zip(stage.columns, values):
        body += (
            _kept(column, value, formats) if begins else _written(column, value, dtypes, formats)
        )
    if not begins:
        for column in with_scales:
            body += _written(column, f"{column}_numbers[i]", dtypes, formats)
    lines += ["for (int64_t i = 0; i < count; i++) {", *(f"    {line}" for line in body), "}"]
    if begins:
        lines += [f"largest[{n}] = {column}_largest;" for n, column in enumerate(with_scales)]
    return _function(stage.name, parameters(graph, dtypes, formats), lines, graph, formats)


def _function(
    name: str,
    declared: Mapping[str, str],
    lines: Sequence[str],
    graph: Graph,
    formats: Mapping[str, Format],
) -> str:
    if not any(format_.in_blocks for format_ in formats.values()):
        return f"""\
static APART void {name}(
    {_joined(list(declared.values()), ",")}
) {{
    {_joined(lines)}
}}
"""
    # Of a whole block that is given what usually is, the compiler knows what has no effect.
    usual = {"count": "BLOCK", "unscale": "1", **dict.fromkeys(_choices(graph), "1")}
    is_usual = " && ".join(f"{name} == {value}" for name, value in usual.items() if name != "count")
    given = list(declared)
    whole = ["BLOCK", *given[1:]]
    return f"""\
static INLINE void {name}_inline(
    {_joined(list(declared.values()), ",")}
) {{
    {_joined(lines)}
}}

static APART void {name}(
    {_joined(list(declared.values()), ",")}
) {{
    {name}_inline({", ".join(given)});
}}

static APART void {name}_whole(
    {_joined(list(declared.values())[1:], ",")}
) {{
    if ({is_usual})
        {name}_inline({", ".join(usual.get(name, name) for name in given)});
    else
        {name}_inline({", ".join(whole)});
}}
"""


def _apart(graph: Graph, column: str) -> str:
    return f"UINT32_C({apart(graph.results.index(column)):#x})"


def _choices(graph: Graph) -> list[str]:
    """The names of the coefficients that are true or false."""
    return [f"c{n}" for n, node in enumerate(graph.varying.given) if node.boolean]


def _read(
    column: str, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format]
) -> list[str]:
    """The lines that make a number, ``{column}_in``, of what is stored."""
    if column not in formats:
        read = STORAGE[dtypes[column]].read.format(f"{column}_at[i]")
        return [f"const number {column}_in = {read}{' * unscale' if column == 'g' else ''};"]
    format_ = formats[column]
    lines = []
    for part in format_.elements:
        kind = "float" if part.dtype.is_floating_point else "uint32_t"
        read = STORAGE[part.dtype].read.format(f"{in_c(tensor_name(column, part))}_at[i]")
        lines.append(f"const {kind} {part.name or 'stored'} = {read};")
    if format_.in_blocks:
        lines.append(f"const float scale = old[{_scale_of(column, formats)}];")
    given = format_.decode.inputs
    lines += computed(format_.decode, given)
    lines.append(f"{column}_in = {results(format_.decode, given)[0]};")
    return [f"number {column}_in;", "{", *(f"    {line}" for line in lines), "}"]


def _kept(column: str, value: str, formats: Mapping[str, Format]) -> list[str]:
    """The lines that keep a number until the scale of its block is known."""
    size = formats[column].size
    assert size is not None
    largest = f"{column}_largest"
    return [
        f"{column}_numbers[i] = {value};",
        f"{{ const float x = (float){value};",
        *(f"    {line}" for line in computed(size, ["x"])),
        "    {0} = {1} > {0} ? {1} : {0}; }}".format(largest, results(size, ["x"])[0]),
    ]


def _written(
    column: str, value: str, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format]
) -> list[str]:
    """The lines that store a number."""
    if column not in formats:
        return [f"{column}_at[i] = {STORAGE[dtypes[column]].write.format(value)};"]
    format_ = formats[column]
    program = format_.encode
    lines = [f"const float x = (float){value};"]
    if format_.is_random:
        # From one element to the next, what is drawn grows by the same.
        lines += [f"const uint32_t random = {column}_word;", f"{column}_word += draw(1, 0);"]
    if format_.in_blocks:
        lines.append(f"const float scale = new[{_scale_of(column, formats)}];")
    lines += computed(program, program.inputs)
    for part, result in zip(format_.elements, results(program, program.inputs)):
        at = f"{in_c(tensor_name(column, part))}_at[i]"
        lines.append(f"{at} = {STORAGE[part.dtype].write.format(result)};")
    return ["{", *(f"    {line}" for line in lines), "}"]


def _scale_of(column: str, formats: Mapping[str, Format]) -> int:
    """The number of a column among those that have scales."""
    return [c for c, format_ in formats.items() if format_.in_blocks].index(column)


def in_c(name: str) -> str:
    """The name of a tensor in C, where that of a state may be any but cannot end in ``_at``."""
    column, _, part = name.partition(".")
    return f"{column}_at_{part}" if part else column


def _joined(lines: Sequence[str], separator: str = "") -> str:
    """The lines of a body, the first of which is indented already."""
    return f"{separator}\n    ".join(lines)


def shown(node: Expr) -> str:
    """What a coefficient is made from, for a comment."""
    text = str(node)
    return text if len(text) <= 54 else text[:51] + "..."

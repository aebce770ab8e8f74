"""The loops over elements: read, compute by the rule's program, write.

One loop does all of it, unless elements of a result share scales. Then each block takes two loops.
The first computes those results and their maxima, which set the scales. The second encodes them and
computes the rest, so the processor has other work while it waits for roots and quotients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepforge.backends.native.combined import WAYS, key_of
from stepforge.backends.native.dtypes import C_TYPES
from stepforge.backends.native.expressions import computed, results
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Expr
from stepforge.formats import DRAW, Format, Part, result_salt, tensor_name
from stepforge.program import NEW_P, Program

__all__ = [
    "Stage",
    "conditions",
    "functions",
    "in_c",
    "kept",
    "loop",
    "parameters",
    "read",
    "scale_function",
    "shown",
    "stages",
]


@dataclass(frozen=True)
class Stage:
    """The work of one loop.

    Attributes:
        name: the name of its function.
        program: the computation.
        columns: the names of the results.
        known: the columns whose results an earlier stage has computed.
        holds: True if it holds its results until the scales of the block are known.
    """

    name: str
    program: Program
    columns: tuple[str, ...]
    known: tuple[str, ...] = ()
    holds: bool = False


def stages(spec: KernelSpec) -> list[Stage]:
    """Return the loops of a kernel, in order."""
    graph = spec.graph
    program = graph.varying
    first = spec.block_results
    if not first:
        return [Stage("step_elements", program, graph.results)]
    nodes = dict(zip(graph.results, (program.nodes[register] for register in program.outputs)))
    rest = tuple(column for column in graph.results if column not in first)
    known = list(dict.fromkeys(nodes[column] for column in first))
    measured = [program.nodes[register] for register in program.outputs[len(graph.results) :]]
    return [
        Stage(
            "begin_block", Program.of([nodes[c] for c in first], program.given), first, holds=True
        ),
        Stage(
            "finish_block",
            Program.of([*(nodes[c] for c in rest), *measured], [*program.given, *known]),
            rest,
            tuple(next(c for c in first if nodes[c] is node) for node in known),
        ),
    ]


def functions(spec: KernelSpec) -> list[str]:
    """Return the functions that the loops call."""
    texts = []
    if spec.is_random:
        texts.append(f"""\
static inline uint32_t draw(uint32_t index, uint32_t key) {{
    {_joined(computed(DRAW, ["index", "key"]))}
    return {results(DRAW, ["index", "key"])[0]};
}}
""")
    for name, body in _scale_functions(spec).items():
        texts.append(f"""\
static inline float {name}(uint32_t largest) {{
    {body}
}}
""")
    return texts


def scale_function(spec: KernelSpec, column: str) -> str:
    """Return the name of the function that makes the scales of a column."""
    body = _scale_body(spec.formats[column])
    return next(name for name, other in _scale_functions(spec).items() if other == body)


def _scale_functions(spec: KernelSpec) -> dict[str, str]:
    """Return the body of each scale's function, by its name; formats that scale alike share it."""
    bodies = dict.fromkeys(_scale_body(x) for _, x in spec.format_items if x.in_blocks)
    return {f"scale_of_{n}" if n else "scale_of": body for n, body in enumerate(bodies)}


def _scale_body(format_: Format) -> str:
    """Return the body of the function of a block's scale, given the largest word in it."""
    assert format_.scale is not None
    given = ["largest"]
    lines = computed(format_.scale, given)
    return _joined([*lines, f"return {results(format_.scale, given)[0]};"])


def parameters(spec: KernelSpec) -> dict[str, str]:
    """Return the declarations of a loop's parameters, by name; the number of elements is first."""
    declared = {"count": "int64_t count", "c": "const number *c", "unscale": "number unscale"}
    declared |= {name: f"int {name}" for name in conditions(spec)}
    if spec.is_random:
        declared |= {"index": "uint32_t index", "key": "uint32_t key"}
    for name in spec.elements:
        const = "" if name.partition(".")[0] in spec.graph.results else "const "
        c = f"{in_c(name)}_at"
        declared[c] = f"{const}{C_TYPES[spec.dtype_of[name]].element} *restrict {c}"
    with_scales = spec.block_results
    declared |= {f"{c}_numbers": f"number *restrict {c}_numbers" for c in with_scales}
    if spec.in_blocks:
        declared |= {
            "old": "const float *restrict old",  # scales
            "new": "const float *restrict new",
            "largest": "uint32_t *restrict largest",
        }
    return declared


def kept(spec: KernelSpec) -> dict[str, str]:
    """Return the declarations of what a loop keeps of each element, for the reductions, by name."""
    kinds = [WAYS[node.op].kind for node in spec.graph.reductions]
    return {f"out{n}": f"{kind} *restrict out{n}" for n, kind in enumerate(kinds)}


def loop(stage: Stage, spec: KernelSpec, *, double: bool) -> str:
    """Return the function of a loop, ``..._inline``."""
    program, formats = stage.program, spec.formats
    with_scales = spec.block_results
    coefficients = spec.graph.varying.given
    lines = [
        f"const number c{position} = c[{position}];  /* {shown(node)} */"
        for position, node in enumerate(coefficients)
        if not node.boolean
    ]
    stored = [*stage.columns, *([] if stage.holds else with_scales)]
    if stage.holds:
        lines += [f"uint32_t {column}_largest = 0;" for column in with_scales]
    else:
        lines += [
            f"uint32_t {column}_word = draw(index, key + {_salt(spec, column)});"
            for column in stored
            if column in formats and formats[column].is_random
        ]
    body = []
    for column in program.inputs:
        body += read(column, spec)
    known = [f"{column}_new" for column in stage.known]
    body += [f"const number {column}_new = {column}_numbers[i];" for column in stage.known]
    given = [*(f"{c}_in" for c in program.inputs), *(f"c{n}" for n in range(len(coefficients)))]
    given += known
    # Without infinities, `finite` has nothing to replace and is skipped.
    finite = {
        n for n, c in enumerate(program.inputs) if c in formats and not formats[c].has_infinity
    }
    body += computed(program, given, number="number", double=double, prefix="x", finite=finite)
    values = results(program, given, number="number", prefix="x", finite=finite)
    for column, value in zip(stage.columns, values):
        body += (
            _hold(column, value, formats[column]) if stage.holds else _write(column, value, spec)
        )
    if not stage.holds:
        for column in with_scales:
            body += _write(column, f"{column}_numbers[i]", spec)
    declared = parameters(spec)
    if not stage.holds:
        declared |= kept(spec)
        body += _keep(spec, values[len(stage.columns) :], double=double)
    lines += ["for (int64_t i = 0; i < count; i++) {", *(f"    {line}" for line in body), "}"]
    if stage.holds:
        lines += [f"largest[{n}] = {column}_largest;" for n, column in enumerate(with_scales)]
    return f"""\
static INLINE void {stage.name}_inline(
    {_joined(list(declared.values()), ",")}
) {{
    {_joined(lines)}
}}
"""


def _salt(spec: KernelSpec, column: str) -> str:
    return f"UINT32_C({result_salt(spec.graph.results.index(column)):#x})"


def conditions(spec: KernelSpec) -> list[str]:
    """Return the names of the boolean coefficients."""
    return [f"c{n}" for n, node in enumerate(spec.graph.varying.given) if node.boolean]


def read(column: str, spec: KernelSpec) -> list[str]:
    """Return the lines that read a column into the number ``{column}_in``."""
    if column not in spec.formats:
        read = C_TYPES[spec.dtype_of[column]].read.format(f"{column}_at[i]")
        return [f"const number {column}_in = {read}{' * unscale' if column == 'g' else ''};"]
    format_ = spec.formats[column]
    lines = []
    for part in format_.elements:
        read = C_TYPES[part.dtype].read.format(f"{in_c(tensor_name(column, part))}_at[i]")
        lines.append(f"const {_stored_type(part)} {part.name or 'stored'} = {read};")
    if format_.in_blocks:
        lines.append(f"const float scale = old[{_scale_index(column, spec)}];")
    given = format_.decode.inputs
    lines += computed(format_.decode, given)
    lines.append(f"{column}_in = {results(format_.decode, given)[0]};")
    return [f"number {column}_in;", "{", *(f"    {line}" for line in lines), "}"]


def _hold(column: str, value: str, format_: Format) -> list[str]:
    """Return the lines that hold a number until the scale of its block is known."""
    magnitude = format_.magnitude
    assert magnitude is not None
    largest = f"{column}_largest"
    return [
        f"{column}_numbers[i] = {value};",
        f"{{ const float x = (float){value};",
        *(f"    {line}" for line in computed(magnitude, ["x"])),
        "    {0} = {1} > {0} ? {1} : {0}; }}".format(largest, results(magnitude, ["x"])[0]),
    ]


def _write(column: str, value: str, spec: KernelSpec) -> list[str]:
    """Return the lines that store a number; of a parameter, also those that know what is stored."""
    reads_back = column == "p" and NEW_P in spec.graph.measure.inputs
    if column not in spec.formats:
        kind = C_TYPES[spec.dtype_of[column]]
        lines = [f"{column}_at[i] = {kind.write.format(value)};"]
        if reads_back:
            lines.append(f"const number {NEW_P}_in = {kind.stored.format(value)};")
        return lines
    format_ = spec.formats[column]
    program = format_.encode
    lines = [f"const float x = (float){value};"]
    if format_.is_random:
        # Each draw is the one before plus a constant.
        lines += [f"const uint32_t random = {column}_word;", f"{column}_word += draw(1, 0);"]
    if format_.in_blocks:
        lines.append(f"const float scale = new[{_scale_index(column, spec)}];")
    lines += computed(program, program.inputs)
    written = list(zip(format_.elements, results(program, program.inputs)))
    for part, result in written:
        at = f"{in_c(tensor_name(column, part))}_at[i]"
        lines.append(f"{at} = {C_TYPES[part.dtype].write.format(result)};")
    if not reads_back:
        return ["{", *(f"    {line}" for line in lines), "}"]
    stored = [
        f"const {_stored_type(part)} {part.name or 'stored'} = "
        f"{C_TYPES[part.dtype].stored.format(result)};"
        for part, result in written
    ]
    given = format_.decode.inputs
    stored += computed(format_.decode, given)
    stored.append(f"{NEW_P}_in = {results(format_.decode, given)[0]};")
    lines += ["{", *(f"    {line}" for line in stored), "}"]
    return [f"number {NEW_P}_in;", "{", *(f"    {line}" for line in lines), "}"]


def _stored_type(part: Part) -> str:
    """Return the C type of what is stored in a part of a format."""
    return "float" if part.dtype.is_floating_point else "uint32_t"


def _keep(spec: KernelSpec, values: Sequence[str], *, double: bool) -> list[str]:
    """Return the lines that keep what is to be reduced of an element.

    Args:
        spec: the kernel.
        values: what the measure is given.
        double: True if the arithmetic is double.
    """
    graph = spec.graph
    new_p = f"{NEW_P}_in" if "p" in graph.results else "p_in"
    given = [*(new_p for _ in graph.measure.inputs), *values]
    lines = computed(graph.measure, given, number="number", double=double, prefix="y")
    operands = results(graph.measure, given, number="number", prefix="y")
    for n, (node, operand) in enumerate(zip(graph.reductions, operands)):
        number = WAYS[node.op].kept.format(value=operand, key_of=key_of(node))
        lines.append(f"out{n}[i] = {number};")
    return lines


def _scale_index(column: str, spec: KernelSpec) -> int:
    """Return the position of a column among those with scales."""
    return spec.block_columns.index(column)


def in_c(name: str) -> str:
    """Return the C name of a tensor. A state may have any name that does not end in ``_at``."""
    column, _, part = name.partition(".")
    return f"{column}_at_{part}" if part else column


def _joined(lines: Sequence[str], separator: str = "") -> str:
    """Join the lines of a body; the first one is indented already."""
    return f"{separator}\n    ".join(lines)


def shown(node: Expr) -> str:
    """Return the expression of a coefficient, shortened for a comment."""
    text = str(node)
    return text if len(text) <= 54 else text[:51] + "..."

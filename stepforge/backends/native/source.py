"""The varying program of a graph as C: one function that steps any number of tensors.

Every operation is one C expression on ``float`` (``double`` for float64 parameters), in the
program's order; the compiler may vectorize but not re-associate or contract, so the result has the
reference's bits.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from stepforge.backends.native.storage import STORAGE, conversions
from stepforge.expr import Graph, Program
from stepforge.formats import BLOCK, DRAW, Format, Part, tensor_name, tensors_of

#: What an operation is in C; operands are names of variables, or numbers. ``{number}`` is the type
#: of the arithmetic, and ``{f}`` the suffix of its functions: ``f``, or nothing for double.
OPERATIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "fabs{f}({0})",
    "sqrt": "sqrt{f}({0})",
    "sign": "({number})(({0} > 0) - ({0} < 0))",
    "maximum": "({0} >= {1} || {0} != {0} ? {0} : {1}) + 0",
    "minimum": "({0} <= {1} || {0} != {0} ? {0} : {1}) + 0",
    "finite": "{0} > LARGEST ? LARGEST : {0} < -LARGEST ? -LARGEST : {0}",
    "where": "{0} ? {1} : {2}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "word_add": "{0} + {1}",
    "word_sub": "{0} - {1}",
    "word_mul": "{0} * {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    "bits": "to_bits({0})",
    "from_bits": "from_bits({0})",
    "number": "({number})(int32_t){0}",
    "word": "(uint32_t)(int32_t){0}",
}


# One parallel region a call. libgomp is torch's own, handed in as pointers: linking would bring a
# second copy and with it a second pool of threads.
_DRIVER = """\
typedef struct {
    int64_t rows;
    const int64_t *starts;    /* rows + 1: the units before each row: its elements, or its blocks */
    void *const *records;     /* rows x RECORD: where tensors are, and what else a row has */
    const number *numbers;    /* rows x COEFFICIENTS */
    number unscale;           /* what gradients are multiplied by before all else */
    int (*thread)(void);      /* which thread this is; null where there is but one */
    int (*team)(void);        /* how many there are: perhaps fewer than were asked for */
} work;

/* Asks for where a row begins: the processor foresees what follows, but not that. */
static void fetch(const work *w, int64_t row) {
    for (int column = 0; row < w->rows && column < COLUMNS; column++)
        __builtin_prefetch(w->records[row * RECORD + column]);
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
            step_row(w->records + row * RECORD, w->numbers + row * COEFFICIENTS, w->unscale,
                     begin - w->starts[row], stop - w->starts[row]);
        begin = stop;
    }
}

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


def columns_of(graph: Graph) -> tuple[str, ...]:
    """What a kernel is given for each row: what it reads, then what it only writes."""
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


@dataclass(frozen=True)
class Record:
    """What a kernel is told of a row: words of 64 bits, in this order.

    Attributes:
        tensors: the names of the tensors whose addresses come first.
        length: whether then comes how many elements a row of dimension 0 has.
        random: whether then comes what random bits follow from: the index of the first element
            above, the key below.
    """

    tensors: tuple[str, ...]
    length: bool
    random: bool

    @classmethod
    def of(cls, graph: Graph, formats: Mapping[str, Format]) -> Record:
        """The record of a graph's rows."""
        names = (name for column in columns_of(graph) for name in tensors_of(column, formats))
        used = [formats[column] for column in columns_of(graph) if column in formats]
        return cls(tuple(names), any(x.in_blocks for x in used), any(x.is_random for x in used))

    @property
    def width(self) -> int:
        """How many words there are."""
        return len(self.tensors) + self.length + self.random


def c_source(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    arithmetic: torch.dtype,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> str:
    """The C source of a kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype of each tensor of its :class:`Record`.
        arithmetic: float32 or float64.
        formats: of the columns that have one.
    """
    double = arithmetic == torch.float64
    record = Record.of(graph, formats)
    used = {column: formats[column] for column in columns_of(graph) if column in formats}
    texts = [conversions((dtypes[name] for name in record.tensors), words=bool(used))]
    if record.random:
        texts.append(_draw())
    scaled = [column for column in graph.results if _in_blocks(column, used)]
    texts += [_scale_function(used[column]) for column in scaled[:1]]
    texts += [_write_function(column, used[column]) for column in scaled]
    return f"""\
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef {"double" if double else "float"} number;
#define LARGEST {"DBL_MAX" if double else "FLT_MAX"}
#define COLUMNS {len(record.tensors)}
#define RECORD {record.width}
#define COEFFICIENTS {len(graph.varying.given)}
#define BLOCK {BLOCK if record.length else 512}    /* elements that stay in the first cache */
#define GRAIN {1 if record.length else 64}    /* of which a thread has a whole number */
#define AHEAD 3     /* rows: far enough for small ones to arrive in time, as measured */
/* Of functions that are not inlined: with its call GCC forgets what restrict promised. */
#define APART __attribute__((noinline))
/* Of functions that are: GCC writes half the code if it knows how many elements there are. */
#define INLINE inline __attribute__((always_inline))

{_joined(texts, indent=0)}
{_step_elements(graph, dtypes, used, double, record)}
{_step_row(graph, dtypes, used, record)}
{_DRIVER}"""


def _in_blocks(column: str, formats: Mapping[str, Format]) -> bool:
    return column in formats and formats[column].in_blocks


def _elements(format_: Format) -> list[Part]:
    """The parts of a format that have an element for each element."""
    return [part for part in format_.parts if not part.of_block]


def _functions(
    name: str,
    parameters: Mapping[str, str],
    body: Sequence[str],
    *,
    blocks: bool,
    usual: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The function of some elements, and one for a whole block.

    Args:
        name: its name.
        parameters: the declarations of what it is given, by name; the first is how many there are.
        body: its lines.
        blocks: whether there are blocks.
        usual: what is usually given, by name of the parameter: for a block, that is told to the
            compiler, which leaves out what has no effect then.
    """
    declared, given = _joined(list(parameters.values()), ","), list(parameters)
    function = f"""\
static {"INLINE" if blocks else "APART"} void {name}{"_inline" if blocks else ""}(
    {declared}
) {{
    {_joined(body)}
}}
"""
    if not blocks:
        return function
    of_block = _joined(list(parameters.values())[1:], ",")
    whole = f"{name}_inline(BLOCK, {', '.join(given[1:])});"
    if usual:
        test = " && ".join(f"{parameter} == {value}" for parameter, value in usual.items())
        short = ", ".join(usual.get(parameter, parameter) for parameter in given[1:])
        whole = f"if ({test})\n        {name}_inline(BLOCK, {short});\n    else\n        {whole}"
    return f"""\
{function}
static APART void {name}(
    {declared}
) {{
    {name}_inline({", ".join(given)});
}}

static APART void {name}_block(
    {of_block}
) {{
    {whole}
}}
"""


_COUNT = {"count": "int64_t count"}


def _draw() -> str:
    """The function that makes a random word."""
    return f"""\
static inline uint32_t draw(uint32_t index, uint32_t key) {{
    {_joined(_computed(DRAW, ["index", "key"], "float"))}
    return {_result(DRAW, ["index", "key"])};
}}
"""


def _scale_function(format_: Format) -> str:
    """The function that makes the scale of a block of its largest element."""
    assert format_.scale is not None
    return f"""\
static inline float scale_of(uint32_t largest) {{
    {_joined(_computed(format_.scale, ["largest"], "float"))}
    return {_result(format_.scale, ["largest"])};
}}
"""


def _write_function(column: str, format_: Format) -> str:
    """The function that encodes a block of numbers."""
    parameters = _COUNT | {"from": "const float *restrict from", "scale": "float scale"}
    parameters |= _RANDOM if format_.is_random else {}
    to = {part: part.name or "stored" for part in _elements(format_)}
    for part, name in to.items():
        parameters[name] = f"{STORAGE[part.dtype].element} *restrict {name}"
    lines = ["uint32_t word = draw(index, key);"] if format_.is_random else []
    lines += ["for (int64_t i = 0; i < count; i++) {", "    const float x = from[i];"]
    encoded = _encoded(format_, {p: f"{n}[i]" for p, n in to.items()}, "word")
    lines += [*(f"    {line}" for line in encoded), "}"]
    written = _functions(f"write_{column}", parameters, lines, blocks=True)
    return f"/* {format_.name}: what is stored of numbers. */\n{written}"


_RANDOM = {"index": "uint32_t index", "key": "uint32_t key"}


def _encoded(format_: Format, to: Mapping[Part, str], word: str) -> list[str]:
    """The lines that store what a format makes of ``x``, of which a variable has random bits."""
    program = format_.encode
    lines = []
    if format_.is_random:
        # From one element to the next, what is drawn grows by the same.
        lines = [f"const uint32_t random = {word};", f"{word} += draw(1, 0);"]
    lines += _computed(program, program.inputs, "float", prefix="f")
    results = _registers(program, program.inputs, "float", prefix="f")
    for (part, place), register in zip(to.items(), program.outputs):
        lines.append(f"{place} = {STORAGE[part.dtype].write.format(results[register])};")
    return lines


def _decoded(column: str, format_: Format) -> list[str]:
    """The lines that make a number, ``{column}_in``, of what a format has stored."""
    program = format_.decode
    lines = []
    for part in _elements(format_):
        kind = "float" if part.dtype.is_floating_point else "uint32_t"
        read = STORAGE[part.dtype].read.format(f"{_in_c(tensor_name(column, part))}_at[i]")
        lines.append(f"const {kind} {part.name or 'stored'} = {read};")
    if format_.in_blocks:
        lines.append(f"const float scale = {column}_at_scale;")
    lines += _computed(program, program.inputs, "float", prefix="f")
    result = _registers(program, program.inputs, "float", prefix="f")[program.outputs[0]]
    return [
        f"number {column}_in;",
        "{",
        *(f"    {line}" for line in lines),
        f"    {column}_in = {result};",
        "}",
    ]


def _step_elements(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    formats: Mapping[str, Format],
    double: bool,
    record: Record,
) -> str:
    """The loop over elements: each operation of the program once."""
    program = graph.varying
    parameters = _COUNT | {"c": "const number *c", "unscale": "number unscale"}
    choices = {f"c{n}": "1" for n, node in enumerate(program.given) if node.boolean}
    parameters |= {name: f"int {name}" for name in choices}
    parameters |= _RANDOM if record.random else {}
    for name in record.tensors:
        column, _, part = name.partition(".")
        if part == "scale":
            parameters[f"{column}_at_scale"] = f"float {column}_at_scale"
        else:
            const = "" if column in graph.results else "const "
            element = STORAGE[dtypes[name]].element
            parameters[f"{_in_c(name)}_at"] = f"{const}{element} *restrict {_in_c(name)}_at"
    scaled = [column for column in graph.results if _in_blocks(column, formats)]
    for column in scaled:
        parameters[f"{column}_numbers"] = f"float *restrict {column}_numbers"
    if scaled:
        parameters["largest"] = "uint32_t *restrict largest"
    lines: list[str] = []
    for position, node in enumerate(program.given):
        if not node.boolean:
            lines.append(f"const number c{position} = c[{position}];  /* {_shown(node)} */")
    lines += [f"uint32_t {column}_largest = 0;" for column in scaled]
    for position, column in enumerate(graph.results):
        if column in formats and formats[column].is_random and column not in scaled:
            lines.append(f"uint32_t {column}_word = draw(index, key + {position});")
    lines.append("for (int64_t i = 0; i < count; i++) {")
    for column in program.inputs:
        if column in formats:
            lines += [f"    {line}" for line in _decoded(column, formats[column])]
            continue
        read = STORAGE[dtypes[column]].read.format(f"{column}_at[i]")
        scaling = " * unscale" if column == "g" else ""
        lines.append(f"    const number {column}_in = {read}{scaling};")
    names = [f"{name}_in" for name in program.inputs]
    names += [f"c{position}" for position in range(len(program.given))]
    # Codes stand for no infinity, which saves a kernel that has no time for it the test.
    finite = {n for n, column in enumerate(program.inputs) if _in_blocks(column, formats)}
    computed = _computed(program, names, "number", double=double, finite=finite)
    lines += [f"    {line}" for line in computed]
    results = _registers(program, names, "number", finite=finite)
    for column, register in zip(graph.results, program.outputs):
        stored = _stored(column, results[register], dtypes, formats)
        lines += [f"    {line}" for line in stored]
    lines.append("}")
    lines += [f"largest[{n}] = {column}_largest;" for n, column in enumerate(scaled)]
    usual = {"unscale": "1", **choices}
    return _functions("step_elements", parameters, lines, blocks=record.length, usual=usual)


def _stored(
    column: str,
    value: str,
    dtypes: Mapping[str, torch.dtype],
    formats: Mapping[str, Format],
) -> list[str]:
    """The lines that store a result, or keep it until the scale of its block is known."""
    if column not in formats:
        return [f"{column}_at[i] = {STORAGE[dtypes[column]].write.format(value)};"]
    format_ = formats[column]
    if format_.size is not None:
        lines = _computed(format_.size, ["x"], "float", prefix="f")
        size = _registers(format_.size, ["x"], "float", prefix="f")[format_.size.outputs[0]]
        lines += [
            f"{column}_numbers[i] = x;",
            f"{column}_largest = {size} > {column}_largest ? {size} : {column}_largest;",
        ]
    else:
        to = {p: f"{_in_c(tensor_name(column, p))}_at[i]" for p in _elements(format_)}
        lines = _encoded(format_, to, f"{column}_word")
    return [f"{{ const float x = (float){value};", *(f"    {line}" for line in lines), "}"]


def _step_row(
    graph: Graph, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format], record: Record
) -> str:
    """What hands a part of a row to the loop: all at once, or in blocks where it must convert."""
    names = {name: _in_c(name) for name in record.tensors}
    written = {name for column in graph.results for name in tensors_of(column, formats)}
    read = {name for column in graph.varying.inputs for name in tensors_of(column, formats)}
    widened = [name for name in record.tensors if STORAGE[dtypes[name]].widen]
    scaled = [column for column in graph.results if _in_blocks(column, formats)]
    extra = len(record.tensors)
    lines = [
        f"{'' if name in written else 'const '}{STORAGE[dtypes[name]].memory} *{c}_at = "
        f"at[{position}];"
        for position, (name, c) in enumerate(names.items())
    ]
    if record.random:
        lines += [
            f"const uint64_t random = (uint64_t)(uintptr_t)at[{extra + record.length}];",
            "const uint32_t start = (uint32_t)(random >> 32), key = (uint32_t)random;",
        ]
    first = "i" if record.length or widened else "low"
    choices = {n: node for n, node in enumerate(graph.varying.given) if node.boolean}
    lines += [f"const int c{n} = c[{n}] != 0;  /* {_shown(x)} */" for n, x in choices.items()]
    given = ["c", "unscale", *(f"c{n}" for n in choices)]
    given += [*([f"start + (uint32_t){first}", "key"] if record.random else [])]
    for name, c in names.items():
        if name.endswith(".scale"):
            given.append(f"{c}_at[block]")
        else:
            given.append(f"{c}_block" if name in widened else f"{c}_at + {first}")
    given += [f"{column}_numbers" for column in scaled] + ["largest"] * bool(scaled)
    if first == "low":
        lines.append(f"step_elements(high - low, {', '.join(given)});")
        return _step_row_of(lines)
    lines += [f"float {names[name]}_block[BLOCK];" for name in widened]
    lines += [f"float {column}_numbers[BLOCK];" for column in scaled]
    if not record.length:
        body = ["const int64_t count = high - i < BLOCK ? high - i : BLOCK;"]
        body += _widening(widened, read, dtypes, "widen")
        body.append(f"step_elements(count, {', '.join(given)});")
        body += _widening(widened, written, dtypes, "narrow")
        lines.append("for (int64_t i = low; i < high; i += BLOCK) {")
        return _step_row_of([*lines, *(f"    {line}" for line in body), "}"])
    lines += [
        f"const int64_t length = (int64_t)at[{extra}];",
        "const int64_t blocks = (length + BLOCK - 1) / BLOCK;",
        "int64_t first = low / blocks * length, within = low % blocks * BLOCK;",
        f"uint32_t largest[{max(1, len(scaled))}];",
    ]
    calls = [("step_elements", given)]
    for column in scaled:
        format_ = formats[column]
        arguments = [f"{column}_numbers", f"{column}_at_scale_at[block]"]
        if format_.is_random:
            arguments += ["start + (uint32_t)i", f"key + {graph.results.index(column)}"]
        arguments += [f"{_in_c(tensor_name(column, p))}_at + i" for p in _elements(format_)]
        calls.append((f"write_{column}", arguments))
    body = [
        "const int64_t i = first + within;",
        "const int64_t count = length - within < BLOCK ? length - within : BLOCK;",
        *_widening(widened, read, dtypes, "widen"),
        "if (count == BLOCK) {",
        *(f"    {line}" for line in _calls(calls, scaled, whole=True)),
        "} else {",
        *(f"    {line}" for line in _calls(calls, scaled, whole=False)),
        "}",
        *_widening(widened, written, dtypes, "narrow"),
        "within += BLOCK;",
        "if (within >= length) { within = 0; first += length; }",
    ]
    lines.append("for (int64_t block = low; block < high; block++) {")
    return _step_row_of([*lines, *(f"    {line}" for line in body), "}"])


def _calls(
    calls: Sequence[tuple[str, Sequence[str]]], scaled: Sequence[str], *, whole: bool
) -> list[str]:
    """The step of a block, what its scales become, and the encoding of what has them."""
    lines = [
        f"{name}_block({', '.join(given)});" if whole else f"{name}(count, {', '.join(given)});"
        for name, given in calls
    ]
    scales = [f"{c}_at_scale_at[block] = scale_of(largest[{n}]);" for n, c in enumerate(scaled)]
    return [lines[0], *scales, *lines[1:]]


def _widening(
    widened: Sequence[str], wanted: Container[str], dtypes: Mapping[str, torch.dtype], way: str
) -> list[str]:
    """The calls that convert a block of each tensor whose loop cannot."""
    lines = []
    for name in widened:
        ends = [f"{_in_c(name)}_at + i", f"{_in_c(name)}_block"]
        if name in wanted:
            function = getattr(STORAGE[dtypes[name]], way)
            lines.append(f"{function}(count, {', '.join(ends if way == 'widen' else ends[::-1])});")
    return lines


def _step_row_of(lines: Sequence[str]) -> str:
    return f"""\
static void step_row(void *const *at, const number *c, number unscale,
                     int64_t low, int64_t high) {{
    {_joined(lines)}
}}
"""


def _in_c(name: str) -> str:
    """The name of a tensor in C, where that of a state may be any but cannot end in ``_at``."""
    column, _, part = name.partition(".")
    return f"{column}_at_{part}" if part else column


def _joined(lines: Sequence[str], separator: str = "", indent: int = 4) -> str:
    """The lines of a body, the first of which is indented already."""
    return f"{separator}\n{' ' * indent}".join(lines)


def _computed(
    program: Program,
    given: Sequence[str],
    number: str,
    *,
    double: bool = False,
    prefix: str = "x",
    finite: Container[int] = (),
) -> list[str]:
    """The lines that compute the instructions of a program.

    Args:
        program: what to compute.
        given: what its inputs, and then its given values, are called.
        number: the type of its numbers.
        double: whether that is double.
        prefix: what the names of its results begin with.
        finite: the registers that never hold an infinity.
    """
    names = _registers(program, given, number, prefix=prefix, finite=finite)
    suffix = "" if double else "f"
    lines = []
    for instruction in program.instructions:
        if names[instruction.out] == names[instruction.args[0]]:
            continue  # there is nothing to be done
        node = program.nodes[instruction.out]
        kind = "int" if node.boolean else "uint32_t" if node.word else number
        operands = [names[register] for register in instruction.args]
        value = OPERATIONS[instruction.op].format(*operands, number=number, f=suffix)
        lines.append(f"const {kind} {names[instruction.out]} = {value};")
    return lines


def _result(program: Program, given: Sequence[str]) -> str:
    """What the result of a program on floats is called."""
    return _registers(program, given, "float")[program.outputs[0]]


def _registers(
    program: Program,
    given: Sequence[str],
    number: str,
    *,
    prefix: str = "x",
    finite: Container[int] = (),
) -> list[str]:
    """What each register is called; a constant is its literal."""
    names = [*given, *(_literal(value, number) for value in program.constants)]
    for position, instruction in enumerate(program.instructions):
        first = instruction.args[0]
        same = instruction.op == "finite" and first in finite
        names.append(names[first] if same else f"{prefix}{position}")
    return names


def _literal(value: float, number: str) -> str:
    if isinstance(value, int):
        return f"UINT32_C({value:#x})"
    if math.isfinite(value):
        return f"({number}){value.hex()}"
    return (
        f"({number})NAN" if math.isnan(value) else f"({'-' if value < 0 else ''}({number})INFINITY)"
    )


def _shown(node: object) -> str:
    text = str(node)
    return text if len(text) <= 60 else text[:57] + "..."

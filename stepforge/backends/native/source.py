"""The varying program of a graph as C: one function that steps any number of tensors.

Every operation is one C expression on ``float`` (``double`` for float64 parameters), in the
program's order; the compiler may vectorize but not re-associate or contract, so the result has the
reference's bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    for number, format_ in enumerate(dict.fromkeys(used.values())):
        texts.append(_read_function(number, format_))
        texts.append(_write_function(number, format_))
    block = BLOCK if record.length else 512
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
#define BLOCK {block}    /* elements that are converted together: they stay in the first cache */
#define GRAIN {1 if record.length else 64}    /* a thread's share begins on a whole number of lines */
#define AHEAD 3     /* rows: far enough for small ones to arrive in time, as measured */
/* Of functions that are not inlined: with its call GCC forgets what restrict promised. */
#define APART __attribute__((noinline))

{_joined(texts, indent=0)}
{_step_elements(graph, dtypes, used, double)}
{_step_row(graph, dtypes, used, record)}
{_DRIVER}"""


def _draw() -> str:
    """The function that makes a random word."""
    lines = _computed(DRAW, ["index", "key"], "float")
    return f"""\
static inline uint32_t draw(uint32_t index, uint32_t key) {{
    {_joined(lines)}
    return {_result(DRAW, ["index", "key"])};
}}
"""


def _elements(format_: Format) -> list[Part]:
    """The parts of a format that have an element for each element."""
    return [part for part in format_.parts if not part.of_block]


def _called(part: Part) -> str:
    """What a part is called in the functions of its format."""
    return part.name or "stored"


def _read_function(number: int, format_: Format) -> str:
    """The function that decodes elements of a row, or of a block of it."""
    program = format_.decode
    parameters = ["int64_t count", "float *restrict to"]
    parameters += ["float scale"] if format_.in_blocks else []
    inputs = {"scale": "scale"}
    for part in _elements(format_):
        storage, name = STORAGE[part.dtype], _called(part)
        parameters.append(f"const {storage.element} *restrict {name}")
        inputs[name] = f"{name}_in"
    names = [inputs[name] for name in program.inputs]
    lines = []
    for part in _elements(format_):
        storage, name = STORAGE[part.dtype], _called(part)
        kind = "float" if part.dtype.is_floating_point else "uint32_t"
        read = storage.read.format(f"{name}[i]").replace("(number)", "")
        lines.append(f"const {kind} {name}_in = {read};")
    lines += _computed(program, names, "float")
    lines.append(f"to[i] = {_result(program, names)};")
    return f"""\
/* {format_.name}: numbers of what is stored. */
static APART void read_{number}({", ".join(parameters)}) {{
    for (int64_t i = 0; i < count; i++) {{
        {_joined(lines, indent=8)}
    }}
}}
"""


def _write_function(number: int, format_: Format) -> str:
    """The function that encodes elements of a row, or of a block of it; it returns the scale."""
    parameters = ["int64_t count", "const float *restrict from"]
    parameters += ["uint32_t index", "uint32_t key"] if format_.is_random else []
    for part in _elements(format_):
        parameters.append(f"{STORAGE[part.dtype].element} *restrict {_called(part)}")
    lines: list[str] = []
    if format_.size is not None and format_.scale is not None:
        sizes = _computed(format_.size, ["x"], "float")
        size = _result(format_.size, ["x"])
        lines += [
            "uint32_t largest = 0;",
            "for (int64_t i = 0; i < count; i++) {",
            "    const float x = from[i];",
            *(f"    {line}" for line in sizes),
            f"    largest = {size} > largest ? {size} : largest;",
            "}",
            "float scale;",
            "{",
            *(f"    {line}" for line in _computed(format_.scale, ["largest"], "float")),
            f"    scale = {_result(format_.scale, ['largest'])};",
            "}",
        ]
    program = format_.encode
    lines += ["for (int64_t i = 0; i < count; i++) {", "    const float x = from[i];"]
    if format_.is_random:
        lines.append("    const uint32_t random = draw(index + (uint32_t)i, key);")
    lines += [f"    {line}" for line in _computed(program, program.inputs, "float")]
    results = _registers(program, program.inputs, "float")
    for part, register in zip(_elements(format_), program.outputs):
        write = STORAGE[part.dtype].write.format(results[register])
        lines.append(f"    {_called(part)}[i] = {write};")
    lines.append("}")
    kind, returns = ("float", "; returns their scale") if format_.in_blocks else ("void", "")
    if format_.in_blocks:
        lines.append("return scale;")
    return f"""\
/* {format_.name}: what is stored of numbers{returns}. */
static APART {kind} write_{number}(
    {_joined(parameters, ",")}
) {{
    {_joined(lines)}
}}
"""


def _step_elements(
    graph: Graph, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format], double: bool
) -> str:
    """The loop over elements: each operation of the program once."""
    program = graph.varying
    # What has a format has been decoded to float32.
    storages = {
        column: STORAGE[torch.float32 if column in formats else dtypes[column]]
        for column in columns_of(graph)
    }
    inputs = [f"{name}_in" for name in program.inputs]
    names = [*inputs, *(f"c{position}" for position in range(len(program.given)))]
    parameters = ["int64_t count", "const number *c", "number unscale"]
    for column, storage in storages.items():
        parameters.append(f"{_const(graph, column)}{storage.element} *restrict {column}_at")
    lines: list[str] = []
    for position, node in enumerate(program.given):
        kind, test = ("int", " != 0") if node.boolean else ("number", "")
        lines.append(f"const {kind} c{position} = c[{position}]{test};  /* {_shown(node)} */")
    lines.append("for (int64_t i = 0; i < count; i++) {")
    for column, name in zip(program.inputs, inputs):
        read = storages[column].read.format(f"{column}_at[i]")
        if column == "g":
            read += " * unscale"
        lines.append(f"    const number {name} = {read};")
    lines += [f"    {line}" for line in _computed(program, names, "number", double=double)]
    results = _registers(program, names, "number")
    for column, register in zip(graph.results, program.outputs):
        lines.append(f"    {column}_at[i] = {storages[column].write.format(results[register])};")
    lines.append("}")
    return f"""\
static APART void step_elements(
    {_joined(parameters, ",")}
) {{
    {_joined(lines)}
}}
"""


def _step_row(
    graph: Graph, dtypes: Mapping[str, torch.dtype], formats: Mapping[str, Format], record: Record
) -> str:
    """What hands a part of a row to the loop: all at once, or in blocks where it must convert."""
    names = {name: _in_c(name) for name in record.tensors}
    written = {name for column in graph.results for name in tensors_of(column, formats)}
    lines = [
        f"{'' if name in written else 'const '}{STORAGE[dtypes[name]].memory} *{c}_at = "
        f"at[{position}];"
        for position, (name, c) in enumerate(names.items())
    ]
    widened = [name for name in record.tensors if STORAGE[dtypes[name]].widen]
    if not widened and not formats:
        given = [f"{column}_at + low" for column in columns_of(graph)]
        lines.append(f"step_elements(high - low, c, unscale, {', '.join(given)});")
        return _step_row_of(lines)
    extra = len(record.tensors)
    if record.length:
        lines += [
            f"const int64_t length = (int64_t)at[{extra}];",
            "const int64_t blocks = (length + BLOCK - 1) / BLOCK;",
            "int64_t first = low / blocks * length, within = low % blocks * BLOCK;",
        ]
    if record.random:
        word = f"(uint64_t)(uintptr_t)at[{extra + record.length}]"
        lines.append(f"const uint32_t start = (uint32_t)({word} >> 32), key = (uint32_t){word};")
    lines += [f"float {names[name]}_block[BLOCK];" for name in widened]
    lines += [f"float {column}_numbers[BLOCK];" for column in formats]
    body = (
        [
            "const int64_t i = first + within;",
            "const int64_t count = length - within < BLOCK ? length - within : BLOCK;",
        ]
        if record.length
        else ["const int64_t count = high - i < BLOCK ? high - i : BLOCK;"]
    )
    at = {name: f"{c}_block" if name in widened else f"{c}_at + i" for name, c in names.items()}
    function = {f: number for number, f in enumerate(dict.fromkeys(formats.values()))}
    read = {name for column in graph.varying.inputs for name in tensors_of(column, formats)}
    for name in widened:
        if name in read:
            body.append(f"{STORAGE[dtypes[name]].widen}(count, {names[name]}_at + i, {at[name]});")
    for column, format_ in formats.items():
        if column in graph.varying.inputs:
            given = ["count", f"{column}_numbers", *_given(column, format_, at, names)]
            body.append(f"read_{function[format_]}({', '.join(given)});")
    given = [
        f"{column}_numbers" if column in formats else at[column] for column in columns_of(graph)
    ]
    body.append(f"step_elements(count, c, unscale, {', '.join(given)});")
    for position, column in enumerate(graph.results):
        if column not in formats:
            continue
        format_ = formats[column]
        given = ["count", f"{column}_numbers"]
        if format_.is_random:
            given += ["start + (uint32_t)i", f"key + {position}"]
        given += [at[tensor_name(column, part)] for part in _elements(format_)]
        call = f"write_{function[format_]}({', '.join(given)})"
        body.append(f"{_scale_at(column, names)} = {call};" if format_.in_blocks else f"{call};")
    for name in widened:
        if name in written:
            body.append(f"{STORAGE[dtypes[name]].narrow}(count, {at[name]}, {names[name]}_at + i);")
    if record.length:
        body += [
            "within += BLOCK;",
            "if (within >= length) { within = 0; first += length; }",
        ]
        lines.append("for (int64_t block = low; block < high; block++) {")
    else:
        lines.append("for (int64_t i = low; i < high; i += BLOCK) {")
    return _step_row_of([*lines, *(f"    {line}" for line in body), "}"])


def _step_row_of(lines: Sequence[str]) -> str:
    return f"""\
static void step_row(void *const *at, const number *c, number unscale,
                     int64_t low, int64_t high) {{
    {_joined(lines)}
}}
"""


def _given(
    column: str, format_: Format, at: Mapping[str, str], names: Mapping[str, str]
) -> list[str]:
    """What the function that decodes a column is given of its tensors."""
    scale = [_scale_at(column, names)] if format_.in_blocks else []
    return [*scale, *(at[tensor_name(column, part)] for part in _elements(format_))]


def _scale_at(column: str, names: Mapping[str, str]) -> str:
    """The scale of the block at hand."""
    return f"{names[f'{column}.scale']}_at[block]"


def _in_c(name: str) -> str:
    """The name of a tensor in C, where that of a state may be any but cannot end in ``_at``."""
    column, _, part = name.partition(".")
    return f"{column}_at_{part}" if part else column


def _const(graph: Graph, column: str) -> str:
    return "" if column in graph.results else "const "


def _joined(lines: Sequence[str], separator: str = "", indent: int = 4) -> str:
    """The lines of a body, the first of which is indented already."""
    return f"{separator}\n{' ' * indent}".join(lines)


def _computed(
    program: Program, given: Sequence[str], number: str, *, double: bool = False
) -> list[str]:
    """The lines that compute the instructions of a program.

    Args:
        program: what to compute.
        given: what its inputs, and then its given values, are called.
        number: the type of its numbers.
        double: whether that is double.
    """
    names = _registers(program, given, number)
    suffix = "" if double else "f"
    lines = []
    for instruction in program.instructions:
        node = program.nodes[instruction.out]
        kind = "int" if node.boolean else "uint32_t" if node.word else number
        operands = [names[register] for register in instruction.args]
        value = OPERATIONS[instruction.op].format(*operands, number=number, f=suffix)
        lines.append(f"const {kind} {names[instruction.out]} = {value};")
    return lines


def _result(program: Program, given: Sequence[str]) -> str:
    """What the result of a program on floats is called."""
    return _registers(program, given, "float")[program.outputs[0]]


def _registers(program: Program, given: Sequence[str], number: str) -> list[str]:
    """What each register is called; a constant is its literal."""
    constants = [_literal(value, number) for value in program.constants]
    results = [f"x{position}" for position in range(len(program.instructions))]
    return [*given, *constants, *results]


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

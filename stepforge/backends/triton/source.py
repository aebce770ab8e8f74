"""The varying program of a graph as Triton: one kernel that steps a block of a row.

Every operation is one Triton expression on float32 (float64 for float64 parameters), in the
program's order, in the form that rounds once and correctly, so the result has the reference's bits.
The launch must forbid the compiler to fuse a product into a sum.

Where a column has a format, the block is decoded as it is loaded and encoded before it is stored:
no number that memory has no room for is ever in memory.
"""

from __future__ import annotations

import math
import struct
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from stepforge.backends.memory import elements_of_graph, formats_of, tensors_of_graph
from stepforge.expr import Graph, Instruction, Program
from stepforge.formats import BLOCK as CHUNK
from stepforge.formats import DRAW, Format, Part, apart, tensor_name

#: What an operation is in Triton; operands are names of variables, ``{number}`` is the type of the
#: arithmetic. Triton's ``-x`` is ``0 - x``, and its ``maximum`` leaves the sign of a zero open.
OPERATIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "{0} * -1.0",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt({0})",
    "sign": "({0} > 0).to({number}) - ({0} < 0).to({number})",
    "maximum": "tl.where(({0} >= {1}) | ({0} != {0}), {0}, {1}) + 0.0",
    "minimum": "tl.where(({0} <= {1}) | ({0} != {0}), {0}, {1}) + 0.0",
    "finite": "tl.where({0} > {largest}, {largest}, tl.where({0} < -{largest}, -{largest}, {0}))",
    "where": "tl.where({0}, {1}, {2})",
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
    "bits": "{0}.to(tl.uint32, bitcast=True)",
    "from_bits": "{0}.to(tl.float32, bitcast=True)",
    "number": "{0}.to(tl.int32, bitcast=True).to({number})",
    "word": "{0}.to(tl.int32).to(tl.uint32, bitcast=True)",
}
#: What is otherwise in float32, where Triton's ``/`` and ``sqrt`` are approximations.
IN_FLOAT32 = {"div": "tl.div_rn({0}, {1})", "sqrt": "tl.sqrt_rn({0})"}


@dataclass(frozen=True)
class Storage:
    """How Triton sees a dtype: what is in memory, and how a number is read from and written to it.

    Attributes:
        memory: the type of the elements that are loaded and stored.
        read: makes a number of the arithmetic of what was loaded.
        write: makes what is to be stored of a number.
    """

    memory: str
    read: str = "{0}.to({number})"
    write: str = "{0}.to({memory})"


#: The dtypes that parameters, gradients and states may be stored in, formats left out. What has 16
#: bits is rounded to float32 first, as torch does; bfloat16 is handled as bits, as neither every
#: GPU nor the interpreter rounds it alike.
NUMBERS: dict[torch.dtype, Storage] = {
    torch.float32: Storage("tl.float32"),
    torch.float64: Storage("tl.float64"),
    torch.bfloat16: Storage(
        "tl.uint16", "from_bfloat16({0}).to({number})", "to_bfloat16({0}.to(tl.float32))"
    ),
    torch.float16: Storage("tl.float16", write="{0}.to(tl.float32).to({memory})"),
}
#: How every dtype is stored. Integers are words, of which less than 32 bits are in memory.
STORAGE: dict[torch.dtype, Storage] = NUMBERS | {
    torch.uint8: Storage("tl.uint8", "{0}.to(tl.uint32)"),
    torch.int8: Storage("tl.int8", "{0}.to(tl.int32).to(tl.uint32, bitcast=True)"),
    torch.int16: Storage("tl.int16", "{0}.to(tl.int32).to(tl.uint32, bitcast=True)"),
}

_BFLOAT16 = '''\
@triton.jit
def from_bfloat16(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """To nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


'''


@dataclass(frozen=True)
class Record:
    """What the table says of a row: int64 numbers, at these positions.

    Attributes:
        kept: the tensors that stay from step to step; all but the gradient.
        elements: the tensors that have an element for each element.
        dims: how many dimensions the tensors of a row have for the kernel; 0 if all are dense.
        in_blocks: whether elements share scales.
        is_random: whether rounding takes random bits.
    """

    kept: tuple[str, ...]
    elements: tuple[str, ...]
    dims: int
    in_blocks: bool
    is_random: bool

    @classmethod
    def of(
        cls, graph: Graph, dims: int, formats: Mapping[str, Format] = MappingProxyType({})
    ) -> Record:
        """The record of a graph's rows."""
        used = formats_of(graph, formats)
        return cls(
            tuple(name for name in tensors_of_graph(graph, formats) if name != "g"),
            elements_of_graph(graph, formats),
            dims,
            any(format_.in_blocks for format_ in used.values()),
            any(format_.is_random for format_ in used.values()),
        )

    #: The number of the row's first block, and the row's elements; where they share scales, those
    #: that it would have if no block of them were shorter than others.
    first, size = 0, 1

    def address(self, tensor: str) -> int:
        """Where the address of a kept tensor stands."""
        return 2 + self.kept.index(tensor)

    def extent(self, dim: int) -> int:
        """Where the length of a dimension stands."""
        return 2 + len(self.kept) + dim

    def stride(self, tensor: str, dim: int) -> int:
        """Where the distance of neighbours along a dimension stands, in elements."""
        return self.extent(self.dims) + self.elements.index(tensor) * self.dims + dim

    @property
    def length(self) -> int:
        """Where the elements of a row of dimension 0 stand, if elements share scales."""
        return self.extent(self.dims) + len(self.elements) * self.dims

    @property
    def start(self) -> int:
        """Where the index of the first element stands, if rounding takes random bits."""
        return self.length + self.in_blocks

    @property
    def width(self) -> int:
        """How many numbers there are."""
        return self.start + self.is_random


@dataclass(frozen=True)
class _Design:
    """What a kernel is for.

    Attributes:
        graph: what it computes.
        dtypes: the dtype in which each tensor is stored.
        arithmetic: float32 or float64.
        formats: of the graph's columns that have one.
        record: what it is told of a row.
    """

    graph: Graph
    dtypes: Mapping[str, torch.dtype]
    arithmetic: torch.dtype
    formats: Mapping[str, Format]
    record: Record

    @property
    def number(self) -> str:
        """The type of the arithmetic."""
        return f"tl.{_bare(self.arithmetic)}"

    @property
    def functions(self) -> dict[Format, int]:
        """The number that the functions of each format have in their names."""
        return {format_: n for n, format_ in enumerate(dict.fromkeys(self.formats.values()))}

    def parts(self, column: str) -> list[tuple[str, Part]]:
        """The parts of a column that has a format, each with the name of its tensor."""
        return [(tensor_name(column, part), part) for part in self.formats[column].parts]


def triton_source(
    graph: Graph,
    dtypes: Mapping[str, torch.dtype],
    arithmetic: torch.dtype,
    dims: int,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> str:
    """The Python source of a module whose function ``step`` is the kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype in which each of :func:`tensors_of_graph` is stored.
        arithmetic: float32 or float64.
        dims: how many dimensions the tensors of a row have for the kernel; 0 if every row's lie
            without gaps in one order.
        formats: of the columns that have one.
    """
    record = Record.of(graph, dims, formats)
    design = _Design(graph, dtypes, arithmetic, formats_of(graph, formats), record)
    stored = ", ".join(f"{tensor} {_bare(dtype)}" for tensor, dtype in dtypes.items())
    about = f'"""A step in {_bare(arithmetic)} on {stored}; written by stepforge."""'
    functions = [*_functions_of_formats(design), _update(design)]
    return f"""\
{textwrap.fill(about, 100)}

import triton
import triton.language as tl


{_BFLOAT16 if torch.bfloat16 in dtypes.values() else ""}\
{_TWO_LINES.join(functions)}


{_kernel(design)}"""


_TWO_LINES = "\n\n\n"


def writer_source(words: int) -> str:
    """The source of a module whose function ``write`` writes numbers that it is given by value.

    Args:
        words: how many int32 a launch writes at most.
    """
    names = [f"word{position}" for position in range(words)]
    lines = [
        '"""Numbers that are part of a launch, written to memory; written by stepforge."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "",
        f"@triton.jit(do_not_specialize={['begin', 'count', *names]})",
        f"def write(table, begin, count, {', '.join(names)}):",
        "    to = table + begin",
    ]
    for position, name in enumerate(names):
        lines.append(f"    tl.store(to + {position}, {name}, {position} < count)")
    return "\n".join([*lines, ""])


def _update(design: _Design) -> str:
    """The function that makes the new elements of the old."""
    graph = design.graph
    return _function("update", graph.varying, _arguments_of_update(graph), design.arithmetic)


def _functions_of_formats(design: _Design) -> list[str]:
    """The functions that read and write what has a format."""
    texts = []
    for format_, n in design.functions.items():
        for name, program, about in (
            ("decode", format_.decode, "a number of what is stored"),
            ("size", format_.size, "the word of which the largest in a block makes its scale"),
            ("scale", format_.scale, "the scale of a block"),
            ("encode", format_.encode, "what is stored of a number"),
        ):
            if program is not None:
                about = f"{format_.name}: {about}."
                texts.append(_function_of_format(f"{name}_{n}", program, about))
    if design.record.is_random:
        texts.append(_function_of_format("draw", DRAW, "A random word."))
    return texts


def _function_of_format(name: str, program: Program, about: str) -> str:
    """A function of a format, all of which are in float32."""
    arguments = [f"{given}_in" for given in program.inputs]
    return _function(name, program, arguments, torch.float32, f'"""{about}"""')


def _function(
    name: str, program: Program, arguments: Sequence[str], arithmetic: torch.dtype, *about: str
) -> str:
    """A function that runs a program.

    Args:
        name: what it is called.
        program: what it runs.
        arguments: what the inputs of the program, and then its given values, are called.
        arithmetic: the dtype of its numbers.
        about: lines to begin with.
    """
    number = f"tl.{_bare(arithmetic)}"
    constants = [f"k{position}" for position in range(len(program.constants))]
    results = [f"x{position}" for position in range(len(program.instructions))]
    names = [*arguments, *constants, *results]
    lines = [f"@triton.jit\ndef {name}({', '.join(arguments)}):", *about]
    lines += [
        f"{constant} = {_literal(value, arithmetic)}"
        for constant, value in zip(constants, program.constants)
    ]
    if any(instruction.op == "finite" for instruction in program.instructions):
        lines.append(f"largest = {_literal(torch.finfo(arithmetic).max, arithmetic)}")
    for instruction in program.instructions:
        expression = _expression(instruction, names, number)
        lines.append(f"{names[instruction.out]} = {expression}")
    lines.append(f"return {', '.join(names[register] for register in program.outputs)}")
    return "\n    ".join(lines)


def _kernel(design: _Design) -> str:
    """The kernel: finds the row of a block and what belongs to it, and updates the block."""
    graph, record = design.graph, design.record
    aligned = [] if record.dims else [named(x, "aligned") for x in record.elements]
    keys = ["    keys,  # of each row what its random bits follow from"]
    lines = [
        '@triton.jit(do_not_specialize=["stride"])',
        "def step(",
        "    owners,  # the row of each block",
        f"    rows,  # of each row {record.width} numbers: its first block, its size, ...",
        "    gradients,  # of each row the address of its gradient",
        "    numbers,  # the coefficients of each row, or those of all",
        "    stride,  # from the coefficients of a row to those of the next; 0 if they are of all",
        "    unscale,  # what gradients are multiplied by before all else",
        "    found_inf,  # not zero if nothing is to be changed",
        *(keys if record.is_random else []),
        *(
            f"    {name}: tl.constexpr,  # the bytes that its addresses are multiples of"
            for name in aligned
        ),
        "    SCALED: tl.constexpr,  # whether there are unscale and found_inf",
        "    BLOCK: tl.constexpr,",
        "):",
    ]
    body = [
        "block = tl.program_id(0)",
        "row = tl.load(owners + block)",
        f"this = rows + row * {record.width}",
        f"begin = (block - tl.load(this + {record.first})) * BLOCK  # in 64 bits",
        f"left = tl.load(this + {record.size}) - begin",
        f"factor = tl.full((), 1.0, {design.number})",
        "if SCALED:",
        "    factor = tl.load(unscale)",
        "    left = tl.where(tl.load(found_inf) != 0, 0, left)",
    ]
    is_flat = not (record.dims or record.in_blocks)
    for tensor in tensors_of_graph(graph, design.formats):
        at = "gradients + row" if tensor == "g" else f"this + {record.address(tensor)}"
        pointer = f"tl.load({at}).to(tl.pointer_type({STORAGE[design.dtypes[tensor]].memory}))"
        body.append(f"{named(tensor, 'base')} = {pointer}{' + begin' if is_flat else ''}")
    if graph.coefficients:
        body.append("given = numbers + row * stride")
    for position, node in enumerate(graph.coefficients):
        test = " != 0" if node.boolean else ""
        body.append(f"c{position} = tl.load(given + {position}){test}  # {_shown(node)}")
    if record.is_random:
        body.append("key = tl.load(keys + row).to(tl.uint32)")
        body.append(f"start = tl.load(this + {record.start}).to(tl.uint32)")
    body += _lanes(design)
    masked = [*_places(design, masked=True), *_work(design, masked=True)]
    if record.dims:
        body += masked
    else:
        # Without a mask, whole words are moved.
        body.append(f"if {_is_whole(record)}:")
        whole = [*_places(design, masked=False), *_work(design, masked=False)]
        body += [f"    {line}" for line in whole]
        body += ["else:", *(f"    {line}" for line in masked)]
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


# A block of a kernel is flat, or, if elements share scales, a table whose rows do: a "chunk" each,
# so that the largest of a chunk is found along an axis. Chunks begin anew in every row of a
# tensor's dimension 0, and the last of such a row may be shorter than the others.


def _lanes(design: _Design) -> list[str]:
    """Numbers the elements of a block, and the chunks that they are in, whose scales it finds."""
    if not design.record.in_blocks:
        return ["lane = tl.arange(0, BLOCK)"]
    lines = [
        f"width = tl.load(this + {design.record.length})  # of a row of dimension 0",
        f"lane = tl.arange(0, {CHUNK})[None, :]",
        f"chunk = begin // {CHUNK} + tl.arange(0, BLOCK // {CHUNK})[:, None]",
    ]
    for column in design.formats:
        for tensor, part in design.parts(column):
            if part.of_block:
                lines.append(f"{named(tensor, 'at')} = {named(tensor, 'base')} + chunk")
    return lines


def _is_whole(record: Record) -> str:
    """Whether a block has all its elements, one behind the other."""
    return f"(left >= BLOCK) & (width % {CHUNK} == 0)" if record.in_blocks else "left >= BLOCK"


def _places(design: _Design, *, masked: bool) -> list[str]:
    """Where in memory the elements of a block are, and which of them are in the row."""
    record = design.record
    if record.in_blocks:
        lines = _elements_of_chunks(masked=masked)
    else:
        lines = ["inside = lane < left"] if masked else []
        if record.is_random or record.dims:
            lines.append("element = begin + lane")
    if record.is_random:
        lines.append("index = element.to(tl.uint32) + start")
    if record.dims:
        return [*lines, *_strided(record)]
    # What is flat begins where the block does. The rows of a table follow one another.
    step, hint = ("element", "(1, {})") if record.in_blocks else ("lane", "{}")
    for tensor in record.elements:
        at = f"{named(tensor, 'base')} + {step}"
        if not masked:
            at = f"tl.multiple_of({at}, {hint.format(named(tensor, 'aligned'))})"
        lines.append(f"{named(tensor, 'at')} = {at}")
    return lines


def _elements_of_chunks(*, masked: bool) -> list[str]:
    """Which elements are in the chunks of a block."""
    if not masked:
        return [f"element = chunk * {CHUNK} + lane"]
    return [
        f"chunks = (width + {CHUNK - 1}) // {CHUNK}  # of a row of dimension 0",
        f"column = chunk % chunks * {CHUNK} + lane",
        "element = chunk // chunks * width + column",
        f"reached = chunk * {CHUNK} < begin + left",
        "inside = reached & (column < width)",
    ]


def _strided(record: Record) -> list[str]:
    """Where elements are whose distances in memory are those of the record."""
    lines = ["rest = element"]
    lines += [f"{named(tensor, 'at')} = {named(tensor, 'base')}" for tensor in record.elements]
    for dim in reversed(range(record.dims)):
        lines += [
            f"length = tl.load(this + {record.extent(dim)})",
            "position = rest % length",
            "rest = rest // length",
        ]
        for tensor in record.elements:
            stride, at = f"tl.load(this + {record.stride(tensor, dim)})", named(tensor, "at")
            lines.append(f"{at} = {at} + position * {stride}")
    return lines


def _work(design: _Design, *, masked: bool) -> list[str]:
    """Reads the elements of a block, updates them and writes the results."""
    graph = design.graph
    lines = []
    for column in graph.varying.inputs:
        lines += _read(design, column, masked=masked)
    results = ", ".join(f"{column}_out" for column in graph.results)
    lines.append(f"{results} = update({', '.join(_arguments_of_update(graph))})")
    for column in graph.results:
        lines += _write(design, column, masked=masked)
    return lines


def _read(design: _Design, column: str, *, masked: bool) -> list[str]:
    """Makes the numbers of a column of what is stored of it."""
    if column not in design.formats:
        read = _loaded(design, column, design.number, masked=masked)
        return [f"{column}_in = {read}{' * factor' if column == 'g' else ''}"]
    format_, lines, inputs = design.formats[column], [], {}
    for tensor, part in design.parts(column):
        inputs[part.name or "stored"] = name = named(tensor, "stored")
        lines.append(f"{name} = {_loaded(design, tensor, 'tl.float32', masked=masked)}")
    given = ", ".join(inputs[name] for name in format_.decode.inputs)
    widened = "" if design.arithmetic == torch.float32 else f".to({design.number})"
    function = f"decode_{design.functions[format_]}"
    return [*lines, f"{column}_in = {function}({given}){widened}"]


def _loaded(design: _Design, tensor: str, number: str, *, masked: bool) -> str:
    """What is read of a tensor: a number of that type, or a word."""
    load = f"tl.load({named(tensor, 'at')}{_mask(design, tensor) if masked else ''})"
    return STORAGE[design.dtypes[tensor]].read.format(load, number=number)


def _write(design: _Design, column: str, *, masked: bool) -> list[str]:
    """Stores the new numbers of a column."""
    if column not in design.formats:
        return [_stored(design, column, f"{column}_out", masked=masked)]
    format_ = design.formats[column]
    n = design.functions[format_]
    narrowed = "" if design.arithmetic == torch.float32 else ".to(tl.float32)"
    inputs, lines = {"x": f"{column}_out{narrowed}"}, []
    if format_.in_blocks:
        size, scale = f"{column}_size", named(f"{column}.scale", "new")
        lines.append(f"{size} = size_{n}({inputs['x']})")
        if masked:  # what is not there is never the largest
            lines.append(f"{size} = tl.where(inside, {size}, 0)")
        lines.append(f"{scale} = scale_{n}(tl.max({size}, 1, keep_dims=True))")
        inputs["scale"] = scale
    if format_.is_random:
        shift = apart(design.graph.results.index(column))
        inputs["random"] = f"draw(index, key + tl.full((), {shift:#x}, tl.uint32))"
    names = [named(tensor, "new") for tensor, part in design.parts(column) if not part.of_block]
    given = ", ".join(inputs[name] for name in format_.encode.inputs)
    lines.append(f"{', '.join(names)} = encode_{n}({given})")
    for tensor, _ in design.parts(column):
        lines.append(_stored(design, tensor, named(tensor, "new"), masked=masked))
    return lines


def _stored(design: _Design, tensor: str, value: str, *, masked: bool) -> str:
    """What stores a number or a word."""
    storage = STORAGE[design.dtypes[tensor]]
    write = storage.write.format(value, memory=storage.memory)
    mask = _mask(design, tensor) if masked else ""
    return f"tl.store({named(tensor, 'at')}, {write}{mask})"


def _mask(design: _Design, tensor: str) -> str:
    """Which elements of a tensor are in the row."""
    return ", inside" if tensor in design.record.elements else ", reached"


def named(tensor: str, what: str) -> str:
    """What of a tensor a variable is. A state may have any name, but none can end as these do.

    Example:
        >>> named("m", "at"), named("m.scale", "at")
        ('m_at', 'm_at_scale')
    """
    column, _, part = tensor.partition(".")
    return f"{column}_{what}_{part}" if part else f"{column}_{what}"


def _arguments_of_update(graph: Graph) -> list[str]:
    inputs = [f"{name}_in" for name in graph.varying.inputs]
    return [*inputs, *(f"c{position}" for position in range(len(graph.coefficients)))]


def _literal(value: float, arithmetic: torch.dtype) -> str:
    """A number of the arithmetic's own type, or a word: a bare one would take another's type."""
    if isinstance(value, int):
        return f"tl.full((), {value:#x}, tl.uint32)"
    bits, form = (64, "d") if arithmetic == torch.float64 else (32, "f")
    try:
        packed = struct.pack(form, value)
    except OverflowError:
        packed = struct.pack(form, math.copysign(math.inf, value))
    (value,) = struct.unpack(form, packed)
    if math.isfinite(value) and (value or math.copysign(1, value) > 0):
        return f"tl.full((), {value!r}, tl.float{bits})"
    # Triton has no literal for an infinity or a NaN, and takes -0.0 for 0.0.
    pattern = int.from_bytes(packed, sys.byteorder)
    return f"tl.full((), {pattern:#x}, tl.uint{bits}).to(tl.float{bits}, bitcast=True)  # {value!r}"


def _expression(instruction: Instruction, names: Sequence[str], number: str) -> str:
    template = OPERATIONS[instruction.op]
    if number == "tl.float32":
        template = IN_FLOAT32.get(instruction.op, template)
    operands = (names[register] for register in instruction.args)
    return template.format(*operands, number=number, largest="largest")


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(node: object) -> str:
    text = str(node)
    return text if len(text) <= 60 else text[:57] + "..."

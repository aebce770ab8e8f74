"""The varying program of a graph as Triton: one kernel that steps a block of a row.

Every operation is one Triton expression on float32 (float64 for float64 parameters), in the
program's order, in the form that rounds once and correctly, so the result has the reference's bits.
The launch must forbid the compiler to fuse a product into a sum.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stepforge.backends.native.source import columns_of
from stepforge.expr import Graph, Instruction

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


#: The dtypes that parameters, gradients and states may be stored in. What has 16 bits is rounded to
#: float32 first, as torch does; bfloat16 is handled as bits, as neither every GPU nor the
#: interpreter rounds it alike.
STORAGE: dict[torch.dtype, Storage] = {
    torch.float32: Storage("tl.float32"),
    torch.float64: Storage("tl.float64"),
    torch.bfloat16: Storage(
        "tl.uint16", "from_bfloat16({0}).to({number})", "to_bfloat16({0}.to(tl.float32))"
    ),
    torch.float16: Storage("tl.float16", write="{0}.to(tl.float32).to({memory})"),
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
        kept: the columns whose tensors stay from step to step; all but the gradient.
        columns: all columns.
        dims: how many dimensions the tensors of a row have for the kernel; 0 if all are dense.
    """

    kept: tuple[str, ...]
    columns: tuple[str, ...]
    dims: int

    @classmethod
    def of(cls, graph: Graph, dims: int) -> Record:
        """The record of a graph's rows."""
        columns = columns_of(graph)
        return cls(tuple(name for name in columns if name != "g"), columns, dims)

    #: The number of the row's first block, and the row's elements.
    first, size = 0, 1

    def address(self, column: str) -> int:
        """Where the address of a kept column's tensor stands."""
        return 2 + self.kept.index(column)

    def extent(self, dim: int) -> int:
        """Where the length of a dimension stands."""
        return 2 + len(self.kept) + dim

    def stride(self, column: str, dim: int) -> int:
        """Where the distance of neighbours along a dimension stands, in elements."""
        return self.extent(self.dims) + self.columns.index(column) * self.dims + dim

    @property
    def width(self) -> int:
        """How many numbers there are."""
        return self.extent(self.dims) + len(self.columns) * self.dims


def triton_source(
    graph: Graph, dtypes: Mapping[str, torch.dtype], arithmetic: torch.dtype, dims: int
) -> str:
    """The Python source of a module whose function ``step`` is the kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype in which each of the graph's columns is stored.
        arithmetic: float32 or float64.
        dims: how many dimensions the tensors of a row have for the kernel; 0 if every row's lie
            without gaps in one order.
    """
    stored = ", ".join(f"{column} {_bare(dtype)}" for column, dtype in dtypes.items())
    return f'''\
"""A step in {_bare(arithmetic)} on {stored}; written by stepforge."""

import triton
import triton.language as tl


{_BFLOAT16 if torch.bfloat16 in dtypes.values() else ""}\
{_update(graph, arithmetic)}


{_kernel(graph, dtypes, arithmetic, dims)}'''


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


def _update(graph: Graph, arithmetic: torch.dtype) -> str:
    """The function that makes the new elements of the old."""
    program = graph.varying
    number = f"tl.{_bare(arithmetic)}"
    names = _register_names(graph)
    lines = [f"@triton.jit\ndef update({', '.join(_arguments_of_update(graph))}):"]
    for name, value in _constants(graph, arithmetic).items():
        lines.append(f"    {name} = {_literal(value, arithmetic)}")
    for instruction in program.instructions:
        expression = _expression(instruction, names, number)
        lines.append(f"    {names[instruction.out]} = {expression}")
    lines.append(f"    return {', '.join(names[register] for register in program.outputs)}")
    return "\n".join(lines)


def _kernel(
    graph: Graph, dtypes: Mapping[str, torch.dtype], arithmetic: torch.dtype, dims: int
) -> str:
    """The kernel: finds the row of a block and what belongs to it, and updates the block."""
    columns = columns_of(graph)
    record = Record.of(graph, dims)
    aligned = [] if dims else [f"{column}_aligned: tl.constexpr" for column in columns]
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
        *(f"    {name},  # the bytes that its addresses are multiples of" for name in aligned),
        "    SCALED: tl.constexpr,  # whether there are the last two",
        "    BLOCK: tl.constexpr,",
        "):",
    ]
    body = [
        "block = tl.program_id(0)",
        "row = tl.load(owners + block)",
        f"this = rows + row * {record.width}",
        f"begin = (block - tl.load(this + {record.first})) * BLOCK  # in 64 bits",
        f"left = tl.load(this + {record.size}) - begin",
        f"factor = tl.full((), 1.0, tl.{_bare(arithmetic)})",
        "if SCALED:",
        "    factor = tl.load(unscale)",
        "    left = tl.where(tl.load(found_inf) != 0, 0, left)",
    ]
    for column in columns:
        at = "gradients + row" if column == "g" else f"this + {record.address(column)}"
        pointer = f"tl.load({at}).to(tl.pointer_type({STORAGE[dtypes[column]].memory}))"
        body.append(f"{column}_base = {pointer}{'' if dims else ' + begin'}")
    if graph.coefficients:
        body.append("given = numbers + row * stride")
    for position, node in enumerate(graph.coefficients):
        test = " != 0" if node.boolean else ""
        body.append(f"c{position} = tl.load(given + {position}){test}  # {_shown(node)}")
    body.append("lane = tl.arange(0, BLOCK)")
    masked = _at(record) if dims else [f"{column}_at = {column}_base + lane" for column in columns]
    masked = ["inside = lane < left", *masked, *_work(graph, dtypes, arithmetic, ", inside")]
    if dims:
        body += masked
    else:
        # Without a mask, whole words are moved.
        body.append("if left >= BLOCK:")
        body += [
            f"    {column}_at = tl.multiple_of({column}_base + lane, {column}_aligned)"
            for column in columns
        ]
        body += [f"    {line}" for line in _work(graph, dtypes, arithmetic, "")]
        body += ["else:", *(f"    {line}" for line in masked)]
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


def _at(record: Record) -> list[str]:
    """Where the elements of a block are if their distances in memory are those of the record."""
    lines = ["rest = begin + lane"]
    lines += [f"{column}_at = {column}_base" for column in record.columns]
    for dim in reversed(range(record.dims)):
        lines += [
            f"length = tl.load(this + {record.extent(dim)})",
            "position = rest % length",
            "rest = rest // length",
        ]
        for column in record.columns:
            stride = f"tl.load(this + {record.stride(column, dim)})"
            lines.append(f"{column}_at = {column}_at + position * {stride}")
    return lines


def _work(
    graph: Graph, dtypes: Mapping[str, torch.dtype], arithmetic: torch.dtype, mask: str
) -> list[str]:
    """Reads the elements of a block, updates them and writes the results."""
    number = f"tl.{_bare(arithmetic)}"
    lines = []
    for name in graph.varying.inputs:
        read = STORAGE[dtypes[name]].read.format(f"tl.load({name}_at{mask})", number=number)
        lines.append(f"{name}_in = {read}{' * factor' if name == 'g' else ''}")
    results = ", ".join(f"{name}_out" for name in graph.results)
    lines.append(f"{results} = update({', '.join(_arguments_of_update(graph))})")
    for name in graph.results:
        storage = STORAGE[dtypes[name]]
        write = storage.write.format(f"{name}_out", memory=storage.memory)
        lines.append(f"tl.store({name}_at, {write}{mask})")
    return lines


def _arguments_of_update(graph: Graph) -> list[str]:
    inputs = [f"{name}_in" for name in graph.varying.inputs]
    return [*inputs, *(f"c{position}" for position in range(len(graph.coefficients)))]


def _register_names(graph: Graph) -> list[str]:
    """What each register is called."""
    program = graph.varying
    constants = [f"k{position}" for position in range(len(program.constants))]
    results = [f"x{position}" for position in range(len(program.instructions))]
    return [*_arguments_of_update(graph), *constants, *results]


def _constants(graph: Graph, arithmetic: torch.dtype) -> dict[str, float]:
    program = graph.varying
    constants = {f"k{position}": value for position, value in enumerate(program.constants)}
    if any(instruction.op == "finite" for instruction in program.instructions):
        constants["largest"] = torch.finfo(arithmetic).max
    return constants


def _literal(value: float, arithmetic: torch.dtype) -> str:
    """A number of the arithmetic's own type: a bare one would be float32, whatever it meets."""
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

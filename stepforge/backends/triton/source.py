"""The Triton source of a kernel: one program steps a block of a parameter.

The result has the reference's bits, as long as the launch forbids the compiler to fuse a product
into a sum. Where a column has a format, the kernel decodes a block as it loads it, and encodes it
before it stores it: the decoded numbers are never in memory.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch

from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.dtypes import BFLOAT16_FUNCTIONS, TRITON_TYPES
from stepforge.backends.triton.expressions import function, type_name
from stepforge.formats import BLOCK as CHUNK
from stepforge.formats import DRAW, Format, Part, result_salt, tensor_name
from stepforge.program import Graph, Program

__all__ = ["KernelArgs", "named", "triton_source", "writer_source"]

_TWO_LINES = "\n\n\n"


@dataclass(frozen=True)
class KernelArgs:
    """The record of a parameter in a kernel's table: int64 numbers, at these positions.

    Attributes:
        states: the tensors that stay from step to step: all but the gradient.
        elements: the tensors with one element per element.
        dims: the dimensions of a parameter's tensors for the kernel; 0 if all are dense.
        in_blocks: True if elements share scales.
        is_random: True if rounding takes random bits.
    """

    states: tuple[str, ...]
    elements: tuple[str, ...]
    dims: int
    in_blocks: bool
    is_random: bool

    @classmethod
    def of(cls, spec: KernelSpec, dims: int) -> KernelArgs:
        """Return the record of a kernel's parameters."""
        states = tuple(name for name in spec.tensors if name != "g")
        return cls(states, spec.elements, dims, spec.in_blocks, spec.is_random)

    #: The positions of the parameter's first block and of its number of elements. With shared
    #: scales the number counts the last block of each row as whole.
    first, size = 0, 1

    def address(self, tensor: str) -> int:
        """Return the position of a tensor's address."""
        return 2 + self.states.index(tensor)

    def extent(self, dim: int) -> int:
        """Return the position of the length of a dimension."""
        return 2 + len(self.states) + dim

    def stride(self, tensor: str, dim: int) -> int:
        """Return the position of a tensor's stride, in elements."""
        return self.extent(self.dims) + self.elements.index(tensor) * self.dims + dim

    @property
    def row_length(self) -> int:
        """The position of the elements of a row of dimension 0, if elements share scales."""
        return self.extent(self.dims) + len(self.elements) * self.dims

    @property
    def start(self) -> int:
        """The position of the flat index of the first element, if rounding takes random bits."""
        return self.row_length + self.in_blocks

    @property
    def width(self) -> int:
        """The number of numbers."""
        return self.start + self.is_random


def triton_source(spec: KernelSpec, dims: int) -> str:
    """Return the Python source of a module whose function ``step`` is the kernel.

    Args:
        spec: its computation and storage.
        dims: the dimensions of a parameter's tensors for the kernel; 0 if all tensors of every
            parameter are dense in one order.
    """
    stored = ", ".join(f"{tensor} {_bare(dtype)}" for tensor, dtype in spec.dtype_of.items())
    about = f'"""A step in {_bare(spec.arithmetic)} on {stored}; written by stepforge."""'
    functions = [*_format_functions(spec), _update(spec)]
    return f"""\
{textwrap.fill(about, 100)}

import triton
import triton.language as tl


{BFLOAT16_FUNCTIONS if torch.bfloat16 in spec.dtypes else ""}\
{_TWO_LINES.join(functions)}


{_kernel(spec, KernelArgs.of(spec, dims))}"""


def writer_source(words: int) -> str:
    """Return the source of a module whose function ``write`` writes numbers passed by value.

    Args:
        words: the largest number of int32 that a launch writes.
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


def named(tensor: str, what: str) -> str:
    """Return the name of a variable that belongs to a tensor.

    A state may have any name, but none ends as these do.

    Example:
        >>> named("m", "at"), named("m.scale", "at")
        ('m_at', 'm_at_scale')
    """
    column, _, part = tensor.partition(".")
    return f"{column}_{what}_{part}" if part else f"{column}_{what}"


def _update(spec: KernelSpec) -> str:
    """Return the function that computes the new elements from the old."""
    graph = spec.graph
    return function("update", graph.varying, _update_arguments(graph), spec.arithmetic)


def _update_arguments(graph: Graph) -> list[str]:
    inputs = [f"{name}_in" for name in graph.varying.inputs]
    return [*inputs, *(f"c{position}" for position in range(len(graph.coefficients)))]


def _format_numbers(spec: KernelSpec) -> dict[Format, int]:
    """Return the number of each format, which ends the names of its functions."""
    return {format_: n for n, format_ in enumerate(dict.fromkeys(spec.formats.values()))}


def _format_functions(spec: KernelSpec) -> list[str]:
    """Return the functions that decode and encode formats."""
    texts = []
    for format_, n in _format_numbers(spec).items():
        for name, program, about in (
            ("decode", format_.decode, "a number of what is stored"),
            ("size", format_.magnitude, "the word of which the largest in a block makes its scale"),
            ("scale", format_.scale, "the scale of a block"),
            ("encode", format_.encode, "what is stored of a number"),
        ):
            if program is not None:
                about = f"{format_.name}: {about}."
                texts.append(_format_function(f"{name}_{n}", program, about))
    if spec.is_random:
        texts.append(_format_function("draw", DRAW, "A random word."))
    return texts


def _format_function(name: str, program: Program, about: str) -> str:
    """Return a function of a format; the arithmetic of formats is float32."""
    arguments = [f"{given}_in" for given in program.inputs]
    return function(name, program, arguments, torch.float32, f'"""{about}"""')


def _parts(spec: KernelSpec, column: str) -> list[tuple[str, Part]]:
    """Return the parts of a column's format, each with the name of its tensor."""
    return [(tensor_name(column, part), part) for part in spec.formats[column].parts]


def _kernel(spec: KernelSpec, args: KernelArgs) -> str:
    """Return the kernel: it finds the parameter of a block, and steps the block."""
    graph = spec.graph
    aligned = [] if args.dims else [named(x, "aligned") for x in args.elements]
    keys = ["    keys,  # of each row what its random bits follow from"]
    lines = [
        '@triton.jit(do_not_specialize=["stride"])',
        "def step(",
        "    owners,  # the row of each block",
        f"    rows,  # of each row {args.width} numbers: its first block, its size, ...",
        "    gradients,  # of each row the address of its gradient",
        "    numbers,  # the coefficients of each row, or those of all",
        "    stride,  # from the coefficients of a row to those of the next; 0 if they are of all",
        "    unscale,  # what gradients are multiplied by before all else",
        "    found_inf,  # not zero if nothing is to be changed",
        *(keys if args.is_random else []),
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
        f"this = rows + row * {args.width}",
        f"begin = (block - tl.load(this + {args.first})) * BLOCK  # in 64 bits",
        f"left = tl.load(this + {args.size}) - begin",
        f"factor = tl.full((), 1.0, {type_name(spec.arithmetic)})",
        "if SCALED:",
        "    factor = tl.load(unscale)",
        "    left = tl.where(tl.load(found_inf) != 0, 0, left)",
    ]
    is_flat = not (args.dims or args.in_blocks)
    for tensor in spec.tensors:
        at = "gradients + row" if tensor == "g" else f"this + {args.address(tensor)}"
        memory = TRITON_TYPES[spec.dtype_of[tensor]].memory
        pointer = f"tl.load({at}).to(tl.pointer_type({memory}))"
        body.append(f"{named(tensor, 'base')} = {pointer}{' + begin' if is_flat else ''}")
    if graph.coefficients:
        body.append("given = numbers + row * stride")
    for position, node in enumerate(graph.coefficients):
        test = " != 0" if node.boolean else ""
        body.append(f"c{position} = tl.load(given + {position}){test}  # {_shown(node)}")
    if args.is_random:
        body.append("key = tl.load(keys + row).to(tl.uint32)")
        body.append(f"start = tl.load(this + {args.start}).to(tl.uint32)")
    body += _lanes(spec, args)
    masked = [*_pointers(args, masked=True), *_work(spec, args, masked=True)]
    if args.dims:
        body += masked
    else:
        # Without a mask, the compiler moves whole words.
        body.append(f"if {_is_whole(args)}:")
        whole = [*_pointers(args, masked=False), *_work(spec, args, masked=False)]
        body += [f"    {line}" for line in whole]
        body += ["else:", *(f"    {line}" for line in masked)]
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


# A kernel's block is flat. If elements share scales, it is a matrix with one chunk of elements that
# share a scale per row, so a maximum along an axis finds the largest of a chunk. Chunks restart at
# every row of a tensor's dimension 0, and the last one of such a row may be shorter.


def _lanes(spec: KernelSpec, args: KernelArgs) -> list[str]:
    """Return the lines that number the elements and chunks of a block, and locate the scales."""
    if not args.in_blocks:
        return ["lane = tl.arange(0, BLOCK)"]
    lines = [
        f"width = tl.load(this + {args.row_length})  # of a row of dimension 0",
        f"lane = tl.arange(0, {CHUNK})[None, :]",
        f"chunk = begin // {CHUNK} + tl.arange(0, BLOCK // {CHUNK})[:, None]",
    ]
    for column in spec.formats:
        for tensor, part in _parts(spec, column):
            if part.of_block:
                lines.append(f"{named(tensor, 'at')} = {named(tensor, 'base')} + chunk")
    return lines


def _is_whole(args: KernelArgs) -> str:
    """Return the condition that a block has all its elements, and that they are consecutive."""
    return f"(left >= BLOCK) & (width % {CHUNK} == 0)" if args.in_blocks else "left >= BLOCK"


def _pointers(args: KernelArgs, *, masked: bool) -> list[str]:
    """Return the lines that locate the elements of a block, and mask those outside."""
    if args.in_blocks:
        lines = _chunk_elements(masked=masked)
    else:
        lines = ["inside = lane < left"] if masked else []
        if args.is_random or args.dims:
            lines.append("element = begin + lane")
    if args.is_random:
        lines.append("index = element.to(tl.uint32) + start")
    if args.dims:
        return [*lines, *_strided_pointers(args)]
    # A flat block begins at the kernel's own. The rows of a matrix are consecutive.
    step, hint = ("element", "(1, {})") if args.in_blocks else ("lane", "{}")
    for tensor in args.elements:
        at = f"{named(tensor, 'base')} + {step}"
        if not masked:
            at = f"tl.multiple_of({at}, {hint.format(named(tensor, 'aligned'))})"
        lines.append(f"{named(tensor, 'at')} = {at}")
    return lines


def _chunk_elements(*, masked: bool) -> list[str]:
    """Return the lines that find the elements in the chunks of a block."""
    if not masked:
        return [f"element = chunk * {CHUNK} + lane"]
    return [
        f"chunks = (width + {CHUNK - 1}) // {CHUNK}  # of a row of dimension 0",
        f"column = chunk % chunks * {CHUNK} + lane",
        "element = chunk // chunks * width + column",
        f"reached = chunk * {CHUNK} < begin + left",
        "inside = reached & (column < width)",
    ]


def _strided_pointers(args: KernelArgs) -> list[str]:
    """Return the lines that locate elements by the strides in the record."""
    lines = ["rest = element"]
    lines += [f"{named(tensor, 'at')} = {named(tensor, 'base')}" for tensor in args.elements]
    for dim in reversed(range(args.dims)):
        lines += [
            f"length = tl.load(this + {args.extent(dim)})",
            "position = rest % length",
            "rest = rest // length",
        ]
        for tensor in args.elements:
            stride, at = f"tl.load(this + {args.stride(tensor, dim)})", named(tensor, "at")
            lines.append(f"{at} = {at} + position * {stride}")
    return lines


def _work(spec: KernelSpec, args: KernelArgs, *, masked: bool) -> list[str]:
    """Return the lines that read the elements of a block, update them and write the results."""
    graph = spec.graph
    lines = []
    for column in graph.varying.inputs:
        lines += _read(spec, args, column, masked=masked)
    results = ", ".join(f"{column}_out" for column in graph.results)
    lines.append(f"{results} = update({', '.join(_update_arguments(graph))})")
    for column in graph.results:
        lines += _write(spec, args, column, masked=masked)
    return lines


def _read(spec: KernelSpec, args: KernelArgs, column: str, *, masked: bool) -> list[str]:
    """Return the lines that read a column."""
    number = type_name(spec.arithmetic)
    if column not in spec.formats:
        read = _load(spec, args, column, number, masked=masked)
        return [f"{column}_in = {read}{' * factor' if column == 'g' else ''}"]
    format_, lines, inputs = spec.formats[column], [], {}
    for tensor, part in _parts(spec, column):
        inputs[part.name or "stored"] = name = named(tensor, "stored")
        lines.append(f"{name} = {_load(spec, args, tensor, 'tl.float32', masked=masked)}")
    given = ", ".join(inputs[name] for name in format_.decode.inputs)
    widened = "" if spec.arithmetic == torch.float32 else f".to({number})"
    decode = f"decode_{_format_numbers(spec)[format_]}"
    return [*lines, f"{column}_in = {decode}({given}){widened}"]


def _load(spec: KernelSpec, args: KernelArgs, tensor: str, number: str, *, masked: bool) -> str:
    """Return the expression that loads a tensor, as a number of that type or as a uint32."""
    load = f"tl.load({named(tensor, 'at')}{_mask(args, tensor) if masked else ''})"
    return TRITON_TYPES[spec.dtype_of[tensor]].read.format(load, number=number)


def _write(spec: KernelSpec, args: KernelArgs, column: str, *, masked: bool) -> list[str]:
    """Return the lines that store the new numbers of a column."""
    if column not in spec.formats:
        return [_store(spec, args, column, f"{column}_out", masked=masked)]
    format_ = spec.formats[column]
    n = _format_numbers(spec)[format_]
    narrowed = "" if spec.arithmetic == torch.float32 else ".to(tl.float32)"
    inputs, lines = {"x": f"{column}_out{narrowed}"}, []
    if format_.in_blocks:
        size, scale = f"{column}_size", named(f"{column}.scale", "new")
        lines.append(f"{size} = size_{n}({inputs['x']})")
        if masked:  # elements outside never set the scale
            lines.append(f"{size} = tl.where(inside, {size}, 0)")
        lines.append(f"{scale} = scale_{n}(tl.max({size}, 1, keep_dims=True))")
        inputs["scale"] = scale
    if format_.is_random:
        salt = result_salt(spec.graph.results.index(column))
        inputs["random"] = f"draw(index, key + tl.full((), {salt:#x}, tl.uint32))"
    names = [named(tensor, "new") for tensor, part in _parts(spec, column) if not part.of_block]
    given = ", ".join(inputs[name] for name in format_.encode.inputs)
    lines.append(f"{', '.join(names)} = encode_{n}({given})")
    for tensor, _ in _parts(spec, column):
        lines.append(_store(spec, args, tensor, named(tensor, "new"), masked=masked))
    return lines


def _store(spec: KernelSpec, args: KernelArgs, tensor: str, value: str, *, masked: bool) -> str:
    """Return the line that stores a number or a uint32."""
    kind = TRITON_TYPES[spec.dtype_of[tensor]]
    write = kind.write.format(value, memory=kind.memory)
    mask = _mask(args, tensor) if masked else ""
    return f"tl.store({named(tensor, 'at')}, {write}{mask})"


def _mask(args: KernelArgs, tensor: str) -> str:
    """Return the argument that masks the elements outside the parameter."""
    return ", inside" if tensor in args.elements else ", reached"


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(node: object) -> str:
    text = str(node)
    return text if len(text) <= 60 else text[:57] + "..."

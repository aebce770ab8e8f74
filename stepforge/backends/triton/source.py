"""The Triton source of a kernel: one program steps a block of a parameter.

The result has the reference's bits, as long as the launch forbids the compiler to fuse a product
into a sum. Where a column has a format, the kernel decodes a block as it loads it, and encodes it
before it stores it: the decoded numbers are never in memory.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.dtypes import BFLOAT16_FUNCTIONS, triton_type
from stepforge.backends.triton.expressions import SQRT_FUNCTION, commented, function, type_name
from stepforge.backends.triton.measure_source import (
    kept_names,
    measure_functions,
    measure_helpers,
    measure_lines,
    read_at_rest,
)
from stepforge.backends.triton.reduction_source import in_pairs
from stepforge.backends.triton.variant import Target, Variant, elements_of_thread
from stepforge.backends.triton.words import NUMBER_FUNCTIONS, number_of
from stepforge.formats import BLOCK as CHUNK
from stepforge.formats import DRAW, Format, Part, result_salt, tensor_name
from stepforge.program import NEW_P, Graph, Program

__all__ = [
    "WHOLE",
    "KernelArgs",
    "coefficient_words",
    "has_two_paths",
    "named",
    "triton_source",
    "writer_source",
]

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


def triton_source(spec: KernelSpec, variant: Variant) -> str:
    """Return the Python source of a module whose function ``step`` is the kernel.

    Args:
        spec: its computation and storage.
        variant: the tables and the GPU that it is for.
    """
    target = variant.target
    stored = ", ".join(f"{tensor} {_bare(dtype)}" for tensor, dtype in spec.dtype_of.items())
    about = f'"""A step in {_bare(spec.arithmetic)} on {stored}; written by stepforge."""'
    functions = [*_format_functions(spec, target), _update(spec, target)]
    if spec.graph.reductions:
        functions += measure_functions(spec.graph, spec.arithmetic, target)
    helpers = "".join(NUMBER_FUNCTIONS[n] for n in sorted(set(map(len, coefficient_words(spec)))))
    if torch.bfloat16 in spec.dtypes and not target.rounds_bfloat16:
        helpers += BFLOAT16_FUNCTIONS
    if any(" sqrt(" in text for text in functions):
        helpers += SQRT_FUNCTION
    if spec.graph.reductions:
        helpers += measure_helpers(spec.arithmetic, target)
    return f"""\
{textwrap.fill(about, 100)}

import triton
import triton.language as tl


{helpers}{_TWO_LINES.join(functions)}


{_kernel(spec, variant)}"""


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


def _update(spec: KernelSpec, target: Target) -> str:
    """Return the function that computes the new elements from the old."""
    graph = spec.graph
    return function("update", graph.varying, _update_arguments(graph), spec.arithmetic, target)


def _update_arguments(graph: Graph) -> list[str]:
    inputs = [f"{name}_in" for name in graph.varying.inputs]
    return [*inputs, *(f"c{position}" for position in range(len(graph.coefficients)))]


def _format_numbers(spec: KernelSpec) -> dict[Format, int]:
    """Return the number of each format, which ends the names of its functions."""
    return {format_: n for n, format_ in enumerate(dict.fromkeys(spec.formats.values()))}


def _format_functions(spec: KernelSpec, target: Target) -> list[str]:
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
                texts.append(_format_function(f"{name}_{n}", program, about, target))
    if spec.is_random:
        texts.append(_format_function("draw", DRAW, "A random word.", target))
    return texts


def _format_function(name: str, program: Program, about: str, target: Target) -> str:
    """Return a function of a format; the arithmetic of formats is float32."""
    given = [node.op for node in program.given]  # the largest of a block
    arguments = [f"{name}_in" for name in (*program.inputs, *given)]
    return function(name, program, arguments, torch.float32, target, f'"""{about}"""')


def _parts(spec: KernelSpec, column: str) -> list[tuple[str, Part]]:
    """Return the parts of a column's format, each with the name of its tensor."""
    return [(tensor_name(column, part), part) for part in spec.formats[column].parts]


def _kernel(spec: KernelSpec, variant: Variant) -> str:
    """Return the kernel: it finds the parameter of a block, and steps the block."""
    args = KernelArgs.of(spec, variant.dims)
    aligned = [] if variant.dims else [named(x, "aligned") for x in spec.elements]
    keys = ["    keys,  # of each row what its random bits follow from"]
    words = [word for names in coefficient_words(spec) for word in names]
    measure = [
        "    partial,  # a number for each reduction and block",
        "    blocks,",
    ]
    unspecialized = [*words, "blocks"] if spec.graph.reductions else words
    lines = [
        *textwrap.wrap(
            f"@triton.jit(do_not_specialize={unspecialized})",
            100,
            subsequent_indent=" " * 31,
            break_long_words=False,
        ),
        "def step(",
        "    owners,  # the row of each block",
        f"    rows,  # of each row {args.width} numbers: its first block, its size, ...",
        "    gradients,  # of each row the address of its gradient",
        "    numbers,  # the coefficients of each row; None if those of all are arguments",
        *(f"    {word}," for word in words),
        "    unscale,  # what gradients are multiplied by before all else",
        "    found_inf,  # not zero if nothing is to be changed",
        *(keys if spec.is_random else []),
        *(measure if spec.graph.reductions else []),
        *(
            f"    {name}: tl.constexpr,  # the bytes that its addresses are multiples of"
            for name in aligned
        ),
        "    SCALED: tl.constexpr,  # whether there are unscale and found_inf",
        "    BLOCK: tl.constexpr,",
        "):",
    ]
    left = f"tl.load(this + {args.size}) - begin"
    narrowed = f"tl.minimum({left}, BLOCK).to(tl.int32)"
    body = [
        "block = tl.program_id(0)",
        "row = tl.load(owners + block)",
        f"this = rows + row * {args.width}",
        f"begin = (block - tl.load(this + {args.first})) * BLOCK  # in 64 bits",
        f"left = {left if has_two_paths(spec, variant) else narrowed}",
        *(["held = left  # also in a step that is skipped"] if spec.graph.reductions else []),
        f"factor = tl.full((), 1.0, {type_name(spec.arithmetic)})",
        "if SCALED:",
        "    factor = tl.load(unscale)",
        "    left = tl.where(tl.load(found_inf) != 0, 0, left)",
    ]
    if _has_rows(spec, variant):
        body += _rows(spec, variant)
    for tensor in spec.tensors:
        at = "gradients + row" if tensor == "g" else f"this + {args.address(tensor)}"
        body += _base(spec, variant, tensor, at)
    body += _coefficients(spec)
    if spec.is_random:
        body.append("key = tl.load(keys + row).to(tl.uint32)")
        body.append(f"start = tl.load(this + {args.start}).to(tl.uint32)")
    body += _lanes(spec, variant)
    masked = [*_pointers(spec, variant, masked=True), *_work(spec, variant, masked=True)]
    if has_two_paths(spec, variant):
        # Without a mask, the compiler moves whole words.
        body.append(f"if {WHOLE}:")
        whole = [*_pointers(spec, variant, masked=False), *_work(spec, variant, masked=False)]
        body += [f"    {line}" for line in whole]
        body += ["else:", *(f"    {line}" for line in masked)]
    else:
        body += masked
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


def coefficient_words(spec: KernelSpec) -> list[tuple[str, ...]]:
    """Return the names of the arguments that hold each coefficient's bits, upper half first."""
    halves = ("high", "low") if spec.arithmetic == torch.float64 else ("bits",)
    return [
        tuple(f"c{position}_{half}" for half in halves)
        for position in range(len(spec.graph.coefficients))
    ]


def _coefficients(spec: KernelSpec) -> list[str]:
    """Return the lines that read the coefficients: those of the row, or those of all."""
    shared, own = [], [f"    given = numbers + row * {len(spec.graph.coefficients)}"]
    for position, (node, words) in enumerate(zip(spec.graph.coefficients, coefficient_words(spec))):
        test = " != 0" if node.boolean else ""
        shared.append(commented(f"    c{position} = {number_of(words)}{test}", node))
        own.append(f"    c{position} = tl.load(given + {position}){test}")
    if not shared:
        return []
    return ["if numbers is None:", *shared, "else:", *own]


def _base(spec: KernelSpec, variant: Variant, tensor: str, at: str) -> list[str]:
    """Return the lines that find the address of a tensor, or of its part in this block.

    Args:
        spec: the kernel's spec.
        variant: its variant.
        tensor: the name of the tensor.
        at: the place of its address.
    """
    base, is_element = named(tensor, "base"), tensor in spec.elements
    memory = triton_type(spec.dtype_of[tensor], variant.target).memory
    lines = [f"{base} = tl.load({at}).to(tl.pointer_type({memory}))"]
    if not variant.dims and is_element:
        lines.append(f"{base} = tl.multiple_of({base}, {named(tensor, 'aligned')})")
    if not is_element:
        lines.append(f"{base} += begin // {CHUNK}")
    elif not variant.dims:
        lines.append(f"{base} += {'origin' if _has_rows(spec, variant) else 'begin'}")
    return lines


# A kernel's block is flat. If elements share scales, the chunks that share one are along the first
# axis, so a maximum along the others finds the largest of a chunk. Chunks restart at every row of a
# tensor's dimension 0, and the last one of such a row may be shorter.
#
# There is one more axis between if rows begin anywhere, so that nothing can be moved in wide words.
# The compiler gives neighbouring elements to neighbouring threads then, and spreads what is left of
# them over the chunks. Each thread goes along the axis between: its elements are in one chunk, and
# their addresses differ by constants.


def _has_rows(spec: KernelSpec, variant: Variant) -> bool:
    """Return True if chunks restart at rows that they do not fill."""
    return spec.in_blocks and variant.unit < CHUNK


def has_two_paths(spec: KernelSpec, variant: Variant) -> bool:
    """Return True if a kernel has a path of its own for blocks without a mask: :data:`WHOLE`."""
    return not (variant.dims or spec.in_blocks or variant.unit > 1)


#: The condition that a block has all its elements.
WHOLE = "left >= BLOCK"


def _held(spec: KernelSpec) -> str:
    """Return the variable of the elements to load, from the first of a block on.

    A step that is skipped needs none of them, unless it makes reductions.
    """
    return "held" if spec.graph.reductions else "left"


def _in_32_bits(left: str, spec: KernelSpec, variant: Variant) -> str:
    """Return a number of elements from the first of a block on, in 32 bits."""
    return f"{left}.to(tl.int32)" if has_two_paths(spec, variant) else left


def _lanes(spec: KernelSpec, variant: Variant) -> list[str]:
    """Return the lines that number the elements and chunks of a block, and locate the scales."""
    if not spec.in_blocks:
        held = _held(spec)
        hint = f"{held} = tl.multiple_of({held}, {variant.unit})"
        return [*([hint] if variant.unit > 1 else []), "lane = tl.arange(0, BLOCK)"]
    axes = ", None" * (2 if variant.unit == 1 else 1)
    lines = [f"count = tl.arange(0, BLOCK // {CHUNK})[:{axes}]  # chunks of the block"]
    if variant.unit == 1:
        together = CHUNK // elements_of_thread(spec, variant)
        lines += [
            f"piece = tl.arange(0, {CHUNK // together})[None, :, None] * {together}",
            f"within = tl.arange(0, {together})[None, None, :]",
            "lane = within + piece",
        ]
    else:
        lines.append(f"lane = tl.arange(0, {CHUNK})[None, :]")
    for column in spec.formats:
        for tensor, part in _parts(spec, column):
            if part.of_block:
                lines.append(f"{named(tensor, 'at')} = {named(tensor, 'base')} + count")
    return lines


def _rows(spec: KernelSpec, variant: Variant) -> list[str]:
    """Return the lines that find the rows of dimension 0 in which the chunks of a block are."""
    width = f"tl.load(this + {KernelArgs.of(spec, variant.dims).row_length})"
    hinted = width if variant.unit == 1 else f"tl.multiple_of({width}, {variant.unit})"
    return [
        f"width = {hinted}  # of a row of dimension 0",
        f"chunks = (width + {CHUNK - 1}) >> {CHUNK.bit_length() - 1}  # of such a row",
        f"missing = (chunks * {CHUNK} - width).to(tl.uint32)  # elements of the last of them",
        # 2**32 chunks are more than any memory holds, and dividing in 64 bits takes a hundred
        # instructions; a few more if numbers have signs.
        "chunks = chunks.to(tl.uint32)",
        f"first_chunk = (begin // {CHUNK}).to(tl.uint32)",
        "first_line = first_chunk // chunks",
        "origin = begin - first_line.to(tl.int64) * missing  # the block's first element",
    ]


def _largest_of_chunk(value: str, variant: Variant) -> str:
    largest = f"tl.max({value}, 1, keep_dims=True)"
    return f"tl.max({largest}, 2, keep_dims=True)" if variant.unit == 1 else largest


def _pointers(spec: KernelSpec, variant: Variant, *, masked: bool) -> list[str]:
    """Return the lines that locate the elements of a block, and mask those outside."""
    if spec.in_blocks:
        lines = _chunk_elements(_held(spec), variant)
    else:
        held = _in_32_bits(_held(spec), spec, variant)
        lines = [f"inside = lane < {held}"] if masked else []
    step = "offset" if spec.in_blocks else "lane"
    if spec.is_random or variant.dims:
        begin = "origin" if _has_rows(spec, variant) else "begin"
        lines.append(f"element = {begin} + {step}")
    if spec.is_random:
        lines.append("index = element.to(tl.uint32) + start")
    if variant.dims:
        return [*lines, *_strided_pointers(spec, variant)]
    for tensor in spec.elements:
        lines.append(f"{named(tensor, 'at')} = {named(tensor, 'base')} + {step}")
    return lines


def _chunk_elements(held: str, variant: Variant) -> list[str]:
    """Return the lines that find the elements in the chunks of a block, and mask those outside."""
    reached = f"reached = count * {CHUNK} < {held}"
    if variant.unit == CHUNK:
        return [reached, "inside = reached", f"offset = count * {CHUNK} + lane"]
    return [
        "chunk = first_chunk + count",
        "line = chunk // chunks",
        f"length = {CHUNK} - tl.where(chunk % chunks == chunks - 1, missing, 0)",
        reached,
        "inside = lane < tl.where(reached, length, 0)",
        f"offset = count * {CHUNK} - (line - first_line) * missing",
        # No offset is larger. With one that may be, AMD's compiler branches around each access.
        "offset = tl.minimum(offset, BLOCK).to(tl.int32)",
        f"offset = offset + {'within + piece' if variant.unit == 1 else 'lane'}",
    ]


def _strided_pointers(spec: KernelSpec, variant: Variant) -> list[str]:
    """Return the lines that locate elements by the strides in the record."""
    args = KernelArgs.of(spec, variant.dims)
    lines = ["rest = element"]
    lines += [f"{named(tensor, 'at')} = {named(tensor, 'base')}" for tensor in spec.elements]
    for dim in reversed(range(args.dims)):
        lines += [
            f"length = tl.load(this + {args.extent(dim)})",
            "position = rest % length",
            "rest = rest // length",
        ]
        for tensor in spec.elements:
            stride, at = f"tl.load(this + {args.stride(tensor, dim)})", named(tensor, "at")
            lines.append(f"{at} = {at} + position * {stride}")
    return lines


def _work(spec: KernelSpec, variant: Variant, *, masked: bool) -> list[str]:
    """Return the lines that read the elements of a block, update them and write the results."""
    graph = spec.graph
    lines, read = [], graph.varying.inputs
    outputs = [f"{column}_out" for column in graph.results]
    if graph.reductions:
        read = tuple(dict.fromkeys([*read, *read_at_rest(graph)]))
        outputs += kept_names(graph)
    for column in read:
        lines += _read(spec, variant, column, masked=masked)
    given = ", ".join(_update_arguments(graph))
    update = [f"{', '.join(outputs)} = update({given})"]
    if graph.reductions:
        update = [f"{', '.join(outputs)} = update(", f"    {given}", ")"]
    if masked and _has_branch(spec, variant):
        for column in graph.results:
            lines.append(f"{column}_out = {column if column in read else read[0]}_in")
        left = _in_32_bits("left", spec, variant)
        lines.append(f"if {left} > 0:  # the step is not skipped")
        lines += [f"    {line}" for line in update]
    else:
        lines += update
    if graph.reductions and masked:
        lines += ["stored = inside & (left > 0)  # not in a step that is skipped"]
        lines += ["stored_scales = reached & (left > 0)"] if spec.in_blocks else []
    for column in graph.results:
        lines += _write(spec, variant, column, masked=masked)
    if graph.reductions:
        shape = "tl.reshape({}, (BLOCK,))" if spec.in_blocks else "{}"
        pairs = in_pairs(spec.arithmetic, variant.target)
        new_p = _stored_p(spec, variant)
        lines += measure_lines(graph, new_p, shape=shape, masked=masked, pairs=pairs)
    return lines


def _has_branch(spec: KernelSpec, variant: Variant) -> bool:
    """Return True if a branch makes a kernel faster: on AMD where nothing is moved in wide words.

    Its compiler computes two elements of float32 by one instruction if they are parts of a word, or
    if a branch chooses what becomes of them. With reductions there is none: without an update they
    would lack what they keep of it.
    """
    is_narrow = variant.unit == 1 and not variant.dims and not spec.graph.reductions
    return variant.target.is_amd and is_narrow and spec.arithmetic == torch.float32


def _read(spec: KernelSpec, variant: Variant, column: str, *, masked: bool) -> list[str]:
    """Return the lines that read a column."""
    number = type_name(spec.arithmetic)
    if column not in spec.formats:
        read = _load(spec, variant, column, number, masked=masked)
        return [f"{column}_in = {read}{' * factor' if column == 'g' else ''}"]
    lines, inputs = [], {}
    for tensor, part in _parts(spec, column):
        inputs[part.name or "stored"] = name = named(tensor, "stored")
        lines.append(f"{name} = {_load(spec, variant, tensor, 'tl.float32', masked=masked)}")
    return [*lines, f"{column}_in = {_decoded(spec, column, inputs)}"]


def _decoded(spec: KernelSpec, column: str, inputs: Mapping[str, str]) -> str:
    """Return the expression of a column's numbers in the arithmetic.

    Args:
        spec: the kernel's spec.
        column: the column.
        inputs: the variable of each part of its format, as it is loaded.
    """
    format_ = spec.formats[column]
    given = ", ".join(inputs[name] for name in format_.decode.inputs)
    widened = "" if spec.arithmetic == torch.float32 else f".to({type_name(spec.arithmetic)})"
    return f"decode_{_format_numbers(spec)[format_]}({given}){widened}"


def _load(spec: KernelSpec, variant: Variant, tensor: str, number: str, *, masked: bool) -> str:
    """Return the expression that loads a tensor, as a number of that type or as a uint32."""
    mask = _mask(spec, tensor, "inside", "reached") if masked else ""
    kind = triton_type(spec.dtype_of[tensor], variant.target)
    return kind.read.format(f"tl.load({named(tensor, 'at')}{mask})", number=number)


def _write(spec: KernelSpec, variant: Variant, column: str, *, masked: bool) -> list[str]:
    """Return the lines that store the new numbers of a column."""
    if column not in spec.formats:
        return [_store(spec, variant, column, f"{column}_out", masked=masked)]
    format_ = spec.formats[column]
    n = _format_numbers(spec)[format_]
    narrowed = "" if spec.arithmetic == torch.float32 else ".to(tl.float32)"
    inputs, lines = {"x": f"{column}_out{narrowed}"}, []
    if format_.in_blocks:
        size, scale = f"{column}_size", named(f"{column}.scale", "new")
        lines.append(f"{size} = size_{n}({inputs['x']})")
        if variant.unit < CHUNK:  # elements outside never set the scale
            lines.append(f"{size} = tl.where(inside, {size}, 0)")
        lines.append(f"{scale} = scale_{n}({_largest_of_chunk(size, variant)})")
        inputs["scale"] = scale
    if format_.is_random:
        salt = result_salt(spec.graph.results.index(column))
        inputs["random"] = f"draw(index, key + tl.full((), {salt:#x}, tl.uint32))"
    names = [named(tensor, "new") for tensor, part in _parts(spec, column) if not part.of_block]
    given = ", ".join(inputs[name] for name in format_.encode.inputs)
    lines.append(f"{', '.join(names)} = encode_{n}({given})")
    for tensor, _ in _parts(spec, column):
        lines.append(_store(spec, variant, tensor, named(tensor, "new"), masked=masked))
    return lines


def _store(spec: KernelSpec, variant: Variant, tensor: str, value: str, *, masked: bool) -> str:
    """Return the line that stores a number or a uint32."""
    kind = triton_type(spec.dtype_of[tensor], variant.target)
    write = kind.write.format(value, memory=kind.memory)
    masks = ("stored", "stored_scales") if spec.graph.reductions else ("inside", "reached")
    mask = _mask(spec, tensor, *masks) if masked else ""
    return f"tl.store({named(tensor, 'at')}, {write}{mask})"


def _mask(spec: KernelSpec, tensor: str, of_elements: str, of_scales: str) -> str:
    """Return the argument that masks the elements outside the parameter."""
    return f", {of_elements if tensor in spec.elements else of_scales}"


def _stored_p(spec: KernelSpec, variant: Variant) -> list[str]:
    """Return the lines that find the parameter as a step leaves it, in the arithmetic."""
    number = type_name(spec.arithmetic)
    if "p" not in spec.graph.results:
        return [f"{NEW_P} = p_in"]
    if "p" not in spec.formats:
        return [f"{NEW_P} = {_as_stored(spec, variant, 'p', 'p_out', number)}"]
    lines, inputs = [], {}
    for tensor, part in _parts(spec, "p"):
        inputs[part.name or "stored"] = name = named(tensor, "again")
        new = _as_stored(spec, variant, tensor, named(tensor, "new"), "tl.float32")
        lines.append(f"{name} = {new}")
    return [*lines, f"{NEW_P} = {_decoded(spec, 'p', inputs)}"]


def _as_stored(spec: KernelSpec, variant: Variant, tensor: str, value: str, number: str) -> str:
    """Return what is loaded of a tensor once a number or a uint32 is stored in it."""
    kind = triton_type(spec.dtype_of[tensor], variant.target)
    return kind.read.format(kind.write.format(value, memory=kind.memory), number=number)


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

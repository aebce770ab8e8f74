"""Formats: how tensors are stored in fewer bits than they are computed with.

A format is written once, in the vocabulary of rules and on words of 32 bits: ``decode`` makes a
number of what is stored, ``encode`` the reverse. Both are traced into programs, which the reference
runs on tensors and kernels compute between memory and registers, so that no copy of a state in
float32 ever exists. All arithmetic of formats is in float32.

Three kinds:

* :func:`codes`: one byte an element, a float of 8 bits, and a scale for each block of elements.
* :func:`joined`: a 16-bit weight, with what it lacks of a longer one in a state of its own.
* :func:`rounded`: 16 bits, rounded up or down at random such that the mean is right.

Where rounding is random, its bits come from a counter: they follow from a key, which holds seed,
step and parameter, and from the element's index. So they are the same for every backend, number of
threads and sharding between rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.expr import Program, Trace, evaluate
from stepforge.ops import (
    VOCABULARY,
    Value,
    Word,
    bits,
    from_bits,
    maximum,
    minimum,
    number,
    where,
    word,
)

__all__ = [
    "BLOCK",
    "DRAW",
    "Format",
    "Part",
    "Storage",
    "apart",
    "codes",
    "joined",
    "key_of",
    "mixed",
    "random_words",
    "rounded",
    "stream_of",
    "tensor_name",
    "tensors_of",
]

#: How many elements share a scale. Blocks begin anew in every row of dimension 0, so that a tensor
#: that is sharded along it is cut between blocks, not through one.
BLOCK = 128

_ALL = 0xFFFFFFFF
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_SIGN = 0x80000000


@dataclass(frozen=True)
class Part:
    """One tensor of those that a format stores.

    Attributes:
        name: ``""`` for the one under the state's or parameter's own name; what is appended to it
            for the others.
        dtype: its dtype. Integers are words, negative ones in two's complement.
        of_block: True if it has one element for each block, False if one for each element.
        suffix: ends its key in ``optimizer.state[p]``. A key says how its tensor is to be read: one
            without a suffix is plain numbers, and one with a suffix is always of this dtype.
    """

    name: str
    dtype: torch.dtype
    of_block: bool = False
    suffix: str = ""

    def shape(self, of: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Its shape if the numbers that are stored have that shape.

        Example:
            >>> Part("scale", torch.float32, of_block=True).shape((3, 200))
            (3, 2)
        """
        return (of[0], -(-math.prod(of[1:]) // BLOCK)) if self.of_block else tuple(of)

    def key(self, state: str = "") -> str:
        """Its key in ``optimizer.state[p]``.

        Args:
            state: the key of the state that it is a part of; ``""`` for a part of the parameter.

        Example:
            >>> Part("scale", torch.float32, of_block=True, suffix="scale").key("exp_avg")
            'exp_avg_scale'
        """
        return "_".join(filter(None, (state, self.suffix)))


@dataclass(frozen=True, eq=False)
class Format:
    """How numbers are stored.

    Attributes:
        name: for people.
        parts: the tensors it stores, the one under the own name first.
        decode: from inputs of the parts' names (``stored`` for the first) to the number.
        encode: from ``x``, ``scale`` if there are blocks, and ``random``, a word, if rounding is
            random, to the parts that have an element for each element.
        size: from ``x`` to the word of which the largest of a block makes its scale; None if there
            are no blocks.
        scale: from that largest ``size`` to the scale.
    """

    name: str
    parts: tuple[Part, ...]
    decode: Program
    encode: Program
    size: Program | None = None
    scale: Program | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether elements share scales."""
        return self.size is not None

    @property
    def elements(self) -> tuple[Part, ...]:
        """The parts that have an element for each element: all but scales."""
        return tuple(part for part in self.parts if not part.of_block)

    @property
    def is_random(self) -> bool:
        """Whether rounding takes random bits."""
        return "random" in self.encode.inputs

    def read(
        self, parts: Mapping[str, torch.Tensor], blocks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers that tensors hold.

        Args:
            parts: each part by its name.
            blocks: for each element of a row the number of its block, where a part of each row is
                all there is; None where rows are whole.

        Returns:
            A new float32 tensor of the shape of the first part.
        """
        inputs: dict[str, torch.Tensor] = {}
        for part in self.parts:
            tensor = parts[part.name]
            if part.of_block:
                inputs[part.name] = _spread(tensor, parts[""].shape, blocks)
            else:
                as_word = not part.dtype.is_floating_point
                inputs[part.name or "stored"] = word(tensor) if as_word else tensor.float()
        x: torch.Tensor = evaluate(self.decode, inputs, (), VOCABULARY)[0]
        return x.clone() if self.decode.may_alias(self.decode.outputs[0]) else x

    def write(
        self,
        parts: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        random: torch.Tensor | None = None,
    ) -> None:
        """Stores numbers.

        Args:
            parts: each part by its name; written to.
            x: what to store, float32 or float64.
            random: a word for each element, of :func:`random_words`, if rounding is random; None
                to round to nearest.
        """
        if random is None:
            random = torch.full((), 1 << 31, dtype=torch.int64, device=x.device)
        inputs: dict[str, Any] = {"x": x.float()}
        if self.size is not None and self.scale is not None:
            (sizes,) = evaluate(self.size, inputs, (), VOCABULARY)
            largest = {"largest": _largest(sizes)}
            (scales,) = evaluate(self.scale, largest, (), VOCABULARY)
            parts["scale"].copy_(scales)
            inputs["scale"] = _spread(scales, x.shape)
        encoded = evaluate(self.encode, inputs | {"random": random}, (), VOCABULARY)
        for part, value in zip(self.elements, encoded):
            # Integers of torch wrap around when they are narrowed, as words do.
            parts[part.name].copy_(value.to(part.dtype))


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor as a matrix: a row for each row of dimension 0."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _largest(sizes: torch.Tensor) -> torch.Tensor:
    """The largest word of each block, of shape rows x blocks."""
    rows = _in_rows(sizes)
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing))
    blocks = padded.view(len(rows), padded.shape[1] // BLOCK, BLOCK)
    return blocks.amax(2) if blocks.numel() else blocks.new_zeros(blocks.shape[:2])


def _spread(
    scales: torch.Tensor, shape: torch.Size, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """The scale of each element."""
    if blocks is not None:
        return scales[:, blocks].reshape(shape)
    each = scales.repeat_interleave(BLOCK, dim=1)
    return each[:, : math.prod(shape[1:])].reshape(shape)


def mixed(w: Word) -> Word:
    """A word of which every bit depends on every bit of another, one to one.

    Two rounds of a multiplication between shifts; the constants are those of Chris Wellons's
    search for the smallest bias, "Prospecting for Hash Functions" (2018), ``lowbias32``.

    Args:
        w: a symbol, or int64 numbers from 0 up and below 2**32.

    Example:
        >>> [mixed(1), mixed(2)]
        [1753845952, 3507691905]
    """
    w = (w ^ (w >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    w = (w ^ (w >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return w ^ (w >> 16)


def stream_of(seed: Any, parameter: Any) -> Any:
    """What the keys of a parameter follow from in all steps.

    Args:
        seed: the seed of the run, from 0 up and below 2**32.
        parameter: its number among the optimizer's parameters. Both may be arrays or tensors of
            int64.

    Example:
        >>> stream_of(0, 1) != stream_of(1, 0)
        True
    """
    return mixed(mixed(seed) ^ parameter)


def key_of(stream: Any, step: Any) -> Any:
    """The key from which a parameter's random bits in a step follow.

    Args:
        stream: the parameter's, of :func:`stream_of`.
        step: the number of the step, below 2**31. Both may be arrays or tensors of int64.

    Example:
        >>> key_of(stream_of(0, 0), step=1) != key_of(stream_of(0, 0), step=2)
        True
    """
    return mixed(stream ^ step)


def apart(position: int) -> int:
    """What is added to a key for the random bits of one of several results of a step.

    Example:
        >>> apart(0), apart(1)
        (0, 2246822507)
    """
    return position * 0x85EBCA6B & _ALL


def _draw(index: Word, key: Word) -> Word:
    """A word that is as good as random for each element, and spread evenly over neighbours.

    Multiples of the golden ratio's fraction fill the words as evenly as can be; the key, another
    word at random in every step, turns them all by as much. So what each element is given is
    uniform and new in every step, and the mean of many errs by less than if each had its own.

    As it is a sum, elements may be counted from any other: what is drawn for the index of that is
    their key.
    """
    return (index * 0x9E3779B9 + key) & 0xFFFFFFFF


def _traced(function: Callable[..., Any], *inputs: str) -> Program:
    """The program of a function of symbols, of which those that end in ``_word`` are words."""
    trace = Trace()
    symbols = [
        trace.input(name.removesuffix("_word"), varying=True, word=name.endswith("_word"))
        for name in inputs
    ]
    results = function(*symbols)
    return Program.of(list(results) if isinstance(results, tuple) else [results])


#: From ``index`` and ``key`` to a random word.
DRAW = _traced(_draw, "index_word", "key_word")


def random_words(shape: torch.Size, start: int, key: Any, device: torch.device) -> torch.Tensor:
    """A word for each element of a tensor.

    Args:
        shape: of the tensor.
        start: the index of its first element, which is not 0 in a part of another tensor.
        key: a word of :func:`key_of`: an int, or a tensor of one int64.
        device: where they are wanted.
    """
    index = torch.arange(math.prod(shape), device=device).view(shape)
    words: torch.Tensor = _draw((index + start) & 0xFFFFFFFF, key)
    return words


# Codes: floats of 8 bits, without infinities.
#
# What an update divides by is the root of a second moment, and what it multiplies is a first
# moment; both matter by their relative error, over as many octaves as lie between the gradients of
# one block. Equal relative steps are equal steps of the logarithm, and the nearest thing to a
# logarithm that costs nothing is the pattern of bits of a float: three bits of fraction, and all
# the others of exponent. A first moment spends one bit on its sign.
#
# docs/low-precision.md has the errors of this and of the curves that were not chosen.

# A scale is a power of two, so that dividing by it is a subtraction of exponents, and codes are
# differences of patterns of bits: nothing is multiplied and nothing rounded but once.

#: By how many bits a float32 is shifted to leave three of its fraction.
_SHIFT = 20
#: A scale of 2**-95: below it the smallest codes would be subnormal numbers.
_SMALLEST_SCALE = 0x10000000
#: What is larger than 1.875 * 2**127 counts as infinite.
_LARGEST = 0x7F700000


def _size_unsigned(x: Value) -> Word:
    # As patterns of bits infinity is more than any number, and NaN and what has a sign even more.
    return bits(x)


def _size_signed(x: Value) -> Word:
    return bits(x) & (_SIGN - 1)


def _scale(largest: Word) -> Value:
    """The power of two below the largest, or above it if the largest is more than 1.875 of that.

    NaN if there is an infinity or NaN in the block, or below 0 what must not be.
    """
    power = (largest + ((1 << _SHIFT) - 1)) & _INFINITY
    power = _at_least(power, _SMALLEST_SCALE)
    return from_bits(where(largest > _LARGEST, _NAN, power))


def _origin(scale: Value, one: int) -> Word:
    """The bits of what the code 0 would be, if ``one`` is the code of the scale itself."""
    return bits(scale) - (one << _SHIFT)


def _code(size: Word, scale: Value, one: int, least: int) -> Word:
    """The code of bits, those that are cut off included; ``least`` if they are below it.

    Where the scale is NaN it is ``one``, which reads as the scale: patterns of NaN differ between
    processors, and are not looked at.
    """
    is_number = scale == scale
    end = where(is_number, _origin(scale, one) + (least << _SHIFT), _ALL)
    origin = where(is_number, _origin(scale, one), _ALL - (one << _SHIFT))
    return (_at_least(size, end) >> _SHIFT) - (origin >> _SHIFT)


#: The codes of the scale itself: 1.875 times the scale is the largest code.
_ONE_UNSIGNED, _ONE_SIGNED = 255 - 7, 127 - 7


def _decode_unsigned(stored: Word, scale: Value) -> Value:
    size = stored << _SHIFT
    return from_bits(where(size > 0, size + _origin(scale, _ONE_UNSIGNED), 0))


def _encode_unsigned(x: Value, scale: Value, random: Word) -> Word:
    """Rounded at random, as the averages of squares that it is for move by less than a step.

    A number that is not zero never becomes zero: an update would be divided by it.
    """
    size = bits(x) + (random >> (32 - _SHIFT))
    return where(bits(x) > 0, _code(size, scale, _ONE_UNSIGNED, least=1), 0)


def _decode_signed(stored: Word, scale: Value) -> Value:
    size = (stored << _SHIFT) & (0x7F << _SHIFT)
    size = where(size > 0, size + _origin(scale, _ONE_SIGNED), 0)
    return from_bits(size | ((stored << 24) & _SIGN))


def _encode_signed(x: Value, scale: Value) -> Word:
    """Rounded to nearest, as a first moment moves by more than a step."""
    size = (bits(x) & (_SIGN - 1)) + (1 << _SHIFT - 1)
    sign = where(scale == scale, 0x80, bits(scale) & 0)  # that of NaN differs too
    return _code(size, scale, _ONE_SIGNED, least=0) | ((bits(x) >> 24) & sign)


def _at_least(w: Word, least: Word) -> Word:
    return where(w < least, least, w)


@functools.cache
def codes(unsigned: bool) -> Format:
    """One byte an element and a scale a block: 8.25 bits.

    Args:
        unsigned: True for numbers from 0 up, which are rounded at random: 31 octaves in steps of at
            most an eighth. False for numbers of either sign, which are rounded to nearest: 15 such
            octaves. The root of a second moment and a first moment then reach equally far.
    """
    byte = Part("", torch.uint8, suffix="codes")
    scale = Part("scale", torch.float32, of_block=True, suffix="scale")
    decode = _decode_unsigned if unsigned else _decode_signed
    return Format(
        "int8",
        (byte, scale),
        decode=_traced(decode, "stored_word", "scale"),
        encode=_traced(_encode_unsigned, "x", "scale", "random_word")
        if unsigned
        else _traced(_encode_signed, "x", "scale"),
        size=_traced(_size_unsigned if unsigned else _size_signed, "x"),
        scale=_traced(_scale, "largest_word"),
    )


# Joined weights: what a 16-bit weight lacks of a longer one is kept beside it. The weight itself is
# the nearest to the longer one that 16 bits can be, so what is kept has a sign.


def _join_bfloat16(spare: int) -> Callable[[Value, Word], Value]:
    """A bfloat16 is the upper half of a float32: bits are added to bits."""

    def join(stored: Value, low: Word) -> Value:
        longer = from_bits(bits(stored) + (low << spare))
        # Somebody may have set the weight to zero, below which there are no bits.
        return where(stored == 0, stored, longer)

    return join


def _split_bfloat16(spare: int) -> Callable[[Value], tuple[Value, Word]]:
    def split(x: Value) -> tuple[Value, Word]:
        whole = _nearest(bits(x), spare) << spare if spare else bits(x)
        stored = (whole + 0x8000) & 0xFFFF0000  # a tie is rounded up, as int16 has no 2**15
        is_number = x == x
        return (
            from_bits(where(is_number, stored, _NAN)),
            where(is_number, (whole - stored) >> spare, 0),
        )

    return split


def _join_float16(spare: int) -> Callable[[Value, Word], Value]:
    """A float16 has another exponent: what it lacks is a fraction of its last bit."""

    def join(stored: Value, low: Word) -> Value:
        longer = stored + number(low) * (_last_bit(stored) * 2.0**-spare)
        return where(abs(stored) < math.inf, longer, stored)

    return join


def _split_float16(spare: int) -> Callable[[Value], tuple[Value, Word]]:
    def split(x: Value) -> tuple[Value, Word]:
        fits = abs(x) < 65520.0  # from which on float16 has infinity
        x_fitting = where(fits, x, 0.0)
        stored = _to_whole(x_fitting, _last_bit(x_fitting))
        missing = (x_fitting - stored) * _reciprocal(_last_bit(stored) * 2.0**-spare)
        low = minimum(_to_whole(missing, 1.0), 127.0) if spare == 8 else _to_whole(missing, 1.0)
        return where(fits, stored, x), word(low)

    return split


@functools.cache
def joined(dtype: torch.dtype, width: int) -> Format:
    """A 16-bit weight with the rest of a longer one.

    Args:
        dtype: bfloat16 or float16. With a bfloat16 the longer one is a float32, or its upper 24
            bits. With a float16 it is the float32 too if ``width`` is 32, as long as its size is
            from 2**-17 to 65504; below that it is exact to 2**-39. With 24 it has 8 bits more.
        width: of the longer one; 24 or 32.
    """
    low = (
        Part("low", torch.int8, suffix="low_bits_8")
        if width == 24
        else Part("low", torch.int16, suffix="low_bits_16")
    )
    if dtype == torch.bfloat16:
        spare = 32 - width  # bits of a float32 that are not kept
        join, split = _join_bfloat16(spare), _split_bfloat16(spare)
    else:
        # All of a float32's 13 bits more fit into 15, also where its exponent is one smaller.
        spare = 8 if width == 24 else 15
        join, split = _join_float16(spare), _split_float16(spare)
    return Format(
        f"{width} bits",
        (Part("", dtype), low),
        decode=_traced(join, "stored", "low_word"),
        encode=_traced(split, "x"),
    )


def _round_bfloat16(x: Value, random: Word) -> Value:
    below = random >> 16
    return where(abs(x) < math.inf, from_bits((bits(x) + below) & 0xFFFF0000), x)


def _round_float16(x: Value, random: Word) -> Value:
    fits = abs(x) < 65504.0
    size = where(fits, abs(x), 0.0)
    steps = size * _reciprocal(_last_bit(size))
    whole = number(word(steps))
    at_random = number(random >> 8) * 2.0**-24
    chosen = where(at_random < steps - whole, whole + 1.0, whole) * _last_bit(size)
    return where(fits, _with_sign(chosen, bits(x) & _SIGN), x)


@functools.cache
def rounded(dtype: torch.dtype) -> Format:
    """16 bits, up with a probability that makes the mean right.

    Args:
        dtype: bfloat16 or float16.
    """
    encode = _round_bfloat16 if dtype == torch.bfloat16 else _round_float16
    return Format(
        "rounded at random",
        (Part("", dtype),),
        decode=_traced(lambda stored: stored, "stored"),
        encode=_traced(encode, "x", "random_word"),
    )


def _reciprocal(scale: Value) -> Value:
    """That of a power of two, exactly; of NaN, NaN."""
    return where(scale == scale, from_bits(0x7F000000 - bits(scale)), scale)


def _with_sign(size: Value, sign: Word) -> Value:
    return from_bits(bits(size) | sign)


def _nearest(w: Word, spare: int) -> Word:
    """The bits above the last ``spare``, rounded to nearest, ties to even."""
    return (w + ((1 << spare - 1) - 1) + ((w >> spare) & 1)) >> spare


def _last_bit(x: Value) -> Value:
    """What the last bit of a float16 of that size is worth."""
    return maximum(from_bits(bits(x) & _INFINITY), 2.0**-14) * 2.0**-10


def _to_whole(x: Value, step: Value) -> Value:
    """The nearest multiple of a power of two, ties to even, if it is less than 2**22 steps."""
    aligner = step * (1.5 * 2.0**23)  # whose last bit is the step
    return (x + aligner) - aligner


@dataclass(frozen=True, eq=False)
class Storage:
    """How a parameter and its states are stored.

    Attributes:
        formats: for each of ``p`` and the states' letters that has one, its format.
        dtypes: for each tensor, the gradient left out, its dtype. Parts of a format that have a
            name stand beside it as ``"m.scale"``.
    """

    formats: Mapping[str, Format]
    dtypes: Mapping[str, torch.dtype]

    @functools.cached_property
    def key(self) -> tuple[tuple[str, Format], ...]:
        """Equal where the formats are."""
        return tuple(self.formats.items())

    def real_dtype(self, tensor: str) -> torch.dtype:
        """The dtype of a tensor, or of the parts of its complex numbers."""
        dtype = self.dtypes[tensor]
        return dtype.to_real() if dtype.is_complex else dtype


def tensor_name(column: str, part: Part) -> str:
    """What a part of a column is called where all tensors of a step stand together.

    Example:
        >>> tensor_name("m", Part("scale", torch.float32))
        'm.scale'
    """
    return f"{column}.{part.name}" if part.name else column


def tensors_of(column: str, formats: Mapping[str, Format]) -> list[str]:
    """The names of all tensors that a column is stored in."""
    if column not in formats:
        return [column]
    return [tensor_name(column, part) for part in formats[column].parts]

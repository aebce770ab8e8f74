"""8-bit floats without infinities, in blocks that share a scale.

An update divides by the root of a second moment and multiplies by a first moment. Both matter by
their relative error, over as many octaves as the gradients of a block span. Equal relative steps
are equal steps of the logarithm, and the cheapest logarithm is the bit pattern of a float: three
bits of fraction, all others exponent. A first moment spends one bit on its sign.

A scale is a power of two. So dividing by it subtracts exponents, and a code is a difference of bit
patterns: one rounding, no multiplication.

docs/low-precision.md has the errors of this format and of the curves that were not chosen.
"""

from __future__ import annotations

import functools

import torch

from stepforge.formats.float_bits import (
    INFINITY_BITS,
    NAN_BITS,
    SIGN_BIT,
    UINT32_MAX,
    at_least,
)
from stepforge.formats.format import Format, Part, traced, traced_scale
from stepforge.ops import UInt32, Value, bitcast_f32, bitcast_u32, largest, where

__all__ = ["int8_blocks"]

#: The shift that leaves three bits of a float32's fraction.
_SHIFT = 20
#: The bits of a scale of 2**-95: below it the smallest codes would be subnormal numbers.
_SMALLEST_SCALE = 0x10000000
#: The bits of 1.875 * 2**127: above it numbers count as infinite.
_LARGEST = 0x7F700000
#: The code of the scale itself: the largest code is 1.875 times the scale.
_ONE_UNSIGNED, _ONE_SIGNED = 255 - 7, 127 - 7


def int8_blocks(unsigned: bool) -> Format:
    """Return the format of one byte per element and one scale per block: 8.25 bits.

    Args:
        unsigned: True for numbers from 0 up, rounded at random: 31 octaves in steps of at most an
            eighth. False for numbers of either sign, rounded to nearest: 15 such octaves. The root
            of a second moment and a first moment then reach equally far.
    """
    return _made(unsigned)  # one object, however the argument is passed


@functools.cache
def _made(unsigned: bool) -> Format:
    byte = Part("", torch.uint8, suffix="codes")
    scale = Part("scale", torch.float32, of_block=True, suffix="scale")
    decode = _decode_unsigned if unsigned else _decode_signed
    magnitude, scale_of_largest = traced_scale(_scale_unsigned if unsigned else _scale_signed)
    return Format(
        "int8",
        (byte, scale),
        decode=traced(decode, "stored_u32", "scale"),
        encode=traced(_encode_unsigned, "x", "scale", "random_u32")
        if unsigned
        else traced(_encode_signed, "x", "scale"),
        magnitude=magnitude,
        scale=scale_of_largest,
        has_infinity=False,
    )


def _scale_unsigned(x: Value) -> Value:
    # As bit patterns, infinity exceeds every number; NaN and negative numbers exceed infinity.
    return _scale(largest(bitcast_u32(x), across="block"))


def _scale_signed(x: Value) -> Value:
    return _scale(largest(bitcast_u32(x) & (SIGN_BIT - 1), across="block"))


def _scale(most: UInt32) -> Value:
    """Return the power of two below the largest, or above it if the largest exceeds 1.875 of that.

    NaN if the block has an infinity, a NaN, or a negative number where none may be.
    """
    power = (most + ((1 << _SHIFT) - 1)) & INFINITY_BITS
    power = at_least(power, _SMALLEST_SCALE)
    return bitcast_f32(where(most > _LARGEST, NAN_BITS, power))


def _decode_unsigned(stored: UInt32, scale: Value) -> Value:
    magnitude = stored << _SHIFT
    return bitcast_f32(where(magnitude > 0, magnitude + _origin(scale, _ONE_UNSIGNED), 0))


def _encode_unsigned(x: Value, scale: Value, random: UInt32) -> UInt32:
    """Round at random, since an average of squares moves by less than a step of its code.

    A number that is not zero never becomes zero, since an update would divide by it.
    """
    magnitude = bitcast_u32(x) + (random >> (32 - _SHIFT))
    return where(bitcast_u32(x) > 0, _code(magnitude, scale, _ONE_UNSIGNED, least=1), 0)


def _decode_signed(stored: UInt32, scale: Value) -> Value:
    magnitude = (stored << _SHIFT) & (0x7F << _SHIFT)
    magnitude = where(magnitude > 0, magnitude + _origin(scale, _ONE_SIGNED), 0)
    return bitcast_f32(magnitude | ((stored << 24) & SIGN_BIT))


def _encode_signed(x: Value, scale: Value) -> UInt32:
    """Round to nearest, since a first moment moves by more than a step of its code."""
    magnitude = (bitcast_u32(x) & (SIGN_BIT - 1)) + (1 << _SHIFT - 1)
    # The sign of a NaN differs between processors, so it is not stored.
    sign = where(scale == scale, 0x80, bitcast_u32(scale) & 0)
    return _code(magnitude, scale, _ONE_SIGNED, least=0) | ((bitcast_u32(x) >> 24) & sign)


def _origin(scale: Value, one: int) -> UInt32:
    """Return the bits of a number with the code 0, if the scale has the code ``one``."""
    return bitcast_u32(scale) - (one << _SHIFT)


def _code(magnitude: UInt32, scale: Value, one: int, least: int) -> UInt32:
    """Return the code of a bit pattern, its dropped bits included; at least ``least``.

    With a scale of NaN the code is ``one``, which decodes to the scale. The bits of NaN differ
    between processors, so they are never read.
    """
    is_number = scale == scale
    end = where(is_number, _origin(scale, one) + (least << _SHIFT), UINT32_MAX)
    origin = where(is_number, _origin(scale, one), UINT32_MAX - (one << _SHIFT))
    return (at_least(magnitude, end) >> _SHIFT) - (origin >> _SHIFT)

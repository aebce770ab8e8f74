"""16-bit weights, with the low bits of a longer weight in a state.

The weight itself is the longer one rounded to nearest, so the low bits have a sign.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from stepforge.formats.float_bits import (
    NAN_BITS,
    float16_ulp,
    reciprocal_of_power,
    round_to_multiple,
    shift_right_to_nearest,
)
from stepforge.formats.format import Format, Part, traced
from stepforge.ops import (
    UInt32,
    Value,
    bitcast_f32,
    bitcast_u32,
    f32_to_i32,
    i32_to_f32,
    minimum,
    where,
)

__all__ = ["split_weight"]


@functools.cache
def split_weight(dtype: torch.dtype, width: int, /) -> Format:
    """Return the format of a 16-bit weight and the rest of a longer one.

    Args:
        dtype: bfloat16 or float16. With bfloat16 the longer weight is a float32, or its upper 24
            bits. With float16 and a width of 32 it is the float32 too, for sizes from 2**-17 to
            65504; below that it is exact to 2**-39. With a width of 24 it has 8 bits more.
        width: of the longer weight, in bits; 24 or 32.
    """
    low = (
        Part("low", torch.int8, suffix="low_bits_8")
        if width == 24
        else Part("low", torch.int16, suffix="low_bits_16")
    )
    if dtype == torch.bfloat16:
        dropped = 32 - width  # low bits of a float32 that are not kept
        join, split = _join_bfloat16(dropped), _split_bfloat16(dropped)
    else:
        # All 13 extra bits of a float32 fit into 15, also where its exponent is one smaller.
        extra = 8 if width == 24 else 15
        join, split = _join_float16(extra), _split_float16(extra)
    return Format(
        f"{width} bits",
        (Part("", dtype), low),
        decode=traced(join, "stored", "low_u32"),
        encode=traced(split, "x"),
    )


def _join_bfloat16(dropped: int) -> Callable[[Value, UInt32], Value]:
    """Add bits to bits: a bfloat16 is the upper half of a float32."""

    def join(stored: Value, low: UInt32) -> Value:
        longer = bitcast_f32(bitcast_u32(stored) + (low << dropped))
        # A user may have set the weight to zero; no bits lie below zero.
        return where(stored == 0, stored, longer)

    return join


def _split_bfloat16(dropped: int) -> Callable[[Value], tuple[Value, UInt32]]:
    def split(x: Value) -> tuple[Value, UInt32]:
        whole = bitcast_u32(x)
        if dropped:
            whole = shift_right_to_nearest(whole, dropped) << dropped
        stored = (whole + 0x8000) & 0xFFFF0000  # a tie is rounded up, as int16 has no 2**15
        is_number = x == x
        return (
            bitcast_f32(where(is_number, stored, NAN_BITS)),
            where(is_number, (whole - stored) >> dropped, 0),
        )

    return split


def _join_float16(extra: int) -> Callable[[Value, UInt32], Value]:
    """Add a fraction of the last bit, since a float16 has another exponent than a float32."""

    def join(stored: Value, low: UInt32) -> Value:
        longer = stored + i32_to_f32(low) * (float16_ulp(stored) * 2.0**-extra)
        return where(abs(stored) < math.inf, longer, stored)

    return join


def _split_float16(extra: int) -> Callable[[Value], tuple[Value, UInt32]]:
    def split(x: Value) -> tuple[Value, UInt32]:
        fits = abs(x) < 65520.0  # float16 has infinity from here on
        x_fitting = where(fits, x, 0.0)
        stored = round_to_multiple(x_fitting, float16_ulp(x_fitting))
        missing = (x_fitting - stored) * reciprocal_of_power(float16_ulp(stored) * 2.0**-extra)
        low = round_to_multiple(missing, 1.0)
        low = minimum(low, 127.0) if extra == 8 else low
        return where(fits, stored, x), f32_to_i32(low)

    return split

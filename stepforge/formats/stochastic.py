"""Stochastic rounding to 16 bits."""

from __future__ import annotations

import functools
import math

import torch

from stepforge.formats.float_bits import SIGN_BIT, float16_ulp, reciprocal_of_power, with_sign
from stepforge.formats.format import Format, Part, traced
from stepforge.ops import UInt32, Value, bitcast_f32, bitcast_u32, f32_to_i32, i32_to_f32, where

__all__ = ["stochastic"]


@functools.cache
def stochastic(dtype: torch.dtype, /) -> Format:
    """Return the format of 16 bits, rounded up with the probability that makes the mean right.

    Args:
        dtype: bfloat16 or float16.
    """
    encode = _round_bfloat16 if dtype == torch.bfloat16 else _round_float16
    return Format(
        "rounded at random",
        (Part("", dtype),),
        decode=traced(lambda stored: stored, "stored"),
        encode=traced(encode, "x", "random_u32"),
    )


def _round_bfloat16(x: Value, random: UInt32) -> Value:
    below = random >> 16
    return where(abs(x) < math.inf, bitcast_f32((bitcast_u32(x) + below) & 0xFFFF0000), x)


def _round_float16(x: Value, random: UInt32) -> Value:
    fits = abs(x) < 65504.0
    magnitude = where(fits, abs(x), 0.0)
    steps = magnitude * reciprocal_of_power(float16_ulp(magnitude))
    whole = i32_to_f32(f32_to_i32(steps))
    uniform = i32_to_f32(random >> 8) * 2.0**-24
    chosen = where(uniform < steps - whole, whole + 1.0, whole) * float16_ulp(magnitude)
    return where(fits, with_sign(chosen, bitcast_u32(x) & SIGN_BIT), x)

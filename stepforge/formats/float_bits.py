"""Bit patterns of float32, and the exact operations on them that formats share."""

from __future__ import annotations

from stepforge.ops import UInt32, Value, bitcast_f32, bitcast_u32, maximum, where

__all__ = [
    "INFINITY_BITS",
    "NAN_BITS",
    "SIGN_BIT",
    "UINT32_MAX",
    "at_least",
    "float16_ulp",
    "reciprocal_of_power",
    "round_to_multiple",
    "shift_right_to_nearest",
    "with_sign",
]

UINT32_MAX = 0xFFFFFFFF
INFINITY_BITS = 0x7F800000
NAN_BITS = 0x7FC00000
SIGN_BIT = 0x80000000


def at_least(w: UInt32, least: UInt32) -> UInt32:
    """Return the larger of two uint32."""
    return where(w < least, least, w)


def shift_right_to_nearest(w: UInt32, count: int) -> UInt32:
    """Drop the last ``count`` bits, rounding to nearest, ties to even."""
    return (w + ((1 << count - 1) - 1) + ((w >> count) & 1)) >> count


def with_sign(magnitude: Value, sign: UInt32) -> Value:
    """Set the sign bit of a number that has none."""
    return bitcast_f32(bitcast_u32(magnitude) | sign)


def reciprocal_of_power(scale: Value) -> Value:
    """Return the exact reciprocal of a power of two; NaN of NaN."""
    return where(scale == scale, bitcast_f32(0x7F000000 - bitcast_u32(scale)), scale)


def float16_ulp(x: Value) -> Value:
    """Return the unit in the last place of a float16 of that size."""
    return maximum(bitcast_f32(bitcast_u32(x) & INFINITY_BITS), 2.0**-14) * 2.0**-10


def round_to_multiple(x: Value, step: Value) -> Value:
    """Round to the nearest multiple of a power of two, ties to even, below 2**22 steps."""
    aligner = step * (1.5 * 2.0**23)  # whose last bit is the step
    return (x + aligner) - aligner

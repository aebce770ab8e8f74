"""Numbers as arguments of a launch, in words of 32 bits: Triton would round them to float32."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

__all__ = ["NUMBER_FUNCTIONS", "number_of", "words_of"]

_FLOAT32 = struct.Struct("<f"), struct.Struct("<i")
_FLOAT64 = struct.Struct("<d"), struct.Struct("<ii")


def words_of(value: float, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bits of a number in signed words, the upper half first.

    Args:
        value: the number.
        dtype: float32, to which it is rounded, or float64.

    Example:
        >>> words_of(1.0, torch.float32), words_of(-2.0, torch.float64)
        ((1065353216,), (-1073741824, 0))
    """
    number, words = _FLOAT64 if dtype == torch.float64 else _FLOAT32
    return words.unpack(number.pack(value))[::-1]


def number_of(words: Sequence[str]) -> str:
    """Return the Triton expression of the number whose bits some arguments hold.

    Args:
        words: the names of the arguments, as many as :func:`words_of` returns.

    Example:
        >>> number_of(["c0_bits"])
        'float32_of(c0_bits)'
    """
    return f"float{32 * len(words)}_of({', '.join(words)})"


#: The functions of such expressions, by the number of words.
NUMBER_FUNCTIONS = {
    1: '''\
@triton.jit
def float32_of(bits):
    """The number whose bits a word holds."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


''',
    2: '''\
@triton.jit
def float64_of(high, low):
    """The number whose bits two words hold."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


''',
}

"""The C types of each dtype, and the conversions between memory and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = ["C_TYPES", "STORABLE", "CType", "conversions"]


@dataclass(frozen=True)
class CType:
    """The C types of a dtype.

    Attributes:
        memory: the type of an element in memory.
        element: the type of an element that a loop reads and writes.
        read: the expression that reads a number.
        write: the expression that writes a number.
        widen: the function that converts a block from memory to elements; ``""`` if a loop works on
            memory itself.
        narrow: the function that converts a block back.
        rounded: the expression of a number as a loop on elements of a longer type will store it;
            ``""`` if the elements are what is stored.
    """

    memory: str
    element: str
    read: str
    write: str
    widen: str = ""
    narrow: str = ""
    rounded: str = ""

    @property
    def stored(self) -> str:
        """The expression of a number as it is read once it was written."""
        return self.rounded or self.read.format(self.write)


#: The dtypes of parameters, gradients and states without a format.
STORABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: The C types of every dtype. Integers are read as uint32.
C_TYPES: dict[torch.dtype, CType] = {
    torch.float32: CType("float", "float", "(number){0}", "(float){0}"),
    torch.float64: CType("double", "double", "(number){0}", "(double){0}"),
    torch.bfloat16: CType(
        "uint16_t", "uint16_t", "(number)from_bfloat16({0})", "to_bfloat16((float){0})"
    ),
    torch.float16: CType(
        "uint16_t",
        "float",
        "(number){0}",
        "(float){0}",
        "widen_float16",
        "narrow_float16",
        "(number)as_float16((float){0})",
    ),
    torch.uint8: CType("uint8_t", "uint8_t", "(uint32_t){0}", "(uint8_t){0}"),
    torch.int8: CType("int8_t", "int8_t", "(uint32_t){0}", "(int8_t){0}"),
    torch.int16: CType("int16_t", "int16_t", "(uint32_t){0}", "(int16_t){0}"),
}

_BITS = """\
static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
"""

_BFLOAT16 = """\
static inline float from_bfloat16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }

/* To nearest, ties to even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}
"""

# GCC vectorizes no loop that converts _Float16, and loops cannot wait for it to learn: float16 is
# converted in blocks of its own, by the processor if it can, else in arithmetic without a branch,
# which any compiler vectorizes. Both have the same bits, NaN included.
_FLOAT16 = """\
#ifdef __F16C__
#include <immintrin.h>

static inline float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }

static inline uint16_t to_float16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
/* Exponent and mantissa go to their places in a float; then the exponent's bias is corrected. */
static inline float from_float16(uint16_t bits) {
    uint32_t wide = (uint32_t)(int16_t)bits;    /* its sign is where that of a float is */
    /* Raised such that the exponent 31 of infinity and NaN becomes 255, and stays it. */
    float size = from_bits((wide << 13 & 0x0fffe000) + (224u << 23)) * 0x1p-112f;
    /* A subnormal x is now (x + 2**-14) / 2, smaller than the smallest of the others. */
    float subnormal = size + size - 0x1p-14f;
    return from_bits(to_bits(size < subnormal ? size : subnormal) | (wide & 0x80000000));
}

/* To nearest, ties to even, from 65520 on to infinity; NaN stays NaN. */
static inline uint16_t to_float16(float x) {
    int32_t size = (int32_t)(to_bits(x) & 0x7fffffff);
    int32_t limited = size < 143 << 23 ? size : 143 << 23;    /* 2**16 is infinity already */
    int32_t exponent = limited & 255 << 23;
    /* Subnormals have the last bit of the least normal number, 2**-14. */
    int32_t power = exponent > 113 << 23 ? exponent : 113 << 23;
    /* 2**13 times the power ends with the bit that float16 ends with: adding it rounds to that. */
    int32_t aligner = power + (13 << 23) + 0x3c00;    /* and what turns 113 into exponent 1 */
    uint32_t sum = to_bits(from_bits((uint32_t)limited) + from_bits((uint32_t)aligner));
    uint32_t rounded = sum + (uint32_t)(power >> 13);    /* only its last 15 bits count */
    uint32_t quiet = (uint32_t)size >> 13 | 0x7e00;    /* what x becomes if it is NaN */
    uint32_t result = size > 255 << 23 ? quiet : rounded;
    return (uint16_t)((result & 0x7fff) | (to_bits(x) >> 16 & 0x8000));
}
#endif

static APART void widen_float16(int64_t count, const uint16_t *restrict from, float *restrict to) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + i))));
#endif
    for (; i < count; i++) to[i] = from_float16(from[i]);
}

static APART void narrow_float16(int64_t count, const float *restrict from, uint16_t *restrict to) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((void *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i),
                                                           _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) to[i] = to_float16(from[i]);
}
"""


_AS_FLOAT16 = """\
/* What to_float16 and back makes of a number, in arithmetic that every compiler vectorizes. */
static inline float as_float16(float x) {
    float size = from_bits(to_bits(x) & 0x7fffffff);
    float limited = size < 0x1p16f ? size : 0x1p16f;
    uint32_t exponent = to_bits(limited) & 255u << 23;
    /* Adding 2**13 times the power of two rounds to the last bit of a float16, or of subnormals. */
    float aligner = from_bits((exponent > 113u << 23 ? exponent : 113u << 23) + (13u << 23));
    float rounded = (limited + aligner) - aligner;
    float result = rounded < 0x1p16f ? rounded : INFINITY;
    return x != x ? x : from_bits(to_bits(result) | (to_bits(x) & 0x80000000));
}
"""


def conversions(
    dtypes: Iterable[torch.dtype], *, bitcasts: bool = False, stores: bool = False
) -> str:
    """Return the C functions that read and write these dtypes.

    Args:
        dtypes: the dtypes of a kernel's tensors.
        bitcasts: True if the kernel itself reads floats as bits.
        stores: True if it needs numbers as they are read once they were written.
    """
    wanted = set(dtypes)
    of_float16 = _FLOAT16 + (f"\n{_AS_FLOAT16}" if stores else "")
    written_here = {torch.bfloat16: _BFLOAT16, torch.float16: of_float16}
    needed = [text for dtype, text in written_here.items() if dtype in wanted]
    return "\n".join([_BITS, *needed] if needed or bitcasts else [])

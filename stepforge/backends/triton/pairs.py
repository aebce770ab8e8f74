"""The Triton functions that add up a block in pairs of float32, where float64 is slow.

A pair is a number and what rounding has lost of it: 48 bits. So a sum errs by 2**-44 of the sum of
the magnitudes at most, where one in float64 errs by 2**-49, and rounded to float32 both are the
same but for a few cases in a million. The numbers of a block are divided by a power of two near the
largest first: no square overflows, and none that matters vanishes.

Dekker, A floating-point technique for extending the available precision (1971): the error of a
product. Knuth, The Art of Computer Programming 2, 4.2.2: the error of a sum.
"""

from __future__ import annotations

from stepforge.backends.reduction import BLOCK, LANES, ROWS

__all__ = ["PAIR_FUNCTIONS", "folds"]


def folds() -> list[str]:
    """Return the shapes whose axis 1, of two slices, is added up in turn: rows, parts, lanes."""
    parts = BLOCK // ROWS // LANES
    shapes = []
    # Of each axis: the numbers before it, in it and after it.
    for before, slices, after in ((parts, ROWS, LANES), (1, parts, LANES), (1, LANES, 1)):
        while slices > 1:
            slices //= 2
            shapes.append(f"({before}, 2, {slices * after})")
    return shapes


def _sum_of_pairs() -> str:
    lines = [
        "@triton.jit",
        "def sum_of_pairs(x, rest, scale):",
        '    """The sum of a block, in float64."""',
    ]
    for shape in folds():
        both = f"(tl.reshape(x, {shape}), tl.reshape(rest, {shape}))"
        lines.append(f"    x, rest = tl.reduce({both}, 1, add_pairs)")
    return "\n".join(
        [
            *lines,
            "    wide = tl.reshape(x, (1,)).to(tl.float64)",
            "    lost = tl.reshape(rest, (1,)).to(tl.float64)",
            "    # An infinity has lost NaN.",
            "    return tl.where(wide - wide == 0, wide + lost, wide) * scale",
            "",
            "",
            "",
        ]
    )


#: The functions ``total_in_pairs`` and ``squares_in_pairs`` of a block of float32.
PAIR_FUNCTIONS = (
    '''\
@triton.jit
def add_pairs(x, x_rest, y, y_rest):
    """The sum of two numbers and its error, with what they had lost before."""
    sum = x + y
    other = sum - x
    lost = (x - (sum - other)) + (y - other)
    return sum, x_rest + y_rest + lost


@triton.jit
def scale_of(x):
    """The power of two of the largest number of a block, and its inverse."""
    largest = tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # such that the inverse is no denormal
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale.to(tl.float64), inverse


'''
    + _sum_of_pairs()
    + '''\
@triton.jit
def total_in_pairs(x):
    """The sum of a block."""
    scale, inverse = scale_of(x)
    x = x * inverse
    return sum_of_pairs(x, tl.zeros_like(x), scale)


@triton.jit
def squares_in_pairs(x):
    """The sum of the squares of a block."""
    scale, inverse = scale_of(x)
    x = x * inverse
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # 12 bits
    low = x - high
    square = x * x
    rest = ((high * high - square) + 2.0 * (high * low)) + low * low
    return sum_of_pairs(square, rest, scale * scale)


'''
)

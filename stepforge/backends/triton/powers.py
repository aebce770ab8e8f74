"""Powers, exponentials and logarithms in float64, as functions in Triton.

The libraries of devices round them each in its own way, and the interpreter has no library. These
functions add, multiply and divide only, which every device rounds alike, so all give the same bits.
They compute with pairs of numbers, whose sums have 70 bits and more. So their results are correctly
rounded, but for one in ten thousands and for denormal ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

__all__ = ["FLOAT64_FUNCTIONS", "float64_functions"]

_PAIRS = '''\
@triton.jit
def larger_sum(a, b):
    """The sum of two numbers and its error, where the first is the larger or both are zero."""
    total = a + b
    return total, b - (total - a)


@triton.jit
def exact_sum(a, b):
    """The sum of two numbers and its error."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def exact_product(a, b):
    """The product of two numbers and its error, from the halves of their digits."""
    product = a * b
    scaled = a * 134217728.0 + a
    a_upper = scaled - (scaled - a)
    a_lower = a - a_upper
    scaled = b * 134217728.0 + b
    b_upper = scaled - (scaled - b)
    b_lower = b - b_upper
    error = (a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper
    return product, error + a_lower * b_lower


@triton.jit
def pair_product(a, a_rest, b, b_rest):
    """The product of two pairs."""
    product, error = exact_product(a, b)
    error = error + (a * b_rest + a_rest * b)
    total = product + error
    return total, error - (total - product)


@triton.jit
def pair_double_and_square(a, a_rest):
    """The double of a pair and its square, added: the larger of the two is the double."""
    scaled = a * 134217728.0 + a
    upper = scaled - (scaled - a)
    lower = a - upper
    square = a * a
    cross = upper * lower
    error = ((upper * upper - square) + cross + cross + lower * lower) + 2.0 * a * a_rest
    total = 2.0 * a + square
    error = (square - (total - 2.0 * a)) + (error + 2.0 * a_rest)
    result = total + error
    return result, error - (result - total)


@triton.jit
def pair_times_plus(x, x_upper, x_rest, a, a_rest, b, b_rest):
    """The product of two pairs, and a larger pair added; one comes with its upper half."""
    product = x * a
    x_lower = x - x_upper
    scaled = a * 134217728.0 + a
    upper = scaled - (scaled - a)
    lower = a - upper
    error = (x_upper * upper - product) + x_upper * lower + x_lower * upper + x_lower * lower
    total = b + product
    error = (product - (total - b)) + (error + (x * a_rest + x_rest * a) + b_rest)
    result = total + error
    return result, error - (result - total)


'''

#: Terms of the two series, and how many of them need pairs: the last one is below 2**-80 of a
#: logarithm, or 2**-72 of an exponential, and so are the errors of those that are one number.
_LOG_TERMS, _LOG_PAIRS = 15, 5
_EXP_TERMS, _EXP_PAIRS = 11, 3
#: The argument of the exponential is divided by 2**_SQUARINGS, and the result squared as often.
_SQUARINGS = 4


def _pair(value: Fraction) -> tuple[float, float]:
    """Return the two numbers whose sum is next to a value."""
    upper = float(value)
    return upper, float(value - Fraction(upper))


def _full(value: float) -> str:
    return f"tl.full((), {value!r}, tl.float64)"


def _ln2() -> list[str]:
    """Return the lines that name three parts of the logarithm of 2; two have 32 bits each."""
    with localcontext() as context:
        context.prec = 60
        rest = Fraction(Decimal(2).ln())
    lines = []
    for name, bits in (("ln2_upper", 32), ("ln2_middle", 64)):
        part = Fraction(math.floor(rest * 2**bits), 2**bits)
        lines.append(f"{name} = {_full(float(part))}")
        rest -= part
    return [*lines, f"ln2_lower = {_full(float(rest))}"]


def _series(coefficients: Sequence[Fraction], pairs: int, x: str) -> list[str]:
    """Return the lines that sum a power series into ``total`` and ``rest``.

    Args:
        coefficients: those of the powers from 0 up.
        pairs: the number of them that are pairs.
        x: the name of the argument; ``{x}_rest`` is the rest of it.
    """
    lines = [f"total = {_full(float(coefficients[-1]))}"]
    lines += [
        f"total = {_full(float(coefficient))} + {x} * total"
        for coefficient in reversed(coefficients[pairs:-1])
    ]
    lines += [
        "rest = total * 0.0",
        f"scaled = {x} * 134217728.0 + {x}",
        f"{x}_upper = scaled - (scaled - {x})",
    ]
    for coefficient in reversed(coefficients[:pairs]):
        lines += [
            f"{name} = {_full(value)}"
            for name, value in zip(("next", "next_rest"), _pair(coefficient))
        ]
        given = f"{x}, {x}_upper, {x}_rest, total, rest, next, next_rest"
        lines.append(f"total, rest = pair_times_plus({given})")
    return lines


def _log_pair() -> list[str]:
    odd = [Fraction(1, 2 * n + 1) for n in range(_LOG_TERMS)]
    return [
        "@triton.jit",
        "def log_pair(x):",
        '"""The logarithm of a positive number, as a pair."""',
        f"small = x < {_full(2.0**-1022)}",
        f"normal = tl.where(small, x * {_full(2.0**54)}, x)",
        "bits = normal.to(tl.int64, bitcast=True)",
        "fraction = (bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000",
        "fraction = fraction.to(tl.float64, bitcast=True)",
        f"above = fraction > {_full(math.sqrt(2))}",
        "fraction = tl.where(above, fraction * 0.5, fraction)",
        "exponent = (bits >> 52) - 1023 + above.to(tl.int64) - tl.where(small, 54, 0)",
        "power = exponent.to(tl.float64)",
        "# With s = (x - 1) / (x + 1), the logarithm is 2 * (s + s**3 / 3 + s**5 / 5 ...).",
        "numerator = fraction - 1.0",
        "denominator, error = exact_sum(fraction, 1.0)",
        "s = numerator / denominator",
        "product, product_error = exact_product(s, denominator)",
        "left = (numerator - product) - product_error - s * error",
        "s, s_rest = larger_sum(s, left / denominator)",
        "square, square_rest = pair_product(s, s_rest, s, s_rest)",
        *_series(odd, _LOG_PAIRS, "square"),
        "total, rest = pair_product(s, s_rest, total, rest)",
        "total, rest = total * 2.0, rest * 2.0",
        "# The power of 2 times the logarithm of 2, in exact products but for the last.",
        *_ln2(),
        "whole, whole_rest = larger_sum(power * ln2_upper, power * ln2_middle)",
        "total, error = exact_sum(whole, total)",
        "return larger_sum(total, error + (rest + (whole_rest + power * ln2_lower)))",
    ]


def _exp_pair() -> list[str]:
    inverse = [Fraction(1, math.factorial(n + 1)) for n in range(_EXP_TERMS)]
    lines = [
        "@triton.jit",
        "def exp_pair(x, x_rest):",
        '"""The exponential of a pair, as one number."""',
        "inside = tl.abs(x) < 800.0",
        "x = tl.where(inside, x, tl.where(x > 0.0, 800.0, -800.0).to(tl.float64))",
        "x_rest = tl.where(inside, x_rest, 0.0)",
        f"power = tl.floor(x * {_full(1 / math.log(2))} + 0.5)",
        *_ln2(),
        "x, error = exact_sum(x, power * -1.0 * ln2_upper)",
        "x_rest = x_rest + error",
        "x, error = exact_sum(x, power * -1.0 * ln2_middle)",
        "x, x_rest = larger_sum(x, (x_rest + error) - power * ln2_lower)",
        f"x, x_rest = x * {2.0**-_SQUARINGS!r}, x_rest * {2.0**-_SQUARINGS!r}",
        "# The exponential less 1, whose small numbers lose nothing.",
        *_series(inverse, _EXP_PAIRS, "x"),
        "total, rest = pair_product(x, x_rest, total, rest)",
    ]
    lines += ["total, rest = pair_double_and_square(total, rest)"] * _SQUARINGS
    return [
        *lines,
        f"whole, error = larger_sum({_full(1.0)}, total)",
        "result = whole + (error + rest)",
        "half = power.to(tl.int64) >> 1",
        "other = power.to(tl.int64) - half",
        "# In two steps, since a power of 2 may be outside of the range when the result is inside.",
        "result = result * ((half + 1023) << 52).to(tl.float64, bitcast=True)",
        "return result * ((other + 1023) << 52).to(tl.float64, bitcast=True)",
    ]


_SPECIAL = '''\
@triton.jit
def float64_exp(x):
    """The exponential."""
    return tl.where(x != x, x, exp_pair(x, x * 0.0))


@triton.jit
def float64_log(x):
    """The natural logarithm; minus infinity of zero, NaN of a negative number."""
    infinity = tl.full((), 0x7FF0000000000000, tl.int64).to(tl.float64, bitcast=True)
    result, _ = log_pair(x)
    result = tl.where(x == 0.0, infinity * -1.0, tl.where(x == infinity, infinity, result))
    return tl.where(x >= 0.0, result, infinity - infinity)


@triton.jit
def float64_pow(x, y):
    """The power, as C defines it; of zero to a negative power, infinity."""
    infinity = tl.full((), 0x7FF0000000000000, tl.int64).to(tl.float64, bitcast=True)
    x, y = tl.broadcast(x, y)
    size = tl.abs(x)
    log, log_rest = log_pair(size)
    # The powers of all numbers but 1 are 0 or infinite long before.
    bound = tl.full((), 18446744073709551616.0, tl.float64)
    bounded = tl.where(y > bound, bound, tl.where(y < bound * -1.0, bound * -1.0, y))
    product, error = exact_product(log, bounded)
    result = exp_pair(product, error + log_rest * bounded)
    result = tl.where(size == 0.0, tl.where(y < 0.0, infinity, 0.0), result)
    result = tl.where(size == infinity, tl.where(y < 0.0, 0.0, infinity), result)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = x.to(tl.int64, bitcast=True) < 0
    signed = tl.where(odd, result * -1.0, result)
    signed = tl.where(whole | (size == 0.0) | (size == infinity), signed, infinity - infinity)
    result = tl.where(negative, signed, result)
    result = tl.where((x == 0.0) & (y < 0.0), infinity, result)
    result = tl.where((x != x) | (y != y), x + y, result)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, result)


'''

#: The Triton expression of each operation that the functions serve.
FLOAT64_FUNCTIONS = {
    "pow": "float64_pow({0}, {1})",
    "exp": "float64_exp({0})",
    "log": "float64_log({0})",
}


def float64_functions(operations: Iterable[str]) -> str:
    """Return the functions that some operations need; nothing if they need none."""
    if FLOAT64_FUNCTIONS.keys().isdisjoint(operations):
        return ""
    texts = (_PAIRS, _text(_log_pair()), _text(_exp_pair()), _SPECIAL)
    return "".join(texts)


def _text(lines: Sequence[str]) -> str:
    """Return a function whose decorator and head are the first two lines."""
    return "\n".join([*lines[:2], *(f"    {line}" for line in lines[2:]), "", "", ""])

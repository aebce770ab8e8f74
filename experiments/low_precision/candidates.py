"""Ways to store a moment in few bits: those that were not chosen, and the library's own.

A curve that was not chosen is given by what its codes stand for: numbers from 0 to 1, which are
multiplied by the largest of the block. Everything else about it is the best that it can be: a
number becomes the nearest that a code stands for, or one of its two neighbours at random, such that
the mean is right; and a second moment that is not zero never becomes zero.

The library's formats are measured through the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepforge.formats import Format, int8_blocks, stochastic

NEAREST, RANDOM = "nearest", "random"
ROUNDINGS = (NEAREST, RANDOM)


@dataclass(frozen=True)
class Candidate:
    """A way to store numbers.

    Attributes:
        curve: the name of what codes stand for.
        rounding: "nearest" or "random".
        chosen: whether it is the library's.
        store: from numbers, float64 of shape (blocks, 128), and a random word for each, to the
            numbers that are read back.
    """

    curve: str
    rounding: str
    chosen: bool
    store: Callable[[Tensor, Tensor], Tensor]

    @property
    def name(self) -> str:
        """What tells it from others."""
        return f"{self.curve}, {self.rounding}"


# What the codes stand for. ------------------------------------------------------------------------


def _evenly(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64) / (count - 1)


def power(exponent: int, count: int) -> Tensor:
    """Even steps of a root: 1 linear, 2 the square root, and so on."""
    return _evenly(count).pow(exponent)


def softsign(count: int) -> Tensor:
    """Even steps of 2x / (1 + x)."""
    y = _evenly(count)
    return y / (2 - y)


def dynamic(first: int) -> Tensor:
    """Seven powers of ten, each with twice as many even intervals as the one below it.

    The dynamic map of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": codes
    stand for the middles of the intervals. The original's 1 has no negative; here it has.

    Args:
        first: the number of intervals of the lowest power: 1 beside a sign, 2 without.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        count = first * 2**decade
        for i in range(count):
            numbers.append((0.1 + 0.9 * (i + 0.5) / count) * 10.0 ** (decade - 6))
    return torch.tensor(sorted(numbers), dtype=torch.float64)


def floating(fraction: int, count: int) -> Tensor:
    """Floats with so many bits of fraction; even steps from 0 to the lowest power of two."""
    code = torch.arange(count, dtype=torch.float64)
    octave = torch.div(code, 2**fraction, rounding_mode="floor").clamp(min=1)
    numbers = (code - (octave - 1) * 2**fraction) * 2.0 ** (octave - 1)
    return numbers / numbers[-1]


#: The tables of curves, for signed and for unsigned numbers.
SIGNED: Mapping[str, Tensor] = {
    "linear": power(1, 128),
    "square root": power(2, 128),
    "cube root": power(3, 128),
    "fourth root": power(4, 128),
    "softsign": softsign(128),
    "dynamic map": dynamic(1),
    "float, 2 bits of fraction": floating(2, 128),
    "float, 4 bits of fraction": floating(4, 128),
}
UNSIGNED: Mapping[str, Tensor] = {
    "linear": power(1, 256),
    "square root": power(2, 256),
    "fourth root": power(4, 256),
    "sixth root": power(6, 256),
    "eighth root": power(8, 256),
    "dynamic map": dynamic(2),
    "float, 2 bits of fraction": floating(2, 256),
    "float, 4 bits of fraction": floating(4, 256),
}
CHOSEN = "float, 3 bits of fraction"
BFLOAT16 = "bfloat16"

# How numbers are stored by them. ------------------------------------------------------------------


def _by_table(table: Tensor, at_random: bool, keeps: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def store(x: Tensor, words: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-300)
        size = x.abs() / scale
        above = torch.searchsorted(table, size).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        part = (size - low) / (high - low)
        stored = torch.where(part > (words / 2.0**32 if at_random else 0.5), high, low)
        if keeps:
            stored = torch.where((size > 0) & (stored == 0), table[1], stored)
        return stored * scale * x.sign()

    return store


def _by_codes(unsigned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    format_ = int8_blocks(unsigned)

    def store(x: Tensor, words: Tensor) -> Tensor:
        return _written_and_read(format_, x, words)

    return store


def _written_and_read(format_: Format, x: Tensor, words: Tensor) -> Tensor:
    parts = {
        part.name: torch.zeros(part.shape(x.shape), dtype=part.dtype) for part in format_.parts
    }
    format_.write(parts, x, words)
    return format_.read(parts).double()


def _as_bfloat16(x: Tensor, _: Tensor) -> Tensor:
    return x.bfloat16().double()


def _as_bfloat16_at_random(x: Tensor, words: Tensor) -> Tensor:
    return _written_and_read(stochastic(torch.bfloat16), x, words)


def candidates(unsigned: bool, *, keeps: bool = True) -> list[Candidate]:
    """All ways to store a moment; those of the library are marked as chosen.

    Args:
        unsigned: True for second moments.
        keeps: whether a second moment that is not zero never becomes zero, as in the library; False
            to see what rounding alone makes of it.
    """
    return list(_candidates(unsigned, keeps and unsigned))


def _candidates(unsigned: bool, keeps: bool) -> Iterator[Candidate]:
    for curve, table in (UNSIGNED if unsigned else SIGNED).items():
        for rounding in ROUNDINGS:
            yield Candidate(curve, rounding, False, _by_table(table, rounding == RANDOM, keeps))
    # The other rounding of the curve that was chosen, beside its own, which is the library's.
    other, own = (NEAREST, RANDOM) if unsigned else (RANDOM, NEAREST)
    table = floating(3, 256 if unsigned else 128)
    yield Candidate(CHOSEN, other, False, _by_table(table, other == RANDOM, keeps))
    yield Candidate(CHOSEN, own, True, _by_codes(unsigned))
    yield Candidate(BFLOAT16, NEAREST, not unsigned, _as_bfloat16)
    if unsigned:
        yield Candidate(BFLOAT16, RANDOM, True, _as_bfloat16_at_random)

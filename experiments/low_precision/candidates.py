"""Ways to store a moment in few bits: the library's formats, and the alternatives.

An alternative is a curve: the values that its codes decode to, from 0 to 1, which the largest
magnitude of the block multiplies. All else is as good as it can be. A value is rounded to the
nearest code, or to one of its two neighbors at random with the right mean. A second moment that is
not zero never becomes zero.

The library's own formats run through the library.
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
    """A way to store moments.

    Attributes:
        curve: the name of the values that codes decode to.
        rounding: "nearest" or "random".
        chosen: True for the library's own.
        store: maps values, float64 of shape (blocks, 128), and a random uint32 for each, to the
            values that are read back.
    """

    curve: str
    rounding: str
    chosen: bool
    store: Callable[[Tensor, Tensor], Tensor]

    @property
    def name(self) -> str:
        """Its unique name."""
        return f"{self.curve}, {self.rounding}"


# The values of codes. -----------------------------------------------------------------------------


def _evenly(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64) / (count - 1)


def power(exponent: int, count: int) -> Tensor:
    """Return even steps of a root: 1 is linear, 2 the square root, and so on."""
    return _evenly(count).pow(exponent)


def softsign(count: int) -> Tensor:
    """Return even steps of 2x / (1 + x)."""
    y = _evenly(count)
    return y / (2 - y)


def dynamic(first: int) -> Tensor:
    """Return seven powers of ten, each with twice as many even intervals as the one below it.

    The dynamic map of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": codes
    decode to the middles of the intervals. The original has no -1; this one does.

    Args:
        first: the intervals of the lowest power: 1 if the code has a sign bit, 2 if not.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        count = first * 2**decade
        for i in range(count):
            values.append((0.1 + 0.9 * (i + 0.5) / count) * 10.0 ** (decade - 6))
    return torch.tensor(sorted(values), dtype=torch.float64)


def floating(fraction: int, count: int) -> Tensor:
    """Return floats with ``fraction`` bits of fraction; even steps up to the lowest octave."""
    code = torch.arange(count, dtype=torch.float64)
    octave = torch.div(code, 2**fraction, rounding_mode="floor").clamp(min=1)
    values = (code - (octave - 1) * 2**fraction) * 2.0 ** (octave - 1)
    return values / values[-1]


#: The magnitudes of each curve's codes, in order: for first moments (codes with a sign bit) ...
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
#: ... and for second moments.
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

# Storing. -----------------------------------------------------------------------------------------


def _by_curve(
    curve: Tensor, at_random: bool, never_zero: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the ``store`` of a curve.

    Args:
        curve: the values of its codes.
        at_random: True to round at random, False to nearest.
        never_zero: True to round no value to zero but zero itself.
    """

    def store(x: Tensor, random_bits: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-300)
        size = x.abs() / scale
        above = torch.searchsorted(curve, size).clamp(1, len(curve) - 1)
        low, high = curve[above - 1], curve[above]
        part = (size - low) / (high - low)
        rounded = torch.where(part > (random_bits / 2.0**32 if at_random else 0.5), high, low)
        if never_zero:
            rounded = torch.where((size > 0) & (rounded == 0), curve[1], rounded)
        return rounded * scale * x.sign()

    return store


def _by_int8(unsigned: bool) -> Callable[[Tensor, Tensor], Tensor]:
    format_ = int8_blocks(unsigned)

    def store(x: Tensor, random_bits: Tensor) -> Tensor:
        return _written_and_read(format_, x, random_bits)

    return store


def _written_and_read(format_: Format, x: Tensor, random_bits: Tensor) -> Tensor:
    parts = {
        part.name: torch.zeros(part.shape(x.shape), dtype=part.dtype) for part in format_.parts
    }
    format_.write(parts, x, random_bits)
    return format_.read(parts).double()


def _as_bfloat16(x: Tensor, _: Tensor) -> Tensor:
    return x.bfloat16().double()


def _as_bfloat16_at_random(x: Tensor, random_bits: Tensor) -> Tensor:
    return _written_and_read(stochastic(torch.bfloat16), x, random_bits)


def candidates(unsigned: bool, *, never_zero: bool = True) -> list[Candidate]:
    """Return all ways to store a moment; those of the library are marked as chosen.

    Args:
        unsigned: True for second moments.
        never_zero: True, as in the library, to never make a second moment zero that is not zero;
            False to see what rounding alone makes of it.
    """
    return list(_candidates(unsigned, never_zero and unsigned))


def _candidates(unsigned: bool, never_zero: bool) -> Iterator[Candidate]:
    for name, curve in (UNSIGNED if unsigned else SIGNED).items():
        for rounding in ROUNDINGS:
            yield Candidate(name, rounding, False, _by_curve(curve, rounding == RANDOM, never_zero))
    # The chosen curve with the other rounding, next to its own rounding, which is the library's.
    other, own = (NEAREST, RANDOM) if unsigned else (RANDOM, NEAREST)
    curve = floating(3, 256 if unsigned else 128)
    yield Candidate(CHOSEN, other, False, _by_curve(curve, other == RANDOM, never_zero))
    yield Candidate(CHOSEN, own, True, _by_int8(unsigned))
    yield Candidate(BFLOAT16, NEAREST, not unsigned, _as_bfloat16)
    if unsigned:
        yield Candidate(BFLOAT16, RANDOM, True, _as_bfloat16_at_random)

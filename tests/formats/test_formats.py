"""Formats: bits that are written and values that are read.

Oracles: error bounds derived from the formats' definitions, in float64; torch's own rounding to 16
bits.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepforge.formats import (
    BLOCK,
    Format,
    hash32,
    int8_blocks,
    param_seed,
    random_uint32,
    split_weight,
    step_seed,
    stochastic,
    tensor_names,
)

INF, NAN = float("inf"), float("nan")
half_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
#: The bits of the fraction of each dtype, and its smallest exponent.
FRACTION = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def empty(format_: Format, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors of a format for a shape, full of a wrong value."""
    return {x.name: torch.full(x.shape(shape), 77, dtype=x.dtype) for x in format_.parts}


def round_trip(
    format_: Format, x: torch.Tensor, random: torch.Tensor | None = None
) -> torch.Tensor:
    """Write values, and return them as they are read back."""
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x, random)
    return format_.read(parts)


def random_bits(x: torch.Tensor, step: int) -> torch.Tensor:
    return random_uint32(x.shape, 0, step_seed(param_seed(3, 5), step), x.device)


def spread(octaves: float, seed: int, rows: int = 40, length: int = 300) -> torch.Tensor:
    """Return values of either sign, log-uniform over this many octaves."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** (-octaves * torch.rand(rows, length, generator=generator))
    return size * (torch.randint(0, 2, (rows, length), generator=generator) * 2 - 1)


def block_maxima(x: torch.Tensor) -> torch.Tensor:
    """Return, for each element, the largest magnitude in its block."""
    largest = torch.empty_like(x)
    for begin in range(0, x.shape[1], BLOCK):
        block = x[:, begin : begin + BLOCK].abs()
        largest[:, begin : begin + BLOCK] = block.amax(1, keepdim=True)
    return largest


# 8-bit blocks.


@pytest.mark.parametrize("octaves", [1, 14, 60])
def test_signed_codes_err_by_a_sixteenth_down_to_15_octaves(octaves: int) -> None:
    """Half a step of 1/8. Code 1 is 1.125 / 2**15 of the scale, at most 16/15 of the largest."""
    x = spread(octaves, 1)
    y = round_trip(int8_blocks(unsigned=False), x)
    smallest = 1.125 * 2.0**-15 * block_maxima(x) * 16 / 15
    allowed = torch.maximum(x.abs() / 16, smallest)
    assert ((y - x).abs() <= allowed).all()
    assert (y * x >= 0).all()


@pytest.mark.parametrize("octaves", [1, 30, 120])
def test_unsigned_codes_err_by_an_eighth_down_to_31_octaves(octaves: int) -> None:
    x = spread(octaves, 2).abs()
    for step in range(5):
        y = round_trip(int8_blocks(unsigned=True), x, random_bits(x, step))
        smallest = 1.125 * 2.0**-31 * block_maxima(x) * 16 / 15
        assert ((y - x).abs() <= torch.maximum(x / 8, smallest)).all()


@given(
    largest=st.floats(2.0**-149, 2.0**127, width=32),
    small=st.floats(2.0**-149, 2.0**127, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_second_moment_that_is_not_zero_never_becomes_zero(
    largest: float, small: float, seed: int
) -> None:
    """Whatever the rest of its block is. Otherwise an update would divide by zero."""
    x = torch.tensor([[largest, min(largest, small), 0.0]])
    y = round_trip(int8_blocks(unsigned=True), x, random_uint32(x.shape, seed, seed, x.device))
    assert (y > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("unsigned", [True, False])
def test_zeros_stay_zeros(unsigned: bool) -> None:
    x = torch.zeros(3, 200)
    x[1, 7] = 1.0
    y = round_trip(int8_blocks(unsigned), x, random_bits(x, 1))
    assert torch.equal(y, x)


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_infinity_and_nan_make_their_block_nan_and_no_other(value: float, unsigned: bool) -> None:
    x = torch.ones(3, 300)
    x[1, 130] = value
    y = round_trip(int8_blocks(unsigned), x, random_bits(x, 1))
    block = torch.zeros(3, 300, dtype=torch.bool)
    block[1, 128:256] = True
    assert torch.equal(y.isnan(), block)
    assert torch.equal(y[~block], x[~block])


@pytest.mark.parametrize("unsigned", [True, False])
def test_every_code_survives_reading_and_writing(unsigned: bool) -> None:
    """So a resumed run continues exactly."""
    parts = {"": torch.arange(256, dtype=torch.uint8).view(1, 256), "scale": torch.ones(1, 2)}
    if not unsigned:
        parts[""] = parts[""].view(2, 128).repeat(1, 2)[:1]  # without -0
    format_ = int8_blocks(unsigned)
    y = format_.read(parts)
    again = empty(format_, tuple(y.shape))
    for step in range(3):
        format_.write(again, y, random_bits(y, step))
        assert torch.equal(format_.read(again), y)
    values = y[0].unique()
    assert len(values) == len(set(parts[""].flatten().tolist()))
    assert values.max() == 1.875


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1.0, 1e30, 3e38])
def test_scales_cover_the_range_of_float32(size: float) -> None:
    x = torch.full((1, 3), size)
    x[0, 1] = size / 3
    y = round_trip(int8_blocks(unsigned=False), x)
    if size < 2.0**-96:  # steps below the smallest scale are even
        assert (y - x).abs().max() <= 2.0**-109
    else:
        assert ((y - x).abs() <= x / 16).all()


# Stochastic rounding.


def test_random_rounding_is_right_on_average() -> None:
    """Tolerance: five standard errors. The standard error of n draws is their deviation / sqrt(n).

    A draw is one of two values that are a step apart, so its deviation is half a step at most.
    """
    count = 4000
    x = spread(20, 3, rows=1, length=128).abs()
    total = torch.zeros(1, 128, dtype=torch.float64)
    for step in range(count):
        total += round_trip(int8_blocks(unsigned=True), x, random_bits(x, step)).double()
    error = (total / count - x).abs()
    assert (error <= 5 * x / 16 / math.sqrt(count)).all()
    nearest = round_trip(int8_blocks(unsigned=True), x).double()
    # The tolerance is small enough to tell rounding at random from rounding to nearest.
    assert ((nearest - x).abs() > 5 * x / 16 / math.sqrt(count)).any()


@half_dtypes
def test_random_rounding_to_16_bits_is_right_on_average(dtype: torch.dtype) -> None:
    count = 4000
    fraction, exponent = FRACTION[dtype]
    x = torch.tensor([1.001, -0.7371, 3.0, 1e-3, 2.0**exponent * 0.3003, 2.0**exponent])
    step_size = 2.0 ** (x.abs().log2().floor().clamp(min=exponent) - fraction)
    total = torch.zeros(len(x), dtype=torch.float64)
    for step in range(count):
        y = round_trip(stochastic(dtype), x, random_bits(x, step))
        assert ((y - x).abs() < step_size).all()
        assert torch.equal(y.to(dtype).float(), y)
        total += y.double()
    assert ((total / count - x).abs() <= 5 * step_size / 2 / math.sqrt(count)).all()


@half_dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, INF, -INF, NAN, 1.0, -65504.0, 1e30])
def test_random_rounding_keeps_values_that_fit_16_bits(value: float, dtype: torch.dtype) -> None:
    """Values beyond the largest are rounded by torch first."""
    x = torch.full((9,), value)
    parts = {"": torch.zeros(9, dtype=dtype)}
    stochastic(dtype).write(parts, x.to(dtype).float(), random_bits(x, 1))
    assert torch.equal(parts[""].isnan(), x.isnan())
    without_nan = parts[""].nan_to_num(nan=0.0, posinf=INF, neginf=-INF)
    assert torch.equal(without_nan, x.to(dtype).nan_to_num(nan=0.0, posinf=INF, neginf=-INF))
    assert torch.equal(parts[""].signbit(), x.signbit()) or value != value


def test_random_bits_are_uniform_and_new_in_every_step() -> None:
    """Oracle: mean and variance of a uniform distribution for each element, and no correlation.

    Tolerance: five standard errors. Over n steps, that of the mean is 0.29 / sqrt(n), and that of a
    correlation 1 / sqrt(n).
    """
    count = 2000
    shape = torch.Size([64])
    draws = torch.stack(
        [
            random_uint32(shape, 0, step_seed(param_seed(1, 2), t), torch.device("cpu"))
            for t in range(count)
        ]
    )
    u = draws.double() / 2**32
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * 0.29 / math.sqrt(count)
    assert (u.var(0) - 1 / 12).abs().max() < 5 * 0.075 / math.sqrt(count)
    from_step_to_step = torch.stack([u[:-1, 0], u[1:, 0]])
    assert torch.corrcoef(from_step_to_step)[0, 1].abs() < 5 / math.sqrt(count)
    # Neighbors share one shift and fill the range evenly: each sixteenth of it has 4 of 64.
    counts = torch.histc(u[0], bins=16, min=0, max=1)
    assert (counts - 4).abs().max() <= 2


def test_random_bits_depend_on_the_index_of_an_element_alone() -> None:
    seed = step_seed(param_seed(0, 0), 1)
    whole = random_uint32(torch.Size([4, 100]), 0, seed, torch.device("cpu"))
    part = random_uint32(torch.Size([2, 100]), 200, seed, torch.device("cpu"))
    assert torch.equal(whole[2:], part)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50, unique=True))
def test_the_hash_is_one_to_one(values: list[int]) -> None:
    assert len({hash32(x) for x in values}) == len(values)
    array = torch.tensor(values)
    assert hash32(array).tolist() == [hash32(x) for x in values]


def test_the_hash_flips_half_of_the_bits() -> None:
    """Oracle: a change of one bit flips 16 of 32 on average, with a deviation of 2.83 / 100."""
    values = torch.arange(10_000) * 12345 % 2**32
    for bit in range(32):
        flipped = hash32(values) ^ hash32(values ^ (1 << bit))
        count = sum((flipped >> k & 1).sum().item() for k in range(32)) / len(values)
        assert abs(count - 16) < 0.35


# Split weights.


def weights(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 values over the range of exponents of a 16-bit dtype."""
    x = spread(28, seed) * 2.0**14
    if dtype == torch.bfloat16:
        x[::2] *= 2.0**-80
    x[0, :6] = torch.tensor([0.0, 1.0, 2.0, 1.0 - 2.0**-24, 2.0 - 2.0**-23, 1.0 + 2.0**-8])
    return x


def test_32_bits_with_bfloat16_are_the_float32_itself() -> None:
    x = weights(1, torch.bfloat16)
    x[1, :3] = torch.tensor([INF, -INF, 3.4e38])
    assert torch.equal(round_trip(split_weight(torch.bfloat16, 32), x), x)


def test_32_bits_with_float16_are_the_float32_itself_within_its_range() -> None:
    x = weights(2, torch.float16)
    y = round_trip(split_weight(torch.float16, 32), x)
    large = x.abs() >= 2.0**-17
    assert torch.equal(y[large], x[large])
    assert (y - x).abs().max() <= 2.0**-40
    assert (~large).any()


@half_dtypes
def test_24_bits(dtype: torch.dtype) -> None:
    """15 bits of fraction for bfloat16, rounded to nearest; 8 more than its own for float16."""
    x = weights(3, dtype)
    y = round_trip(split_weight(dtype, 24), x)
    fraction, exponent = (15, -126) if dtype == torch.bfloat16 else (10 + 8, -14)
    last = 2.0 ** (x.abs().log2().floor().clamp(min=exponent) - fraction)
    # Eight bits cannot hold a tie between two float16: 127 / 256 of the last bit represents a half.
    allowed = last / 2 if dtype == torch.bfloat16 else last
    assert ((y - x).abs() <= allowed).all()


@half_dtypes
@pytest.mark.parametrize("width", [24, 32])
def test_the_weight_is_the_nearest_of_16_bits(dtype: torch.dtype, width: int) -> None:
    """Oracle: torch's rounding of the joined weight. Of a tie, bfloat16 takes the larger."""
    x = weights(4, dtype)
    format_ = split_weight(dtype, width)
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x)
    y = format_.read(parts)
    gap = (y.to(dtype).float() - y).abs()
    assert torch.equal((parts[""].float() - y).abs(), gap)


@half_dtypes
@pytest.mark.parametrize("width", [24, 32])
def test_a_weight_that_is_set_stays_except_for_its_low_bits(dtype: torch.dtype, width: int) -> None:
    """Pruning sets weights to 0, and their old low bits must not turn them into something else."""
    format_ = split_weight(dtype, width)
    x = weights(5, dtype)
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x)
    parts[""].zero_()
    y = format_.read(parts)
    assert y.abs().max() <= 2.0**-25
    if dtype == torch.float16:  # in bfloat16, low bits change the bits of infinity
        parts[""].fill_(INF)
        assert torch.equal(format_.read(parts), torch.full_like(x, INF))


@half_dtypes
@pytest.mark.parametrize("width", [24, 32])
def test_nan_stays_nan(dtype: torch.dtype, width: int) -> None:
    x = torch.tensor([NAN, -NAN, INF, -INF])
    y = round_trip(split_weight(dtype, width), x)
    assert y.isnan().tolist() == [True, True, False, False]
    assert y[2:].tolist() == [INF, -INF]


def test_tensor_names() -> None:
    formats = {"m": int8_blocks(unsigned=False), "p": split_weight(torch.bfloat16, 24)}
    assert tensor_names("m", formats) == ["m", "m.scale"]
    assert tensor_names("p", formats) == ["p", "p.low"]
    assert tensor_names("v", formats) == ["v"]

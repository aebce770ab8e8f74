"""Formats: what is stored, against what arithmetic on wide numbers says it should be.

Oracles: Python's fractions and torch in float64; torch's own rounding to 16 bits.
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
SHORT = [torch.bfloat16, torch.float16]
short = pytest.mark.parametrize("dtype", SHORT, ids=str)
#: The upper bits of bfloat16, or of float16, that a fraction has, and the smallest exponent.
FRACTION = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def empty(format_: Format, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors for what a format stores of a shape, holding what is not right for anything."""
    return {x.name: torch.full(x.shape(shape), 77, dtype=x.dtype) for x in format_.parts}


def stored(format_: Format, x: torch.Tensor, random: torch.Tensor | None = None) -> torch.Tensor:
    """What is read of numbers that were written."""
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x, random)
    return format_.read(parts)


def drawn(x: torch.Tensor, step: int) -> torch.Tensor:
    return random_uint32(x.shape, 0, step_seed(param_seed(3, 5), step), x.device)


def spread(octaves: float, seed: int, rows: int = 40, length: int = 300) -> torch.Tensor:
    """Numbers of either sign whose sizes are evenly spread over so many octaves."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** (-octaves * torch.rand(rows, length, generator=generator))
    return size * (torch.randint(0, 2, (rows, length), generator=generator) * 2 - 1)


def block_maxima(x: torch.Tensor) -> torch.Tensor:
    """For each element the largest size in its block."""
    largest = torch.empty_like(x)
    for begin in range(0, x.shape[1], BLOCK):
        block = x[:, begin : begin + BLOCK].abs()
        largest[:, begin : begin + BLOCK] = block.amax(1, keepdim=True)
    return largest


# Codes of 8 bits


@pytest.mark.parametrize("octaves", [1, 14, 60])
def test_signed_codes_err_by_a_sixteenth_down_to_15_octaves(octaves: int) -> None:
    """Half a step of 1/8; the code 1 is 1.125 / 2**15 of the scale, itself 16/15 at most."""
    x = spread(octaves, 1)
    y = stored(int8_blocks(unsigned=False), x)
    smallest = 1.125 * 2.0**-15 * block_maxima(x) * 16 / 15
    allowed = torch.maximum(x.abs() / 16, smallest)
    assert ((y - x).abs() <= allowed).all()
    assert (y * x >= 0).all()


@pytest.mark.parametrize("octaves", [1, 30, 120])
def test_unsigned_codes_err_by_an_eighth_down_to_31_octaves(octaves: int) -> None:
    x = spread(octaves, 2).abs()
    for step in range(5):
        y = stored(int8_blocks(unsigned=True), x, drawn(x, step))
        smallest = 1.125 * 2.0**-31 * block_maxima(x) * 16 / 15
        assert ((y - x).abs() <= torch.maximum(x / 8, smallest)).all()


@given(
    largest=st.floats(2.0**-149, 2.0**127, width=32),
    small=st.floats(2.0**-149, 2.0**127, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_second_moment_that_is_not_zero_is_never_stored_as_zero(
    largest: float, small: float, seed: int
) -> None:
    """Whatever it shares a block with; the update would be divided by that zero."""
    x = torch.tensor([[largest, min(largest, small), 0.0]])
    y = stored(int8_blocks(unsigned=True), x, random_uint32(x.shape, seed, seed, x.device))
    assert (y > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("unsigned", [True, False])
def test_zeros_stay_zeros(unsigned: bool) -> None:
    x = torch.zeros(3, 200)
    x[1, 7] = 1.0
    y = stored(int8_blocks(unsigned), x, drawn(x, 1))
    assert torch.equal(y, x)


@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(value: float, unsigned: bool) -> None:
    x = torch.ones(3, 300)
    x[1, 130] = value
    y = stored(int8_blocks(unsigned), x, drawn(x, 1))
    block = torch.zeros(3, 300, dtype=torch.bool)
    block[1, 128:256] = True
    assert torch.equal(y.isnan(), block)
    assert torch.equal(y[~block], x[~block])


@pytest.mark.parametrize("unsigned", [True, False])
def test_all_codes_are_numbers_that_are_stored_as_they_are(unsigned: bool) -> None:
    """Reading and writing again loses nothing, so that a run that is resumed goes on as it was."""
    parts = {"": torch.arange(256, dtype=torch.uint8).view(1, 256), "scale": torch.ones(1, 2)}
    if not unsigned:
        parts[""] = parts[""].view(2, 128).repeat(1, 2)[:1]  # without the other zero, -0
    format_ = int8_blocks(unsigned)
    y = format_.read(parts)
    again = empty(format_, tuple(y.shape))
    for step in range(3):
        format_.write(again, y, drawn(y, step))
        assert torch.equal(format_.read(again), y)
    values = y[0].unique()
    assert len(values) == len(set(parts[""].flatten().tolist()))
    assert values.max() == 1.875


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1.0, 1e30, 3e38])
def test_scales_reach_over_all_of_float32(size: float) -> None:
    x = torch.full((1, 3), size)
    x[0, 1] = size / 3
    y = stored(int8_blocks(unsigned=False), x)
    if size < 2.0**-96:  # below the smallest scale steps are even
        assert (y - x).abs().max() <= 2.0**-109
    else:
        assert ((y - x).abs() <= x / 16).all()


# Rounding at random


def test_random_rounding_is_right_on_average() -> None:
    """The mean of n draws errs by their deviation over the root of n: five of them are allowed.

    A draw is one of two neighbours a step apart, so it deviates by half a step at most.
    """
    count = 4000
    x = spread(20, 3, rows=1, length=128).abs()
    total = torch.zeros(1, 128, dtype=torch.float64)
    for step in range(count):
        total += stored(int8_blocks(unsigned=True), x, drawn(x, step)).double()
    error = (total / count - x).abs()
    assert (error <= 5 * x / 16 / math.sqrt(count)).all()
    nearest = stored(int8_blocks(unsigned=True), x).double()
    assert ((nearest - x).abs() > 5 * x / 16 / math.sqrt(count)).any()  # which this can tell


@short
def test_random_rounding_to_16_bits_is_right_on_average(dtype: torch.dtype) -> None:
    count = 4000
    fraction, exponent = FRACTION[dtype]
    x = torch.tensor([1.001, -0.7371, 3.0, 1e-3, 2.0**exponent * 0.3003, 2.0**exponent])
    step_size = 2.0 ** (x.abs().log2().floor().clamp(min=exponent) - fraction)
    total = torch.zeros(len(x), dtype=torch.float64)
    for step in range(count):
        y = stored(stochastic(dtype), x, drawn(x, step))
        assert ((y - x).abs() < step_size).all()
        assert torch.equal(y.to(dtype).float(), y)
        total += y.double()
    assert ((total / count - x).abs() <= 5 * step_size / 2 / math.sqrt(count)).all()


@short
@pytest.mark.parametrize("value", [0.0, -0.0, INF, -INF, NAN, 1.0, -65504.0, 1e30])
def test_random_rounding_leaves_what_16_bits_can_be(value: float, dtype: torch.dtype) -> None:
    """What is beyond the largest number becomes what torch makes of it."""
    x = torch.full((9,), value)
    parts = {"": torch.zeros(9, dtype=dtype)}
    stochastic(dtype).write(parts, x.to(dtype).float(), drawn(x, 1))
    assert torch.equal(parts[""].isnan(), x.isnan())
    kept = parts[""].nan_to_num(nan=0.0, posinf=INF, neginf=-INF)
    assert torch.equal(kept, x.to(dtype).nan_to_num(nan=0.0, posinf=INF, neginf=-INF))
    assert torch.equal(parts[""].signbit(), x.signbit()) or value != value


def test_random_words_are_uniform_and_new_in_every_step() -> None:
    """Oracle: for each element, the mean and variance of a uniform number, and no correlation.

    Over n steps the mean errs by 0.29 / sqrt(n), a correlation by 1 / sqrt(n); five of these.
    """
    count = 2000
    shape = torch.Size([64])
    words = torch.stack(
        [
            random_uint32(shape, 0, step_seed(param_seed(1, 2), t), torch.device("cpu"))
            for t in range(count)
        ]
    )
    u = words.double() / 2**32
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * 0.29 / math.sqrt(count)
    assert (u.var(0) - 1 / 12).abs().max() < 5 * 0.075 / math.sqrt(count)
    from_step_to_step = torch.stack([u[:-1, 0], u[1:, 0]])
    assert torch.corrcoef(from_step_to_step)[0, 1].abs() < 5 / math.sqrt(count)
    # Neighbours share one shift, and fill the range evenly: of 64, a sixteenth of it has 4.
    counts = torch.histc(u[0], bins=16, min=0, max=1)
    assert (counts - 4).abs().max() <= 2


def test_random_words_follow_from_the_index_of_an_element_alone() -> None:
    key = step_seed(param_seed(0, 0), 1)
    whole = random_uint32(torch.Size([4, 100]), 0, key, torch.device("cpu"))
    part = random_uint32(torch.Size([2, 100]), 200, key, torch.device("cpu"))
    assert torch.equal(whole[2:], part)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50, unique=True))
def test_mixing_is_one_to_one(words: list[int]) -> None:
    assert len({hash32(w) for w in words}) == len(words)
    array = torch.tensor(words)
    assert hash32(array).tolist() == [hash32(w) for w in words]


def test_mixing_turns_half_of_the_bits_over() -> None:
    """Oracle: of 32 bits, a change of one flips 16 on average, with a deviation of 2.83 / 100."""
    words = torch.arange(10_000) * 12345 % 2**32
    for bit in range(32):
        flipped = hash32(words) ^ hash32(words ^ (1 << bit))
        count = sum((flipped >> k & 1).sum().item() for k in range(32)) / len(words)
        assert abs(count - 16) < 0.35


# Joined weights


def wide(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Float32 numbers of all sizes for which 16 bits have an exponent."""
    x = spread(28, seed) * 2.0**14
    if dtype == torch.bfloat16:
        x[::2] *= 2.0**-80
    x[0, :6] = torch.tensor([0.0, 1.0, 2.0, 1.0 - 2.0**-24, 2.0 - 2.0**-23, 1.0 + 2.0**-8])
    return x


def test_32_bits_with_bfloat16_are_the_float32_itself() -> None:
    x = wide(1, torch.bfloat16)
    x[1, :3] = torch.tensor([INF, -INF, 3.4e38])
    assert torch.equal(stored(split_weight(torch.bfloat16, 32), x), x)


def test_32_bits_with_float16_are_the_float32_itself_where_that_has_enough_of_an_exponent() -> None:
    x = wide(2, torch.float16)
    y = stored(split_weight(torch.float16, 32), x)
    large = x.abs() >= 2.0**-17
    assert torch.equal(y[large], x[large])
    assert (y - x).abs().max() <= 2.0**-40
    assert (~large).any()


@short
def test_24_bits(dtype: torch.dtype) -> None:
    """With a bfloat16 15 bits of fraction, rounded to nearest; with a float16 8 more than its."""
    x = wide(3, dtype)
    y = stored(split_weight(dtype, 24), x)
    fraction, exponent = (15, -126) if dtype == torch.bfloat16 else (10 + 8, -14)
    last = 2.0 ** (x.abs().log2().floor().clamp(min=exponent) - fraction)
    # A tie between two float16 has no 8 bits: 127 / 256 of a bit stand for a half.
    allowed = last / 2 if dtype == torch.bfloat16 else last
    assert ((y - x).abs() <= allowed).all()


@short
@pytest.mark.parametrize("width", [24, 32])
def test_the_weight_is_the_nearest_of_16_bits(dtype: torch.dtype, width: int) -> None:
    """Oracle: torch's rounding of the joined weight; bfloat16 takes the larger of two as near."""
    x = wide(4, dtype)
    format_ = split_weight(dtype, width)
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x)
    y = format_.read(parts)
    gap = (y.to(dtype).float() - y).abs()
    assert torch.equal((parts[""].float() - y).abs(), gap)


@short
@pytest.mark.parametrize("width", [24, 32])
def test_a_weight_that_somebody_sets_is_what_it_was_set_to_but_for_the_lower_bits(
    dtype: torch.dtype, width: int
) -> None:
    """Pruning sets weights to 0, and nothing that was kept below them may make another of it."""
    format_ = split_weight(dtype, width)
    x = wide(5, dtype)
    parts = empty(format_, tuple(x.shape))
    format_.write(parts, x)
    parts[""].zero_()
    y = format_.read(parts)
    assert y.abs().max() <= 2.0**-25
    if dtype == torch.float16:  # with a bfloat16 what is kept is below infinity's own bits
        parts[""].fill_(INF)
        assert torch.equal(format_.read(parts), torch.full_like(x, INF))


@short
@pytest.mark.parametrize("width", [24, 32])
def test_nan_stays_nan(dtype: torch.dtype, width: int) -> None:
    x = torch.tensor([NAN, -NAN, INF, -INF])
    y = stored(split_weight(dtype, width), x)
    assert y.isnan().tolist() == [True, True, False, False]
    assert y[2:].tolist() == [INF, -INF]


def test_names() -> None:
    formats = {"m": int8_blocks(unsigned=False), "p": split_weight(torch.bfloat16, 24)}
    assert tensor_names("m", formats) == ["m", "m.scale"]
    assert tensor_names("p", formats) == ["p", "p.low"]
    assert tensor_names("v", formats) == ["v"]

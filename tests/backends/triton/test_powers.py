"""Powers, exponentials and logarithms of generated kernels, as the interpreter runs them.

Oracles: Python's decimal with 60 digits, rounded; the host's C library for what is not a number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch

from stepforge.backends.triton.kernel import is_interpreted, load
from stepforge.backends.triton.powers import FLOAT64_FUNCTIONS, float64_functions
from stepforge.ops import NUMBERS

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")

COUNT = 1000
EXACT = Context(prec=60, Emin=-(10**9), Emax=10**9)


def computed(op: str, *operands: Sequence[float]) -> list[float]:
    """Return the results of one operation on many numbers."""
    names = ["x", "y"][: len(operands)]
    loads = ", ".join(f"tl.load({name} + lane)" for name in names)
    source = f'''"""One operation."""

import triton
import triton.language as tl


{float64_functions([op])}@triton.jit
def run({", ".join(names)}, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, float64_{op}({loads}))
'''
    size = 2 ** math.ceil(math.log2(len(operands[0])))
    given = [
        torch.tensor([*numbers, *[1.0] * (size - len(numbers))], dtype=torch.float64)
        for numbers in operands
    ]
    out = torch.empty(size, dtype=torch.float64)
    with np.errstate(all="ignore"):
        load(source).run[(1,)](*given, out, BLOCK=size)
    return out[: len(operands[0])].tolist()


def betas(rng: random.Random) -> tuple[float, float]:
    known = [0.9, 0.99, 0.999, 0.95, 0.98, 0.9999, rng.random()]
    return rng.choice(known), float(rng.randint(1, 5000))


def schedule_of_nadam(rng: random.Random) -> tuple[float, float]:
    return 0.96, rng.randint(1, 10**6) * 0.004


def near_one(rng: random.Random) -> tuple[float, float]:
    return 1 + rng.uniform(-1e-6, 1e-6), rng.uniform(-1e7, 1e7)


def any_size(rng: random.Random) -> tuple[float, float]:
    return math.exp(rng.uniform(-300, 300)), rng.uniform(-2.3, 2.3)


@pytest.mark.parametrize("draw", [betas, schedule_of_nadam, near_one, any_size])
def test_powers_are_correctly_rounded(
    draw: Callable[[random.Random], tuple[float, float]],
) -> None:
    """Normal numbers only. The host's own may differ in the last bit."""
    rng = random.Random(0)
    pairs = [draw(rng) for _ in range(COUNT)]
    pairs = [(x, y) for x, y in pairs if math.pow(x, y) > 1e-307]
    assert len(pairs) > COUNT // 2
    with localcontext(EXACT):
        oracle = [float(Decimal(x) ** Decimal(y)) for x, y in pairs]
    assert computed("pow", *zip(*pairs)) == oracle
    assert all(abs(z - math.pow(x, y)) <= math.ulp(z) for z, (x, y) in zip(oracle, pairs))


def test_exponentials_and_logarithms_are_correctly_rounded() -> None:
    rng = random.Random(0)
    exponents = [rng.uniform(-708, 709) for _ in range(COUNT)]
    exponents += [rng.uniform(-1, 1) for _ in range(COUNT)]
    numbers = [math.exp(rng.uniform(-708, 709)) for _ in range(COUNT)]
    numbers += [1 + rng.uniform(-1e-3, 1e-3) for _ in range(COUNT)]
    numbers += [1.0, math.nextafter(1, 2), math.nextafter(1, 0), 5e-324, 1.7e308]
    with localcontext(EXACT):
        assert computed("exp", exponents) == [float(Decimal(x).exp()) for x in exponents]
        assert computed("log", numbers) == [float(Decimal(x).ln()) for x in numbers]


def test_denormal_results_are_off_by_one_at_most() -> None:
    """They are rounded twice."""
    rng = random.Random(0)
    exponents = [rng.uniform(-744, -709) for _ in range(COUNT)]
    pairs = list(zip(computed("exp", exponents), map(math.exp, exponents)))
    assert all(abs(got - oracle) <= 5e-324 for got, oracle in pairs)


SPECIAL = [0.0, 1.0, math.inf, 2.0, 0.5, 3.0, 2.5, 5e-324, 1.7e308, 1e-310, 2.0**63, 1074.0, 1023.0]
NUMBERS_OF_ALL_KINDS = [*SPECIAL, *(-x for x in SPECIAL), math.nan, 1 + 2**-52, 1 - 2**-53, 709.78]


def same(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other and math.copysign(1, one) == math.copysign(1, other)


@pytest.mark.parametrize("op", FLOAT64_FUNCTIONS)
def test_zeros_infinities_and_nans_are_the_host_s(op: str) -> None:
    """A negative power too large for float64 is minus infinity, as in C; the host's is plus."""
    rows: list[tuple[float, ...]] = [(x,) for x in NUMBERS_OF_ALL_KINDS]
    if op == "pow":
        rows = [(x, y) for x in NUMBERS_OF_ALL_KINDS for y in NUMBERS_OF_ALL_KINDS]
    for row, got in zip(rows, computed(op, *zip(*rows)), strict=True):
        oracle: Any = NUMBERS[op](*row)
        if row[0] < 0 and math.isfinite(row[0]) and got == -math.inf and op == "pow":
            assert row[1] % 2 == 1
            assert oracle == math.inf
        else:
            assert same(got, oracle), (row, got, oracle)


def test_programs_without_powers_take_no_functions() -> None:
    assert not float64_functions(["add", "div", "sqrt", "stored"])

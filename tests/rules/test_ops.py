"""The operations. Oracles: Python's math, numpy and torch; the decimal module for rounding."""

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from stepforge import ops
from stepforge.backends.exact import correct_sqrt

SPECIAL = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan, 1e-310, 1.7e308]
UNARY = ["sqrt", "sign", "finite", "exp", "log"]
BINARY = ["maximum", "minimum"]


def same(x: Any, y: Any) -> bool:
    return bool(np.array_equal(np.asarray(x, float), np.asarray(y, float), equal_nan=True))


@pytest.mark.parametrize("name", UNARY)
def test_floats_arrays_and_tensors_agree(name: str) -> None:
    function = getattr(ops, name)
    with np.errstate(all="ignore"):
        on_array = function(np.array(SPECIAL))
    on_floats = [function(x) for x in SPECIAL]
    on_tensor = function(torch.tensor(SPECIAL, dtype=torch.float64))
    assert same(on_floats, on_array)
    # torch's exp and log may round differently; all others are exact or correctly rounded here.
    tolerance = 1e-15 if name in ("exp", "log") else 0.0
    np.testing.assert_allclose(on_tensor.numpy(), on_array, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", BINARY)
def test_maximum_and_minimum(name: str) -> None:
    function = getattr(ops, name)
    pairs = [(x, y) for x in SPECIAL for y in SPECIAL]
    left, right = zip(*pairs)
    on_floats = [function(x, y) for x, y in pairs]
    assert same(on_floats, function(np.array(left), np.array(right)))
    tensors = (torch.tensor(side, dtype=torch.float64) for side in (left, right))
    assert same(on_floats, function(*tensors).numpy())
    assert all(math.isnan(function(x, y)) for x, y in pairs if math.isnan(x) or math.isnan(y))


def test_where_ignores_nan_in_the_other_branch() -> None:
    assert ops.where(True, 1.0, math.nan) == 1.0
    chosen = ops.where(torch.tensor([True, False]), torch.tensor([1.0, 2.0]), math.nan)
    assert chosen[0] == 1.0
    assert chosen[1].isnan()
    assert ops.where(np.array([True, False]), 1.0, 2.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", [float, np.float64, torch.tensor])
def test_ema_is_the_weighted_mean(beta: float, kind: Any) -> None:
    for average, value in [(1.0, 3.0), (-2.0, 1e-8), (1e-30, 1e30), (5.0, 5.0)]:
        found = float(ops.ema(kind(average), kind(value), beta))
        exact = Decimal(beta) * Decimal(average) + (1 - Decimal(beta)) * Decimal(value)
        # Three roundings (to float32 for tensors) of terms no larger than the larger operand.
        unit = 2.0**-24 if kind is torch.tensor else 2.0**-53
        assert abs(Decimal(found) - exact) <= 3 * Decimal(unit) * max(
            abs(Decimal(average)), abs(Decimal(value))
        )


def test_ema_is_exact_at_the_ends() -> None:
    assert ops.ema(1.0, 1e-12, 0.0) == 1e-12  # 1 + (1e-12 - 1) would be 1.00009e-12
    assert ops.ema(7.0, 7.0, 0.999) == 7.0


@pytest.mark.parametrize("value", [1.0, math.inf])
def test_an_average_that_has_overflowed_stays_infinite(value: float) -> None:
    assert ops.ema(math.inf, value, 0.999) == math.inf
    assert ops.ema(torch.tensor(math.inf), torch.tensor(value), 0.999) == math.inf
    assert math.isnan(ops.ema(math.inf, math.nan, 0.999))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_correctly_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(2000, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (2000,))
    for value, root in zip(x.tolist(), correct_sqrt(x).tolist()):
        above = torch.nextafter(
            torch.tensor(root, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
        )
        below = torch.nextafter(torch.tensor(root, dtype=dtype), torch.tensor(0.0, dtype=dtype))
        middle_above = (Decimal(root) + Decimal(above.item())) / 2
        middle_below = (Decimal(root) + Decimal(below.item())) / 2
        assert middle_below**2 <= Decimal(value) <= middle_above**2


@pytest.mark.parametrize(
    "x", [torch.tensor(4.0), torch.empty(0), torch.full((3, 4), 4.0)[::2, ::3]]
)
def test_roots_of_any_layout(x: torch.Tensor) -> None:
    assert torch.equal(correct_sqrt(x), torch.full_like(x, 2.0))


def test_powers_do_not_depend_on_the_length_of_an_array() -> None:
    # numpy's vectorized pow rounds differently on different instruction sets.
    bases = np.array([0.9, 0.999, 0.96, 0.5])
    exponents = np.array([3.0, 1e4, 0.004, 0.0])
    expected = [math.pow(b, e) for b, e in zip(bases, exponents)]
    assert ops.VOCABULARY["pow"](bases, exponents).tolist() == expected
    assert ops.VOCABULARY["pow"](0.999, np.full(1000, 7.0)).tolist() == [0.999**7] * 1000


@pytest.mark.parametrize(
    ("base", "exponent", "expected"),
    [(0.0, -1.0, math.inf), (10.0, 400.0, math.inf), (0.0, 0.0, 1.0)],
)
def test_powers_at_the_edge(base: float, exponent: float, expected: float) -> None:
    assert ops.VOCABULARY["pow"](base, exponent) == expected
    assert ops.VOCABULARY["pow"](np.array([base]), np.array([exponent])).tolist() == [expected]


def test_round_to_state_dtype_follows_the_default_dtype() -> None:
    assert ops.round_to_state_dtype is ops.stored, "the former name still works"
    assert ops.round_to_state_dtype(0.1) == float(np.float32(0.1))
    torch.set_default_dtype(torch.float64)
    try:
        assert ops.round_to_state_dtype(0.1) == 0.1
        assert ops.scalar_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_reductions_of_tensors_are_made_in_float64() -> None:
    """A rule that is run as it stands, on one parameter. Oracle: torch in float64."""
    x = torch.tensor([3e30, -4e30], dtype=torch.float32)
    assert ops.norm(x).item() == pytest.approx(x.double().norm().item(), rel=1e-15)
    assert ops.total(x).item() == x.double().sum().item()
    assert ops.largest(x).item() == x.max().item()
    assert ops.count(x < 0).item() == 1
    assert ops.largest(x[:0]).item() == -float("inf")

"""Rules, values and checks that the tests of both generated backends share.

Oracle: the reference's operations. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from stepforge.backends.native.dtypes import STORABLE
from stepforge.expr import Expr
from stepforge.ops import (
    bitcast_f32,
    bitcast_u32,
    f32_to_i32,
    finite,
    i32_to_f32,
    maximum,
    minimum,
    sign,
    sqrt,
    where,
)
from stepforge.program import Graph
from tests.backends.graphs import (
    Columns,
    by_reference,
    coefficients_of,
    every_pair,
    special_values,
    traced,
    with_results,
)
from tests.conformance.table import assert_same_bits, extreme

#: Steps parameters by a kernel, as :data:`tests.backends.graphs.by_kernel` does.
ByKernel = Callable[
    [Graph, Sequence[Columns], Sequence[Sequence[float]], torch.dtype], list[Columns]
]

#: Rules that end in each operation, with varying, uniform and mixed operands.
RULES: dict[str, list[Callable[[Expr, Expr, Expr], Expr]]] = {
    "add": [lambda p, g, c: p + g, lambda p, g, c: p + c, lambda p, g, c: p * g + p],
    "sub": [lambda p, g, c: p - g, lambda p, g, c: p - c, lambda p, g, c: c - p * g],
    "mul": [lambda p, g, c: p * g, lambda p, g, c: p * c],
    "div": [lambda p, g, c: p / g, lambda p, g, c: c / p],
    "neg": [lambda p, g, c: -p, lambda p, g, c: -(p + c)],
    "abs": [lambda p, g, c: abs(p)],
    "sqrt": [lambda p, g, c: sqrt(p), lambda p, g, c: 1 / sqrt(p * g)],
    "sign": [lambda p, g, c: sign(p)],
    "maximum": [lambda p, g, c: maximum(p, g), lambda p, g, c: maximum(c, p)],
    "minimum": [lambda p, g, c: minimum(p, g), lambda p, g, c: minimum(c, p)],
    "finite": [lambda p, g, c: finite(p), lambda p, g, c: finite(p * g)],
    "where": [
        lambda p, g, c: where(p < g, p, g),
        lambda p, g, c: where(c < 1, p, g),
        lambda p, g, c: where(p < g, c, p),
        lambda p, g, c: where(p < g, p, c),
        lambda p, g, c: where(p < g, c, 0.1) * p,
        lambda p, g, c: where(p < g, 1.2, 0.1) * p,
        lambda p, g, c: where(where(p < g, p < c, g < c), p, g),
        lambda p, g, c: where(where(c < 1, p < g, g < p), p, g),
    ],
    "lt": [lambda p, g, c: where(p < g, p, 1.0), lambda p, g, c: where(c < p, p, g)],
    "le": [lambda p, g, c: where(p <= g, p, 1.0), lambda p, g, c: where(p >= c, p, g)],
    "eq": [lambda p, g, c: where(p == g, p, 1.0), lambda p, g, c: where(p == c, p, g)],
    "ne": [lambda p, g, c: where(p != g, p, 1.0), lambda p, g, c: where(p != c, p, g)],
}


def in_i32_range(x: Expr) -> Expr:
    """Return values that convert to int32, and 0 for all others."""
    return where(abs(x) < 1e6, x, 0.0)


#: Rules that end in operations on uint32, converted back to floats. Formats use these operations,
#: in float32 alone.
RULES_ON_U32: dict[str, list[Callable[[Expr, Expr, Expr], Expr]]] = {
    "u32_add": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) + bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) + 77),
    ],
    "u32_sub": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) - bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(5 - bitcast_u32(p)),
    ],
    "u32_mul": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) * bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) * 77),
    ],
    "and": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) & bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) & 0xFF00),
    ],
    "or": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) | bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) | 2**31),
    ],
    "xor": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) ^ bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) ^ 2**31),
    ],
    "shift_left": [lambda p, g, c: i32_to_f32(bitcast_u32(p) << 7)],
    "shift_right": [lambda p, g, c: i32_to_f32(bitcast_u32(p) >> 7)],
    "bitcast_u32": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p)),
        lambda p, g, c: where(bitcast_u32(p) < bitcast_u32(g), p, g),
    ],
    "bitcast_f32": [
        lambda p, g, c: bitcast_f32(bitcast_u32(p) ^ 2**31),
        lambda p, g, c: bitcast_f32(where(bitcast_u32(p) < 2**31, bitcast_u32(g), 0)),
    ],
    "i32_to_f32": [lambda p, g, c: i32_to_f32(where(p < g, bitcast_u32(p), bitcast_u32(g)))],
    "f32_to_i32": [
        lambda p, g, c: i32_to_f32(f32_to_i32(in_i32_range(p)) + f32_to_i32(in_i32_range(g * 1000)))
    ],
}

Rule = Callable[[Expr, Expr, Expr], dict[str, Expr]]


def together(*ops: str) -> Rule:
    """Return one rule with a result for each rule of these operations."""
    return lambda p, g, c: {
        f"{op}_{position}": rule(p, g, c)
        for op in ops
        for position, rule in enumerate((RULES | RULES_ON_U32)[op])
    }


def assert_agrees_with_reference(
    by_kernel: ByKernel, graph: Graph, arithmetic: torch.dtype
) -> None:
    """Step every pair of special values, with one parameter for every special uniform value."""
    values = special_values(arithmetic)
    p, g = every_pair(values)
    coefficients = [coefficients_of(graph, {"c": c}, arithmetic) for c in values.tolist()]
    params = [with_results(graph, {"p": p, "g": g}) for _ in coefficients]
    results = by_kernel(graph, params, coefficients, arithmetic)
    expected = by_reference(graph, params, coefficients, arithmetic)
    for c, got, oracle in zip(values.tolist(), results, expected, strict=True):
        assert_same_bits(got, oracle, f"c = {c}:")


CONSTANTS = [0.0, -0.0, 1.0, -2.5, 0.1, 1e-45, 1e-310, 3.4e38, math.inf, -math.inf, math.nan]


def assert_constant_agrees_with_reference(
    by_kernel: ByKernel, constant: float, arithmetic: torch.dtype
) -> None:
    """Step every pair of special values by a rule that contains a constant."""

    def rule(p: Expr, g: Expr) -> dict[str, Expr]:
        return {
            "sum": p * g + constant,
            "product": (p + g) * constant,
            "quotient": constant / p,
            "smaller": minimum(p, constant),
            "chosen": where(g < constant, p, constant),
        }

    graph = traced(rule)
    p, g = every_pair(special_values(arithmetic))
    params = [with_results(graph, {"p": p, "g": g})]
    (got,) = by_kernel(graph, params, [[]], arithmetic)
    assert_same_bits(got, by_reference(graph, params, [[]], arithmetic)[0])


# Dtypes.


def rounding_rule(p: Expr, g: Expr, c: Expr) -> dict[str, Expr]:
    """Return p and m, which need rounding in every dtype."""
    return {"p": p - c * g / (sqrt(g * g) + 0.5), "m": g * c + p * 0.3}


def dtype_mixes() -> list[tuple[torch.dtype, ...]]:
    """Return dtypes of p, g and m, with every pair of dtypes for every two of the three."""
    dtypes = list(STORABLE)
    indices = itertools.product(range(len(dtypes)), repeat=2)
    return [(dtypes[i], dtypes[j], dtypes[(i + j) % len(dtypes)]) for i, j in indices]


def mix_id(mix: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in mix)


def assert_mix_agrees_with_reference(
    by_kernel: ByKernel, mix: tuple[torch.dtype, ...], arithmetic: torch.dtype
) -> None:
    """Step a parameter whose p, g and m have these dtypes."""
    graph = traced(rounding_rule, "c")
    param = {
        name: extreme((999,), torch.float64, seed).to(dtype)
        for seed, (name, dtype) in enumerate(zip("pgm", mix, strict=True))
    }
    coefficients = [coefficients_of(graph, {"c": 0.7}, arithmetic)]
    (got,) = by_kernel(graph, [param], coefficients, arithmetic)
    assert_same_bits(got, by_reference(graph, [param], coefficients, arithmetic)[0])


def from_bits(patterns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values with these bit patterns."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return patterns.to(integer).view(dtype)


def with_neighbors(x: torch.Tensor) -> torch.Tensor:
    """Return values, and the next values above and below each."""
    inf = torch.tensor(math.inf, dtype=x.dtype)
    return torch.cat([x, torch.nextafter(x, inf), torch.nextafter(x, -inf)])


def rounding_boundaries(dtype: torch.dtype, arithmetic: torch.dtype) -> torch.Tensor:
    """Return every value of a 16-bit dtype and every midpoint of two, each with its neighbors.

    The last midpoint, between the largest value and the one that would follow it, decides which
    values round to infinity.
    """
    every = from_bits(torch.arange(2**16), dtype).to(arithmetic)
    finite_values = every[every.isfinite()].unique()
    gap = finite_values[-1] - finite_values[-2]
    ends = torch.stack([finite_values[0] - gap, finite_values[-1] + gap])
    ladder = torch.cat([ends[:1], finite_values, ends[1:]])
    midpoints = ladder[:-1] / 2 + ladder[1:] / 2
    zero = -torch.zeros(1).to(arithmetic)
    return torch.cat([every, with_neighbors(ladder), with_neighbors(midpoints), zero])


def random_floats(count: int) -> torch.Tensor:
    """Return random bit patterns: floats of all exponents, including infinities and NaN."""
    patterns = torch.randint(2**32, (count,), generator=torch.Generator().manual_seed(0))
    return from_bits(patterns, torch.float32)

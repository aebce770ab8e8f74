"""Results of Triton kernels. Oracles: the reference's operations, torch's conversions between
dtypes. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from stepforge.backends import triton
from stepforge.backends.spec import arithmetic_of
from stepforge.backends.triton.kernel import BLOCK, is_interpreted
from tests.backends.graphs import (
    ARITHMETICS,
    batch_of,
    by_reference,
    coefficients_of,
    columns_of,
    graph_of,
    traced,
)
from tests.backends.rules import (
    CONSTANTS,
    RULES,
    RULES_ON_U32,
    assert_agrees_with_reference,
    assert_constant_agrees_with_reference,
    assert_mix_agrees_with_reference,
    dtype_mixes,
    from_bits,
    mix_id,
    random_floats,
    rounding_boundaries,
    rounding_rule,
    together,
)
from tests.backends.triton.kernels import by_kernel, by_kernels_only
from tests.conformance.table import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    assert_same_bits,
    contiguous,
    extreme,
    normal,
)

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)


def test_every_operation_of_triton_is_in_the_rules() -> None:
    assert list(triton.OPERATIONS) == [*RULES, *RULES_ON_U32]


@pytest.mark.parametrize("op", RULES_ON_U32)
def test_an_operation_on_uint32_computes_what_the_reference_does(
    op: str, device: torch.device
) -> None:
    run = functools.partial(by_kernel, device=device)
    assert_agrees_with_reference(run, traced(together(op), "c"), torch.float32)


@every_arithmetic
@pytest.mark.parametrize("op", RULES)
def test_an_operation_computes_what_the_reference_does(
    op: str, arithmetic: torch.dtype, device: torch.device
) -> None:
    run = functools.partial(by_kernel, device=device)
    assert_agrees_with_reference(run, traced(together(op), "c"), arithmetic)


@every_arithmetic
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_in_a_rule(
    constant: float, arithmetic: torch.dtype, device: torch.device
) -> None:
    run = functools.partial(by_kernel, device=device)
    assert_constant_agrees_with_reference(run, constant, arithmetic)


@every_arithmetic
def test_a_product_and_a_sum_are_rounded_apart(
    arithmetic: torch.dtype, device: torch.device
) -> None:
    """Oracle: zero, from rounding twice. A fused multiply-add would leave the product's error."""
    p = torch.linspace(1, 2, 1000, dtype=arithmetic)
    graph = traced(lambda p, g: p * p + g)
    (got,) = by_kernel(graph, [{"p": p, "g": -(p * p)}], [[]], arithmetic, device)
    assert not got["p"].any()


# Dtypes.


@every_arithmetic
@pytest.mark.parametrize("mix", dtype_mixes(), ids=mix_id)
def test_dtypes_in_any_mix(
    mix: tuple[torch.dtype, ...], arithmetic: torch.dtype, device: torch.device
) -> None:
    run = functools.partial(by_kernel, device=device)
    assert_mix_agrees_with_reference(run, mix, arithmetic)


sixteen_bits = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


@every_arithmetic
@sixteen_bits
def test_rounding_to_sixteen_bits_is_torch_s(
    dtype: torch.dtype, arithmetic: torch.dtype, device: torch.device
) -> None:
    """At all midpoints of two values, and next to them."""
    g = torch.cat([rounding_boundaries(dtype, arithmetic), random_floats(2**14).to(arithmetic)])
    param = {"g": g, "p": torch.zeros(len(g), dtype=dtype)}
    (got,) = by_kernel(traced(lambda p, g: g), [param], [[]], arithmetic, device)
    assert_same_bits(got, {"p": g.to(torch.float32).to(dtype)})


@every_arithmetic
@sixteen_bits
def test_all_sixteen_bit_numbers_are_read(
    dtype: torch.dtype, arithmetic: torch.dtype, device: torch.device
) -> None:
    g = from_bits(torch.arange(2**16), dtype)
    param = {"g": g, "p": torch.zeros(len(g), dtype=arithmetic)}
    (got,) = by_kernel(traced(lambda p, g: g), [param], [[]], arithmetic, device)
    assert_same_bits(got, {"p": g.to(arithmetic)})


# Memory.


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("p_layout", LAYOUTS)
def test_any_layouts_meet(p_layout: str, layout: str, device: torch.device) -> None:
    """Also in one launch with parameters of other layouts and dimensions."""
    if layout == "lazily_negated":
        pytest.skip("the reference steps it, as test_memory.py tests")
    graph = traced(rounding_rule, "c")
    shapes = [(4, 3, 5, 2), (7, 6), (9,), (), (0, 3)]
    params = [
        {
            "p": LAYOUTS[p_layout](normal(shape, torch.float32, 3 * k)),
            "g": GRADIENT_LAYOUTS[layout](normal(shape, torch.float32, 3 * k + 1)),
            "m": LAYOUTS["transposed"](normal(shape, torch.float32, 3 * k + 2)),
        }
        for k, shape in enumerate(shapes)
    ]
    coefficients = [
        coefficients_of(graph, {"c": 0.1 * k}, torch.float32) for k in range(len(shapes))
    ]
    found = by_kernel(graph, params, coefficients, torch.float32, device)
    wanted = by_reference(graph, params, coefficients, torch.float32)
    for got, oracle in zip(found, wanted, strict=True):
        assert_same_bits(got, oracle)


def test_layouts_of_more_elements_than_a_block(device: torch.device) -> None:
    """Elements are found by their index in the tensor, not by their index in the block."""
    graph = graph_of("Adam")
    shape = (7, 13, 29)  # 2639 elements in 3 blocks
    param = {name: normal(shape, torch.float32, k).abs() for k, name in enumerate("pgmv")}
    param |= {"g": contiguous(param["g"].permute(2, 0, 1)).permute(1, 2, 0), "m": param["m"] * 2}
    param["v"] = LAYOUTS["with_gaps"](param["v"])
    coefficients = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]]
    (got,) = by_kernel(graph, [param], coefficients, torch.float32, device)
    assert_same_bits(got, by_reference(graph, [param], coefficients, torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_neither_neighbours_nor_alignment_matter(
    offset: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Sizes around that of a block, between guard values, at any offset from 16-byte alignment."""
    arithmetic = arithmetic_of(dtype)
    graph = graph_of("NAdam")
    sizes = [0, 1, BLOCK - 1, 0, BLOCK, BLOCK + 1, 2 * BLOCK, 0]
    memory = {
        column: extreme((sum(sizes) + 16 * (len(sizes) + 1),), dtype, seed).abs().to(device)
        for seed, column in enumerate(columns_of(graph))
    }
    params, wanted = [], {name: whole.cpu().clone() for name, whole in memory.items()}
    begin, begins = offset, []
    for size in sizes:
        params.append({name: whole[begin : begin + size] for name, whole in memory.items()})
        begins.append(begin)
        begin += -(-(size + 1) // 16) * 16  # the next parameter has the same alignment
    coefficients = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]] * len(params)
    before = [{name: x.cpu() for name, x in param.items()} for param in params]
    results = by_reference(graph, before, coefficients, arithmetic)
    for result, begin, size in zip(results, begins, sizes, strict=True):
        for name, x in result.items():
            wanted[name][begin : begin + size] = x
    with by_kernels_only():
        triton.run(batch_of(graph, params, coefficients, arithmetic))
    assert_same_bits({name: whole.cpu() for name, whole in memory.items()}, wanted)


def test_an_address_that_is_no_multiple_of_the_element_size() -> None:
    """As in a memory-mapped file. A GPU refuses such addresses, from torch too."""
    if not is_interpreted():
        pytest.skip("kernels are compiled here")

    def values(seed: int) -> torch.Tensor:
        x = torch.frombuffer(bytearray(4 * 1500 + 1), dtype=torch.float32, offset=1)
        assert x.data_ptr() % 4
        return x.copy_(normal((1500,), torch.float32, seed))

    graph = graph_of("Adam")
    param: dict[str, Any] = {name: values(k).abs() for k, name in enumerate("pgmv")}
    param |= {"p": values(0), "g": values(1)}
    coefficients = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]]
    (wanted,) = by_reference(graph, [param], coefficients, torch.float32)
    with by_kernels_only():
        triton.run(batch_of(graph, [param], coefficients, torch.float32))
    assert_same_bits({name: param[name] for name in wanted}, wanted)

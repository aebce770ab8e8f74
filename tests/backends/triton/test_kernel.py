"""What a kernel computes and stores. Oracles: the reference's operations, torch's conversions
between dtypes. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepforge.backends import triton
from stepforge.backends.triton.kernel import BLOCK, is_interpreted
from stepforge.expr import Expr
from stepforge.ops import minimum, where
from stepforge.program import Graph
from tests.conformance.table import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    assert_same_bits,
    contiguous,
    extreme,
    normal,
)
from tests.backends.graphs import (
    ARITHMETICS,
    batch_of,
    by_reference,
    coefficients,
    columns_of,
    every_pair,
    graph_of,
    special,
    traced,
    with_results,
)
from tests.backends.native.test_source import (
    CONSTANTS,
    RULES,
    RULES_OF_WORDS,
    any_floats,
    bits_from,
    mixes,
    name_of,
    step_of_three,
    together,
    where_roundings_change,
)
from tests.backends.triton.kernels import by_kernel, by_kernels_only

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)


def test_every_operation_of_triton_is_in_the_rules() -> None:
    assert list(triton.OPERATIONS) == [*RULES, *RULES_OF_WORDS]


def assert_as_the_reference(graph: Graph, arithmetic: torch.dtype, device: torch.device) -> None:
    """Runs every pair of special values, with every special uniform value in a row of its own."""
    values = special(arithmetic)
    p, g = every_pair(values)
    given = [coefficients(graph, {"c": c}, arithmetic) for c in values.tolist()]
    rows = [with_results(graph, {"p": p, "g": g}) for _ in given]
    found = by_kernel(graph, rows, given, arithmetic, device)
    wanted = by_reference(graph, rows, given, arithmetic)
    for c, got, oracle in zip(values.tolist(), found, wanted, strict=True):
        assert_same_bits(got, oracle, f"c = {c}:")


@pytest.mark.parametrize("op", RULES_OF_WORDS)
def test_an_operation_on_words_computes_what_the_reference_does(
    op: str, device: torch.device
) -> None:
    assert_as_the_reference(traced(together(op), "c"), torch.float32, device)


@every_arithmetic
@pytest.mark.parametrize("op", RULES)
def test_an_operation_computes_what_the_reference_does(
    op: str, arithmetic: torch.dtype, device: torch.device
) -> None:
    assert_as_the_reference(traced(together(op), "c"), arithmetic, device)


@every_arithmetic
@pytest.mark.parametrize("constant", CONSTANTS)
def test_numbers_that_stand_in_a_rule(
    constant: float, arithmetic: torch.dtype, device: torch.device
) -> None:
    def rule(p: Expr, g: Expr) -> dict[str, Expr]:
        return {
            "sum": p * g + constant,
            "product": (p + g) * constant,
            "quotient": constant / p,
            "smaller": minimum(p, constant),
            "chosen": where(g < constant, p, constant),
        }

    graph = traced(rule)
    p, g = every_pair(special(arithmetic))
    rows = [with_results(graph, {"p": p, "g": g})]
    (got,) = by_kernel(graph, rows, [[]], arithmetic, device)
    assert_same_bits(got, by_reference(graph, rows, [[]], arithmetic)[0])


@every_arithmetic
def test_a_product_and_a_sum_are_rounded_apart(
    arithmetic: torch.dtype, device: torch.device
) -> None:
    """The oracle is one number's two roundings; fused they would leave the product's error."""
    p = torch.linspace(1, 2, 1000, dtype=arithmetic)
    graph = traced(lambda p, g: p * p + g)
    (got,) = by_kernel(graph, [{"p": p, "g": -(p * p)}], [[]], arithmetic, device)
    assert not got["p"].any()


# What is stored in what.


@every_arithmetic
@pytest.mark.parametrize("mix", mixes(), ids=name_of)
def test_dtypes_in_any_mix(
    mix: tuple[torch.dtype, ...], arithmetic: torch.dtype, device: torch.device
) -> None:
    graph = traced(step_of_three, "c")
    row = {
        name: extreme((999,), torch.float64, seed).to(dtype)
        for seed, (name, dtype) in enumerate(zip("pgm", mix, strict=True))
    }
    given = [coefficients(graph, {"c": 0.7}, arithmetic)]
    (got,) = by_kernel(graph, [row], given, arithmetic, device)
    assert_same_bits(got, by_reference(graph, [row], given, arithmetic)[0])


sixteen_bits = pytest.mark.parametrize(
    "stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


@every_arithmetic
@sixteen_bits
def test_rounding_to_sixteen_bits_is_torch_s(
    stored: torch.dtype, arithmetic: torch.dtype, device: torch.device
) -> None:
    """Over all midpoints between two numbers and what is next to them."""
    g = torch.cat([where_roundings_change(stored, arithmetic), any_floats(2**14).to(arithmetic)])
    row = {"g": g, "p": torch.zeros(len(g), dtype=stored)}
    (got,) = by_kernel(traced(lambda p, g: g), [row], [[]], arithmetic, device)
    assert_same_bits(got, {"p": g.to(torch.float32).to(stored)})


@every_arithmetic
@sixteen_bits
def test_all_sixteen_bit_numbers_are_read(
    stored: torch.dtype, arithmetic: torch.dtype, device: torch.device
) -> None:
    g = bits_from(torch.arange(2**16), stored)
    row = {"g": g, "p": torch.zeros(len(g), dtype=arithmetic)}
    (got,) = by_kernel(traced(lambda p, g: g), [row], [[]], arithmetic, device)
    assert_same_bits(got, {"p": g.to(arithmetic)})


# Where it is stored.


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("of_p", LAYOUTS)
def test_any_layouts_meet(of_p: str, layout: str, device: torch.device) -> None:
    """Also beside rows of other layouts and other numbers of dimensions."""
    if layout == "lazily_negated":
        pytest.skip("it is the reference's, as test_memory.py shows")
    graph = traced(step_of_three, "c")
    shapes = [(4, 3, 5, 2), (7, 6), (9,), (), (0, 3)]
    rows = [
        {
            "p": LAYOUTS[of_p](normal(shape, torch.float32, 3 * k)),
            "g": GRADIENT_LAYOUTS[layout](normal(shape, torch.float32, 3 * k + 1)),
            "m": LAYOUTS["transposed"](normal(shape, torch.float32, 3 * k + 2)),
        }
        for k, shape in enumerate(shapes)
    ]
    given = [coefficients(graph, {"c": 0.1 * k}, torch.float32) for k in range(len(shapes))]
    found = by_kernel(graph, rows, given, torch.float32, device)
    wanted = by_reference(graph, rows, given, torch.float32)
    for got, oracle in zip(found, wanted, strict=True):
        assert_same_bits(got, oracle)


def test_layouts_of_more_elements_than_a_block(device: torch.device) -> None:
    """An element is found by its number, which does not begin anew in each block."""
    graph = graph_of("Adam")
    shape = (7, 13, 29)  # 2639 elements in 3 blocks
    row = {name: normal(shape, torch.float32, k).abs() for k, name in enumerate("pgmv")}
    row |= {"g": contiguous(row["g"].permute(2, 0, 1)).permute(1, 2, 0), "m": row["m"] * 2}
    row["v"] = LAYOUTS["with_gaps"](row["v"])
    given = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]]
    (got,) = by_kernel(graph, [row], given, torch.float32, device)
    assert_same_bits(got, by_reference(graph, [row], given, torch.float32)[0])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_neither_neighbours_nor_alignment_matter(
    offset: int, stored: torch.dtype, device: torch.device
) -> None:
    """Rows around the size of a block, between guards, at any offset from a word of 16 bytes."""
    arithmetic = torch.float64 if stored == torch.float64 else torch.float32
    graph = graph_of("NAdam")
    sizes = [0, 1, BLOCK - 1, 0, BLOCK, BLOCK + 1, 2 * BLOCK, 0]
    memory = {
        column: extreme((sum(sizes) + 16 * (len(sizes) + 1),), stored, seed).abs().to(device)
        for seed, column in enumerate(columns_of(graph))
    }
    rows, wanted = [], {name: whole.cpu().clone() for name, whole in memory.items()}
    begin, begins = offset, []
    for size in sizes:
        rows.append({name: whole[begin : begin + size] for name, whole in memory.items()})
        begins.append(begin)
        begin += -(-(size + 1) // 16) * 16  # the next row lies as this one does
    numbers = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]] * len(rows)
    before = [{name: x.cpu() for name, x in row.items()} for row in rows]
    results = by_reference(graph, before, numbers, arithmetic)
    for result, begin, size in zip(results, begins, sizes, strict=True):
        for name, x in result.items():
            wanted[name][begin : begin + size] = x
    with by_kernels_only():
        triton.run(batch_of(graph, rows, numbers, arithmetic))
    assert_same_bits({name: whole.cpu() for name, whole in memory.items()}, wanted)


def test_an_address_that_is_no_multiple_of_an_element_where_memory_may_be_read_so() -> None:
    """As in a file that is read without copying. A GPU would refuse, for torch itself as well."""
    if not is_interpreted():
        pytest.skip("kernels are compiled here")

    def values(seed: int) -> torch.Tensor:
        x = torch.frombuffer(bytearray(4 * 1500 + 1), dtype=torch.float32, offset=1)
        assert x.data_ptr() % 4
        return x.copy_(normal((1500,), torch.float32, seed))

    graph = graph_of("Adam")
    row: dict[str, Any] = {name: values(k).abs() for k, name in enumerate("pgmv")}
    row |= {"p": values(0), "g": values(1)}
    given = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]]
    (wanted,) = by_reference(graph, [row], given, torch.float32)
    with by_kernels_only():
        triton.run(batch_of(graph, [row], given, torch.float32))
    assert_same_bits({name: row[name] for name in wanted}, wanted)

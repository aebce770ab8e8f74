"""foreach: chunks on a CPU, and lists of tensors, which an accelerator and odd tensors take.

Oracle: the reference's operations. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch

from stepforge.backends import Batch, chunk, foreach, reference
from stepforge.expr import Expr
from stepforge.ops import sqrt, where
from stepforge.program import Graph
from tests.backends.graphs import (
    ARITHMETICS,
    Columns,
    batch_of,
    by_reference,
    coefficients_of,
    results_of,
    traced,
    with_results,
)
from tests.backends.rules import (
    CONSTANTS,
    RULES,
    RULES_ON_U32,
    assert_agrees_with_reference,
    assert_constant_agrees_with_reference,
    together,
)
from tests.conformance.table import assert_same_bits, normal


def in_chunks(batch: Batch) -> None:
    """Step parameters in chunks, in place; fail if another way is taken."""
    error = AssertionError("not in chunks")
    with (
        mock.patch.object(foreach, "_run_lists", side_effect=error),
        mock.patch.object(reference, "run", side_effect=error),
    ):
        foreach.run(batch, foreach.prepare(batch))


def in_lists(batch: Batch) -> None:
    """Step parameters by list operations."""
    with mock.patch.object(chunk, "takes", return_value=False):
        foreach.run(batch)


WAYS = {"chunks": in_chunks, "lists": in_lists}
Way = Callable[[Batch], None]


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def way(request: pytest.FixtureRequest) -> Way:
    step: Way = request.param
    return step


def by(step: Way) -> Callable[..., list[Columns]]:
    def results(
        graph: Graph,
        params: Sequence[Columns],
        coefficients: Sequence[Sequence[float]],
        arithmetic: torch.dtype,
    ) -> list[Columns]:
        return results_of(step, graph, params, coefficients, arithmetic)

    return results


@pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=list(ARITHMETICS))
def test_every_operation(way: Way, arithmetic: torch.dtype) -> None:
    assert_agrees_with_reference(by(way), traced(together(*RULES), "c"), arithmetic)


def test_every_operation_on_uint32(way: Way) -> None:
    graph = traced(together(*RULES_ON_U32), "c")
    assert_agrees_with_reference(by(way), graph, torch.float32)


@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=list(ARITHMETICS))
def test_every_constant(way: Way, constant: float, arithmetic: torch.dtype) -> None:
    assert_constant_agrees_with_reference(by(way), constant, arithmetic)


#: Rules whose results take the place of one another, or of an input. ``g`` stands for a state.
CROSSED: dict[str, Callable[[Expr, Expr, Expr], dict[str, Expr]]] = {
    "swapped": lambda p, g, c: {"p": g, "g": p},
    "swapped and new": lambda p, g, c: {"p": g * c, "g": p * c},
    "one value twice": lambda p, g, c: {"p": p * c, "g": p * c},
    "an input twice": lambda p, g, c: {"p": g, "n": g, "g": g + p},
    "the old one kept": lambda p, g, c: {"p": p - g, "n": p},
    "chosen": lambda p, g, c: {"p": where(c < 1, g, p) + p, "g": where(c < 1, p, g)},
    "chosen twice": lambda p, g, c: {"p": where(c < 1, g, p), "n": where(c < 1, g, p) * p, "g": -g},
    "chosen and new": lambda p, g, c: {"p": where(c < 1, p * g, p) - g, "g": p * g + c},
    "read late": lambda p, g, c: {"g": g * c, "p": (g + p) * g},
}


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rule", CROSSED.values(), ids=list(CROSSED))
def test_a_result_is_stored_when_nothing_reads_what_it_replaces(
    way: Way, rule: Callable[[Expr, Expr, Expr], dict[str, Expr]], count: int, c: float
) -> None:
    """Several parameters are joined; one is computed in its own memory."""
    graph = traced(rule, "c")
    params = [
        with_results(
            graph, {"p": normal((5,), torch.float32, i), "g": normal((5,), torch.float32, -i)}
        )
        for i in range(count)
    ]
    coefficients = [coefficients_of(graph, {"c": c}, torch.float32)] * count
    got = by(way)(graph, params, coefficients, torch.float32)
    expected = by_reference(graph, params, coefficients, torch.float32)
    for index in range(count):
        assert_same_bits(got[index], expected[index])


def test_parameters_are_stepped_together_if_they_share_coefficients() -> None:
    """Oracle: the coefficients, of which 2 and 3 are those of several parameters."""
    graph = traced(lambda p, g, c: p * c - g, "c")
    values = [2.0, 3.0, 2.0, 5.0, 3.0]
    params = [{"p": torch.full((i + 1,), 1.0), "g": torch.zeros(i + 1)} for i in range(5)]
    batch = batch_of(graph, params, [[c] for c in values], torch.float32)
    with mock.patch.object(chunk, "run", wraps=chunk.run) as run:
        in_chunks(batch)
    assert [len(call.args[0]) for call in run.call_args_list] == [2, 2, 1]
    assert [p[0].item() for p in batch.columns["p"]] == values


def test_a_lazy_negation_is_not_computed_in(way: Way) -> None:
    """The root of a column that ends there is numpy's, which takes no negation."""
    graph = traced(lambda p, g: sqrt(p) + g)
    values = normal((5,), torch.float32, 0).abs()

    def negated() -> torch.Tensor:
        return torch._neg_view(-values)

    batches = [
        batch_of(graph, [{"p": negated(), "g": values.clone()}], [[]], torch.float32)
        for _ in range(2)
    ]
    way(batches[0])
    reference.run(batches[1])
    assert torch.equal(batches[0].columns["p"][0], batches[1].columns["p"][0])


def test_memory_is_taken_once_for_all_chunks() -> None:
    """Oracle: a rule that needs two intermediate values at a time, on 3 sizes of chunks."""
    graph = traced(lambda p, g: p - (g * g) / ((p * p) + 0.5))
    size = 2 * chunk.ELEMENTS + 100
    params = [{"p": normal((size,), torch.float32, 0), "g": normal((size,), torch.float32, 1)}]
    with mock.patch.object(torch, "empty", wraps=torch.empty) as empty:
        in_chunks(batch_of(graph, params, [[]], torch.float32))
    sizes = [call.args[0] for call in empty.call_args_list if call.args[0] != 0]
    assert sizes == [(chunk.ELEMENTS,)] * 2

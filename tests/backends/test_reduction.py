"""Reductions of a pass.

Oracles: ``math.fsum``, which rounds a sum once; Python's ``max``; torch's operations in the order
that ``backends/reduction.py`` states, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stepforge.backends import BACKENDS
from stepforge.backends.batch import Batch
from stepforge.backends.reduction import BLOCK, combined, reduce_by_torch
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.expr import Trace
from stepforge.ops import ALL, count, largest, norm, total
from stepforge.program import Graph
from tests.conformance.table import assert_same_bits, extreme, normal

INF, NAN = float("inf"), float("nan")
SIZES = [0, 1, 2, 3, 100, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7]


def graph() -> Graph:
    """Return a pass with every reduction, of the gradient and of the parameter."""
    trace = Trace()
    p, g = (trace.input(name, varying=True) for name in "pg")
    squares = norm(g, across=ALL).args[0]
    return Graph.of_reductions(
        [squares, total(g - p), largest(abs(g)), largest(g), count(g > p), count(g - g != 0)]
    )


def batch_of(gradients: list[torch.Tensor], arithmetic: torch.dtype = torch.float32) -> Batch:
    params = [normal(g.shape, g.dtype, 100 + k) for k, g in enumerate(gradients)]
    dtypes = {"p": gradients[0].dtype, "g": gradients[0].dtype}
    spec = KernelSpec.of(graph(), dtypes, arithmetic=arithmetic)
    return Batch(spec, {"p": params, "g": gradients}, [])


def by(backend: str, batch: Batch) -> torch.Tensor:
    module: Any = BACKENDS[backend]
    return torch.as_tensor(module.reduce(batch, module.prepare_pass(batch)))


BY_KERNEL = ["native", *(["triton"] if is_interpreted() else [])]


@pytest.mark.parametrize("values", [normal, extreme])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("backend", BY_KERNEL)
def test_kernels_have_the_bits_of_torchs_operations(
    backend: str, dtype: torch.dtype, values: Any
) -> None:
    """Also with NaN and infinities in a block, and with zeros of either sign alone."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    gradients = [values((size,), dtype, size) for size in SIZES]
    gradients += [values((2 * BLOCK,), dtype, 1) for _ in range(3)]
    for g, odd in zip(gradients[-3:], (NAN, INF, -INF)):
        g[BLOCK + 5] = odd
    gradients += [torch.full((size,), -0.0, dtype=dtype) for size in (1, BLOCK)]
    batch = batch_of(gradients, arithmetic)
    got, oracle = by(backend, batch), reduce_by_torch(batch)
    assert_same_bits({"": got}, {"": oracle})


def test_torchs_operations_add_up_what_they_say() -> None:
    """A sum of n numbers by halving errs by the rounding of log2(n) additions."""
    gradients = [normal((size,), torch.float64, size) for size in SIZES]
    batch = batch_of(gradients, torch.float64)
    results = reduce_by_torch(batch)
    for row, g, p in zip(results, gradients, batch.columns["p"]):
        numbers, differences = g.tolist(), (g - p).tolist()
        squares, sum_, size, most, above, odd = row.tolist()
        assert squares == pytest.approx(math.fsum(x * x for x in numbers), rel=1e-15)
        error = 2**-52 * 13 * math.fsum(map(abs, differences))
        assert sum_ == pytest.approx(math.fsum(differences), rel=0, abs=error)
        assert size == max(map(abs, numbers), default=-INF)
        assert most == max(numbers, default=-INF)
        assert above == sum(x > y for x, y in zip(numbers, p.tolist()))
        assert odd == 0
    assert results[-1][0].item() == pytest.approx(
        math.fsum(x * x for g in gradients for x in g.tolist()), rel=1e-15
    )


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 63, 64, 65, 700, BLOCK])
def test_the_order_within_a_block(size: int) -> None:
    """Oracle: Python's floats, added up as ``backends/reduction.py`` says: rows, parts, lanes."""

    def halved(numbers: list[float]) -> float:
        half = len(numbers) // 2
        return halved([a + b for a, b in zip(numbers, numbers[half:])]) if half else numbers[0]

    values = normal((size,), torch.float64, size) ** 5
    block = values.tolist() + [0.0] * (BLOCK - size)
    parts = [block[begin : begin + 64] for begin in range(0, BLOCK, 64)]
    rows = [[halved(part[lane::16]) for lane in range(16)] for part in parts]
    lanes = [halved([row[lane] for row in rows]) for lane in range(16)]
    assert combined("total", values).item() == halved(lanes)
    if size == BLOCK:  # any other order has other bits
        assert halved(lanes) not in (halved(block), sum(block))


def test_more_than_two_rounds_of_blocks() -> None:
    """Oracle: the same order, of an array at once."""
    size = BLOCK * BLOCK + 3 * BLOCK + 1
    batch = batch_of([normal((size,), torch.float32, 0)])
    results = [reduce_by_torch(batch), by("native", batch)]
    squares = combined("squares", batch.columns["g"][0].double().square().numpy())
    for found in results:
        assert found[0][0].item() == squares
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("op", ["total", "largest"])
def test_arrays_and_tensors_are_combined_alike(op: str) -> None:
    for size in SIZES:
        values = normal((size,), torch.float64, size)
        assert float(combined(op, values)) == float(combined(op, values.numpy()))


@pytest.mark.parametrize("backend", BY_KERNEL)
def test_gradients_of_a_later_step(backend: str) -> None:
    """A kept table takes their addresses."""

    class Later:
        disjoint = False

        def write_addresses(self, out: Any) -> None:
            out[:] = [x.data_ptr() for x in later.columns["g"]]

    module: Any = BACKENDS[backend]
    first = batch_of([normal((size,), torch.float32, size) for size in SIZES])
    later = batch_of([normal((size,), torch.float32, 50 + size) for size in SIZES])
    later.columns["p"][:] = first.columns["p"]  # type: ignore[index]
    table = module.prepare_pass(first)
    table.bind_gradients(Later())
    got = torch.as_tensor(module.reduce(later, table))
    assert_same_bits({"": got}, {"": reduce_by_torch(later)})

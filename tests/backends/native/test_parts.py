"""Long slices are stepped part by part, and ask for memory ahead.

Oracle: the reference's bits. Sizes are those at which a path begins or ends: a slice that is long,
one element less, and whole parts with and without a rest.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.native.parts import constants
from stepforge.backends.spec import KernelSpec
from tests.conformance.table import (
    DTYPES,
    FORMATS,
    assert_same_bits,
    forced,
    normal,
    outcome,
    parameter,
)

STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    **{name: (DTYPES[name], {}) for name in ("float32", "float64", "bfloat16", "float16")},
    **FORMATS,
}


def macro(name: str) -> int:
    """Return the number that a kernel of AdamW in float32 has for a macro."""
    optimizer = stepforge.AdamW([torch.zeros(1)])
    graph = optimizer.rule.graph(optimizer.param_groups[0])
    text = constants(KernelSpec.of(graph, dict.fromkeys("pgmv", torch.float32)))
    found = re.search(rf"#define {name} (\d+)", text)
    assert found
    return int(found[1])


LONG, PART = macro("LONG"), macro("PART")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Make a slice as long as the parameter."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stepped(backend: str, stored: str, size: int, *, telemetry: bool) -> dict[str, torch.Tensor]:
    """Return a parameter, its states and its metrics after two steps."""
    dtype, options = STORED[stored]
    p = parameter(normal((1, size), dtype, 1))
    with forced(backend):
        optimizer = stepforge.AdamW([p], weight_decay=0.1, telemetry=telemetry, **options)
        for seed in (2, 3):
            p.grad = normal((1, size), dtype, seed)
            optimizer.step()
    return outcome(optimizer, p) | optimizer.metrics()


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "metrics"])
@pytest.mark.parametrize("stored", STORED)
def test_long_slices_have_the_references_bits(stored: str, telemetry: bool) -> None:
    for size in (LONG - 1, LONG, LONG + PART + 1):
        got, oracle = (
            stepped(backend, stored, size, telemetry=telemetry)
            for backend in ("native", "reference")
        )
        assert_same_bits(got, oracle)


def test_infinite_moments_become_the_largest_number() -> None:
    """The kernel finds infinities by their bits; NaN and the largest number have bits beside."""
    largest = torch.finfo(torch.float32).max
    odd = [float("inf"), -float("inf"), float("nan"), -float("nan"), largest, -largest, 0.0, -0.0]
    results = []
    for backend in ("native", "reference"):
        p = parameter(torch.ones(len(odd)))
        with forced(backend):
            optimizer = stepforge.Adam([p])
            for gradient in (torch.ones(len(odd)), torch.zeros(len(odd))):
                p.grad = gradient
                optimizer.step()
                optimizer.state[p]["exp_avg"].copy_(torch.tensor(odd))
                optimizer.state[p]["exp_avg_sq"].copy_(torch.tensor(odd).abs())
            optimizer.step()
        results.append(outcome(optimizer, p))
    assert_same_bits(*results)

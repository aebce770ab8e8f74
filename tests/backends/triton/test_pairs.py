"""Sums in pairs of float32, for GPUs whose float64 is slow; in the interpreter.

Oracle: the sums in float64 of any other device. The bound is that of backends/triton/pairs.py:
2**-44 of the sum of magnitudes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stepforge
from stepforge.backends.reduction import BLOCK
from stepforge.backends.triton import variant
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.backends.triton.reduction_source import pass_source
from stepforge.backends.triton.variant import Target
from tests.backends.test_reduction import batch_of, by
from tests.conformance.table import assert_same_bits, forced, normal, outcome, parameter

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="for Triton's interpreter")

INF, NAN = float("inf"), float("nan")
SIZES = [2, BLOCK + 7]  # the interpreter takes a second for a block


@pytest.fixture
def slow_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Target(has_fast_float64=False)
    for module in ("reduction", "variant"):
        monkeypatch.setattr(f"stepforge.backends.triton.{module}.target_of", lambda device: slow)


@pytest.mark.parametrize("scale", [1.0, 3e38, 1e-44], ids=str)
def test_sums_are_those_in_float64(scale: float, slow_float64: None) -> None:
    """Also of squares that float32 cannot hold."""
    gradients = [normal((size,), torch.float32, size).clamp(-1, 1) * scale for size in SIZES]
    batch = batch_of(gradients)
    got, oracle = by("triton", batch), by("native", batch)
    sizes = [
        (g.double().square().sum(), (g - p).double().abs().sum())
        for g, p in zip(gradients, batch.columns["p"])
    ]
    magnitudes = torch.tensor(sizes)
    magnitudes = torch.cat([magnitudes, magnitudes.sum(0, keepdim=True)])
    error = (got[:, :2] - oracle[:, :2]).abs()
    assert (error <= 2.0**-44 * magnitudes).all()
    assert_same_bits({"": got[:, 2:]}, {"": oracle[:, 2:]})


@pytest.mark.parametrize("odd", [INF, -INF, NAN], ids=str)
def test_infinities_and_nan_stay_what_they_are(odd: float, slow_float64: None) -> None:
    g = normal((100,), torch.float32, 1)
    g[5] = odd
    batch = batch_of([g])
    got, oracle = by("triton", batch), by("native", batch)
    np.testing.assert_allclose(got.numpy(), oracle.numpy(), rtol=2.0**-44)


def test_a_step_measures_itself_and_clips(slow_float64: None) -> None:
    """A step has the same bits, and metrics are the same but for the bound."""
    results: dict[str, Any] = {}
    for backend in ("triton", "native"):
        params = [parameter(normal((size,), torch.float32, size)) for size in (5, 1030)]
        with forced(backend):
            optimizer = stepforge.AdamW(params, telemetry=True, max_grad_norm=0.5)
            for seed, p in enumerate(params):
                p.grad = normal(tuple(p.shape), torch.float32, seed)
            optimizer.step()
        results[backend] = [outcome(optimizer, p) for p in params], optimizer.metrics()
    (got, metrics), (oracle, others) = results["triton"], results["native"]
    for one, other in zip(got, oracle):
        assert_same_bits(one, other)
    for name, value in others.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=2.0**-23), name


def test_pairs_are_for_slow_float64_alone() -> None:
    """Float64 itself is never in pairs, and what NVIDIA sells for computing has it fast."""
    slow = Target(has_fast_float64=False)
    for target, arithmetic, expected in [
        (slow, torch.float32, True),
        (slow, torch.float64, False),
        (Target(), torch.float32, False),
    ]:
        gradients = [torch.ones(2, dtype=arithmetic)]
        source = pass_source(batch_of(gradients, arithmetic).spec, target)
        assert ("squares_in_pairs(tl.where" in source) is expected
    assert {(8, 0), (9, 0)} <= variant._FAST_FLOAT64
    assert not {(7, 5), (8, 6), (8, 9), (12, 0)} & variant._FAST_FLOAT64

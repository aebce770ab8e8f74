"""examples/lamb.py: a rule with norms runs on every backend.

Oracles: the paper's Algorithm 2 in plain float64 torch; the reference backend, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lamb import LAMB
from lion import fit

import stepforge
from stepforge.declare import NonNegative
from stepforge.ops import ALL, norm
from tests.conformance.table import (
    BACKENDS,
    FAST,
    FORMATS,
    assert_same_bits,
    contiguous,
    forced,
    normal,
    outcome,
    parameter,
    run,
    transposed,
)

SHAPES = [(33,), (70, 65), (), (0, 2), (2000,)]


def trained(
    backend: str, dtype: torch.dtype = torch.float32, cls: Any = LAMB, **options: Any
) -> list[dict[str, torch.Tensor]]:
    """Return the outcomes of two param groups; the third parameter begins as zero."""
    params = [parameter(normal(s, dtype, k) * (k != 2)) for k, s in enumerate(SHAPES)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}]
    with forced(backend):
        optimizer = cls(groups, **options)
        for step in range(3):
            given = [normal(s, dtype, 10 * step + k) for k, s in enumerate(SHAPES)]
            given[1] = transposed(given[1]) if step == 2 else given[1]
            run(optimizer, params[::2] + params[1::2], [given[::2] + given[1::2]])
    return [{key: contiguous(x) for key, x in outcome(optimizer, p).items()} for p in params]


def by_paper(steps: int, **options: float) -> list[torch.Tensor]:
    """Algorithm 2, line by line; a ratio with a norm of zero is 1."""
    beta1, beta2, eps = 0.9, 0.999, 1e-6
    found = []
    for k, shape in enumerate(SHAPES):
        x = normal(shape, torch.float64, k) * (k != 2)
        m = v = torch.zeros_like(x)
        lr = 0.02 if k % 2 else options["lr"]
        for t in range(1, steps + 1):
            g = normal(shape, torch.float64, 10 * (t - 1) + k)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            r = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            u = r + options["weight_decay"] * x
            ratio = x.norm() / u.norm() if x.norm() > 0 and u.norm() > 0 else 1.0
            x = x - lr * ratio * u
        found.append(x)
    return found


def test_it_is_the_paper_s() -> None:
    got = trained("reference", torch.float64, lr=0.01, weight_decay=0.1)
    for one, oracle in zip(got, by_paper(3, lr=0.01, weight_decay=0.1), strict=True):
        torch.testing.assert_close(one["p"], oracle, rtol=1e-13, atol=1e-15)


#: Every backend in every format; those that are interpreted in two, as they are slow.
CASES = [
    (backend, format_)
    for backend in BACKENDS
    if backend != "reference"
    for format_ in [
        "float32",
        *(FORMATS if backend in FAST else ["bfloat16, 24 bits, int8 states"]),
    ]
]


@pytest.mark.parametrize(("backend", "format_"), CASES)
def test_every_backend_stores_the_same_bits(backend: str, format_: str) -> None:
    dtype, options = FORMATS.get(format_, (torch.float32, {}))
    options = {"weight_decay": 0.1, **options}
    got, wanted = (trained(name, dtype, **options) for name in (backend, "reference"))
    for one, oracle in zip(got, wanted, strict=True):
        assert_same_bits(one, oracle, format_)


@pytest.mark.parametrize("options", [{"capturable": True}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_other_options_work_with_it(backend: str, options: dict[str, Any]) -> None:
    got, wanted = (trained(name, **options) for name in (backend, "reference"))
    for one, oracle in zip(got, wanted, strict=True):
        assert_same_bits(one, oracle)


def test_autograd_sees_the_norms() -> None:
    """Oracle: the derivative by the learning rate, from two steps that are near to each other."""

    def loss(lr: torch.Tensor) -> torch.Tensor:
        p = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True).clone()
        p.retain_grad()
        optimizer = LAMB([p], lr=lr, differentiable=True)
        p.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
        optimizer.step()
        return (p * torch.tensor([1.0, 3.0], dtype=torch.float64)).sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss(lr).backward()
    near = (loss(lr.detach() + 1e-6) - loss(lr.detach() - 1e-6)) / 2e-6
    assert lr.grad is not None
    torch.testing.assert_close(lr.grad, near.detach(), rtol=1e-6, atol=0)


def with_global_norm(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * g / norm(g, across=ALL)


class Normalized(stepforge.Optimizer, rule=with_global_norm):
    """Descent along the gradient of the whole model, by a step of fixed length."""

    lr: NonNegative = 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_over_all_parameters(backend: str) -> None:
    """Over all param groups and dtypes. Oracle: torch in float64."""
    params = [
        parameter(normal((5, 3), torch.float32, 0)),
        parameter(normal((7,), torch.float64, 1)),
    ]
    before = [p.detach().double().clone() for p in params]
    given = [normal((5, 3), torch.float32, 2), normal((7,), torch.float64, 3)]
    with forced(backend):
        optimizer = Normalized([{"params": params[:1]}, {"params": params[1:], "lr": 0.2}])
        run(optimizer, params, [given])
    length = torch.cat([g.double().flatten() for g in given]).norm()
    for p, was, g, lr in zip(params, before, given, (0.1, 0.2), strict=True):
        rounding = 1e-6 if p.dtype == torch.float32 else 1e-14
        oracle = was - lr * g.double() / length
        torch.testing.assert_close(p.detach().double(), oracle, rtol=rounding, atol=rounding)


def test_it_trains() -> None:
    losses = fit(LAMB, 0.02)
    assert losses[-1] < losses[0] / 100

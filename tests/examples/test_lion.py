"""examples/lion.py: a new rule gets every feature of the built-in rules.

Oracles: the paper's formula in plain float64 torch and in Python floats; the reference backend.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lion import Lion, fit

import stepforge
from stepforge.declare import NonNegative, zeros
from stepforge.ops import where
from tests.conformance.table import (
    BACKENDS,
    FAST,
    FORMATS,
    assert_same_bits,
    extreme,
    forced,
    normal,
    outcome,
)

SHAPES = [(33,), (5, 3), ()]


def trained(
    steps: int, dtype: torch.dtype = torch.float64, values: Any = normal, **options: Any
) -> tuple[Lion, list[torch.nn.Parameter]]:
    """Return Lion after some steps, with gradients that do not depend on the parameters."""
    parameters = [torch.nn.Parameter(normal(s, dtype, i)) for i, s in enumerate(SHAPES)]
    optimizer = Lion(parameters, **options)
    proceed(optimizer, parameters, range(steps), values)
    return optimizer, parameters


def proceed(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    steps: range,
    values: Any = normal,
) -> None:
    for step in steps:
        for i, p in enumerate(parameters):
            p.grad = values(p.shape, p.dtype, 100 + 10 * step + i)
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_computes_the_papers_formula(backend: str, weight_decay: float, maximize: bool) -> None:
    lr, (beta1, beta2) = 0.01, (0.9, 0.99)
    with forced(backend):
        optimizer, parameters = trained(
            20, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), maximize=maximize
        )

    for i, (p, shape) in enumerate(zip(parameters, SHAPES)):
        theta, m = normal(shape, torch.float64, i), torch.zeros(shape, dtype=torch.float64)
        for step in range(20):
            g = normal(shape, torch.float64, 100 + 10 * step + i) * (-1 if maximize else 1)
            c = beta1 * m + (1 - beta1) * g
            theta = theta - lr * (torch.sign(c) + weight_decay * theta)
            m = beta2 * m + (1 - beta2) * g
        # Both are float64 in another order of operations: a few units of 2**-53 per step, 20 steps.
        torch.testing.assert_close(p.detach(), theta, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-13, atol=1e-15)


def test_it_computes_the_papers_formula_in_plain_numbers() -> None:
    p = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    theta, m = 2.0, 0.0

    for g in (1.0, -0.25, -8.0, 0.0):  # the second makes the average exactly 0
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        c = 0.5 * m + 0.5 * g
        theta -= 0.1 * ((c > 0) - (c < 0) + 0.5 * theta)
        m = 0.75 * m + 0.25 * g

        assert p.item() == pytest.approx(theta, rel=1e-15)
        assert optimizer.state[p]["exp_avg"].item() == m


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("values", [normal, extreme])
def test_every_backend_stores_the_same_bits(
    backend: str, dtype: torch.dtype, values: Callable[..., torch.Tensor]
) -> None:
    found = []
    for name in (backend, "reference"):
        with forced(name):
            optimizer, parameters = trained(8, dtype, values, lr=0.01, weight_decay=0.1)
        found.append([outcome(optimizer, p) for p in parameters])

    for got, wanted in zip(*found):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend", FAST)
def test_it_trains(backend: str) -> None:
    with forced(backend):
        losses = fit(Lion, lr=3e-3, steps=300)

    assert losses[0] > 0.5
    assert losses[-1] < 0.01


def test_a_tensor_is_a_learning_rate() -> None:
    _, with_number = trained(3, lr=0.5)
    _, with_tensor = trained(3, lr=torch.tensor(0.5))

    assert all(torch.equal(a, b) for a, b in zip(with_number, with_tensor))


def test_a_checkpoint_continues_bit_for_bit() -> None:
    uninterrupted, wanted = trained(10, torch.float32, lr=0.01, weight_decay=0.1)
    first, parameters = trained(4, torch.float32, lr=0.01, weight_decay=0.1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)

    parameters = copy.deepcopy(parameters)
    second = Lion(parameters, lr=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    proceed(second, parameters, range(4, 10))

    for p, q in zip(parameters, wanted):
        assert_same_bits(outcome(second, p), outcome(uninterrupted, q))


def test_a_checkpoint_of_another_optimizer_is_refused() -> None:
    optimizer, _ = trained(1)
    other = stepforge.Adam([torch.nn.Parameter(torch.zeros(s)) for s in SHAPES])

    with pytest.raises(ValueError, match="does not fit this optimizer"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0; it must be a number >= 0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number >= 0, but got 'fast'"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (0.9,)}, ValueError, "betas must have 2 components"),
        ({"betas": 0.9}, TypeError, "betas must be a tuple of 2 numbers"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"eps": 1e-8}, TypeError, "unexpected keyword argument 'eps'"),
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Lion([torch.zeros(2)], **options)


def test_a_sparse_gradient_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 0.0, 0.0]).to_sparse()

    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        Lion([p]).step()
    assert p.tolist() == [1, 1, 1]


# Mistakes of users in writing a rule.


def step_with(rule: Callable[..., Any]) -> None:
    """Step once with an optimizer of this rule, whose only option is ``lr``."""

    class Mistaken(stepforge.Optimizer, rule=rule):
        lr: NonNegative = 0.1

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    Mistaken([p]).step()


def with_if(h: Any, t: Any, p: Any, g: Any) -> Any:
    if g > 0:
        return p - h.lr
    return p + h.lr


def with_bool(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * bool(g)


def with_or(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * (g or 1)


def with_max(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - max(h.lr, g)


@pytest.mark.parametrize("rule", [with_if, with_bool, with_or, with_max])
def test_choosing_in_python_is_refused_with_a_hint(rule: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"write where\(condition, a, b\) instead of `if`"):
        step_with(rule)


def test_what_the_hint_says_works() -> None:
    step_with(lambda h, t, p, g: p - h.lr * where(g > 0, 1.0, -1.0))


def test_the_functions_of_math_are_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"use the functions of stepforge\.ops"):
        step_with(lambda h, t, p, g: p - h.lr * math.sqrt(g))


def test_a_wrong_number_of_results_is_refused() -> None:
    with pytest.raises(TypeError, match=r"returned 2 values; it must return p$"):
        step_with(lambda h, t, p, g: (p - h.lr * g, g))


def no_state(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * g


def another_state(h: Any, t: Any, p: Any, g: Any, v: Any) -> Any:
    return p - h.lr * g, v


@pytest.mark.parametrize("rule", [no_state, another_state])
def test_a_rule_that_does_not_match_its_states_is_refused(rule: Callable[..., Any]) -> None:
    message = (
        rf"rule {rule.__name__}\(.*\) does not match its declared states; "
        r"its arguments must be \(h, t, p, g, m\)"
    )
    with pytest.raises(TypeError, match=message):

        class Mistaken(stepforge.Optimizer, rule=rule):
            lr: NonNegative = 0.1
            m = zeros("exp_avg")


@pytest.mark.parametrize("format_", ["float32, int8 states", "bfloat16, 24 bits, int8 states"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_it_has_formats(backend: str, format_: str) -> None:
    """Oracle: the reference. The states must also be in that format."""
    dtype, options = FORMATS[format_]
    outcomes = []
    for name in ("reference", backend):
        p = torch.nn.Parameter(normal((17, 257), dtype, 1))
        optimizer = Lion([p], **options)
        with forced(name):
            for step in range(3):
                p.grad = normal((17, 257), dtype, 2 + step)
                optimizer.step()
        outcomes.append(outcome(optimizer, p))
    assert_same_bits(*outcomes)
    assert outcomes[0]["exp_avg_codes"].dtype == torch.uint8
    assert ("low_bits_8" in outcomes[0]) == (dtype == torch.bfloat16)

"""A differentiable step has correct derivatives, and the values of any other step.

Oracle of the derivatives: finite differences (torch.autograd.gradcheck, in float64, with its
default tolerances). Oracle of the values: the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.conformance.table import OPTIMIZERS, VARIANTS, normal, outcome

STEPS = 8  # RAdam divides from its sixth on
SIZE = 3
#: Half a unit in the last place of 1.
U = 2.0**-53

#: Options that make steps large enough for finite differences.
OPTIONS: dict[str, Any] = {"lr": 0.1, "eps": 1e-3}


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def slope(p: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a loss with curvature, from 1 to 3: every later step depends on p."""
    return 2 + torch.sin(3 * p)


def train(
    name: str, p: torch.Tensor, options: dict[str, Any], *, differentiable: bool = True
) -> dict[str, torch.Tensor]:
    """Take ``STEPS`` steps from ``p``, each with the :func:`slope` at the current value."""
    p = p.clone()
    p.retain_grad() if differentiable else p.requires_grad_()
    optimizer = OPTIMIZERS[name].ours([p], **options, differentiable=differentiable)
    for _ in range(STEPS):
        p.grad = slope(p.clone())  # a clone, as the step overwrites what autograd saves of p
        p.grad = p.grad if differentiable else p.grad.detach()
        optimizer.step()
    return outcome(optimizer, p) | {"p": p}  # the parameter as autograd knows it


def assert_differentiable(
    results: Callable[..., dict[str, torch.Tensor]], *inputs: torch.Tensor
) -> None:
    """Assert that the derivatives of the parameter and of every state that has one are correct."""

    def smooth(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x for x in results(*values).values() if x.requires_grad)

    assert len(smooth(*inputs)) >= 1
    derivatives = torch.autograd.grad(sum(x.sum() for x in smooth(*inputs)), inputs)
    assert all(derivative.abs().min() > 1e-6 for derivative in derivatives)
    assert torch.autograd.gradcheck(smooth, inputs)


every_variant = pytest.mark.parametrize(("name", "form"), VARIANTS.values(), ids=VARIANTS)
#: The variants without `maximize`, which only changes a sign: finite differences are expensive.
DOWNHILL = {key: case for key, case in VARIANTS.items() if not case[1]["maximize"]}
every_descent = pytest.mark.parametrize(("name", "form"), DOWNHILL.values(), ids=DOWNHILL)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_descent
def test_with_respect_to_the_initial_parameter(name: str, form: dict[str, Any]) -> None:
    start = normal((SIZE,), torch.float64, 0).requires_grad_()
    assert_differentiable(lambda p: train(name, p, OPTIONS | form), start)


@every_descent
def test_with_respect_to_the_learning_rate(name: str, form: dict[str, Any]) -> None:
    start = normal((SIZE,), torch.float64, 0)

    def results(lr: torch.Tensor) -> dict[str, torch.Tensor]:
        return train(name, start.clone().requires_grad_(), OPTIONS | form | {"lr": lr})

    assert_differentiable(results, scalar(0.1))


@every_descent
def test_with_respect_to_the_weight_decay(name: str, form: dict[str, Any]) -> None:
    start = normal((SIZE,), torch.float64, 0)

    def results(decay: torch.Tensor) -> dict[str, torch.Tensor]:
        options = OPTIONS | form | {"weight_decay": decay}
        return train(name, start.clone().requires_grad_(), options)

    assert_differentiable(results, scalar(0.1))


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.3, 0.4)], ids=["slow", "fast"])
@pytest.mark.parametrize(
    ("name", "form"),
    [case for case in DOWNHILL.values() if case[0] in ("Adam", "AdamW")],
    ids=[key for key, case in DOWNHILL.items() if case[0] in ("Adam", "AdamW")],
)
def test_with_respect_to_the_betas(
    name: str, form: dict[str, Any], betas: tuple[float, float]
) -> None:
    """The betas are on both sides of one half, where the average changes its form."""
    start = normal((SIZE,), torch.float64, 0)

    def results(beta1: torch.Tensor, beta2: torch.Tensor) -> dict[str, torch.Tensor]:
        options = OPTIONS | form | {"betas": (beta1, beta2)}
        return train(name, start.clone().requires_grad_(), options)

    assert_differentiable(results, *map(scalar, betas))


@pytest.fixture
def float64_states() -> Iterator[None]:
    """Make scalar states in float64: float32 would round the 1e-6 by which gradcheck moves them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def nadam_from(cls: Any, mu_product: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Return the outcome of steps of NAdam from this ``mu_product``, after a first step."""
    p = normal((SIZE,), torch.float64, 0)
    optimizer = cls([p], differentiable=True, **OPTIONS)
    for step in range(1 + steps):
        if step == 1:
            optimizer.state[p]["mu_product"] = mu_product.clone()
        p.grad = slope(p.clone())
        optimizer.step()
    return {"p": p, "mu_product": optimizer.state[p]["mu_product"]}


@pytest.mark.usefixtures("float64_states")
def test_with_respect_to_a_scalar_state() -> None:
    assert_differentiable(lambda x: nadam_from(OPTIMIZERS["NAdam"].ours, x, 2), scalar(0.7))


@pytest.mark.usefixtures("float64_states")
def test_with_respect_to_a_scalar_state_as_in_torch() -> None:
    derivatives = []
    for cls in (OPTIMIZERS["NAdam"].ours, OPTIMIZERS["NAdam"].theirs):
        mu_product = scalar(0.7)
        results = nadam_from(cls, mu_product, 1).values()
        derivatives.append(torch.autograd.grad(sum(x.sum() for x in results), mu_product))
    # The tolerance is for a dozen operations in float64.
    torch.testing.assert_close(*derivatives, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_with_respect_to_everything_at_once(name: str) -> None:
    def results(
        p: torch.Tensor,
        lr: torch.Tensor,
        decay: torch.Tensor,
        beta1: torch.Tensor,
        beta2: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        options = {"lr": lr, "weight_decay": decay, "betas": (beta1, beta2)}
        return train(name, p, OPTIONS | options)

    start = normal((SIZE,), torch.float64, 0).requires_grad_()
    assert_differentiable(results, start, *map(scalar, (0.1, 0.2, 0.9, 0.99)))


@every_variant
def test_the_values_are_those_of_a_plain_step(name: str, form: dict[str, Any]) -> None:
    """The tolerance is the roundings of all steps, fewer than 20 in each, with their growth.

    Under autograd torch computes the root, which may be one unit off. The error acts on all later
    gradients: the slope's derivative is at most 3, that of an L2 decay 0.1, the learning rate is
    0.1, and gradients are not divided by less than 1. So in 8 steps an error grows to at most
    1.31 ** 8 < 9 times its size.
    """
    start = normal((SIZE,), torch.float64, 0)
    plain = train(name, start, OPTIONS | form, differentiable=False)
    differentiable = train(name, start.clone().requires_grad_(), OPTIONS | form)
    assert set(differentiable) == set(plain)
    for key, wanted in plain.items():
        error = (differentiable[key] - wanted).abs().max()
        assert error <= 9 * 20 * STEPS * U * wanted.abs().max().clamp(min=1), key


@every_optimizer
def test_a_plain_step_is_not_seen_by_autograd(name: str) -> None:
    results = train(name, torch.ones(SIZE, dtype=torch.float64), OPTIONS, differentiable=False)
    assert not any(x.grad_fn for x in results.values())


@every_optimizer
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_no_other_backend_may_be_asked_for(name: str, flag: str) -> None:
    with pytest.raises(RuntimeError, match=f"`{flag}` does not support `differentiable`"):
        OPTIMIZERS[name].ours([torch.ones(SIZE)], differentiable=True, **{flag: True})


@every_optimizer
def test_a_step_count_that_requires_a_gradient_is_refused(name: str) -> None:
    p = torch.ones(SIZE, requires_grad=True).clone()
    p.retain_grad()
    optimizer = OPTIMIZERS[name].ours([p], differentiable=True)
    p.grad = torch.ones(SIZE)
    optimizer.step()
    optimizer.state[p]["step"].requires_grad_()
    p.grad = torch.ones(SIZE)
    with pytest.raises(RuntimeError, match="`requires_grad` is not supported for `step`"):
        optimizer.step()

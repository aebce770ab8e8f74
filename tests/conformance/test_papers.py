"""The rules follow the papers.

Oracle: each paper's algorithm, transcribed here in Python floats. Where torch.optim, and so this
library, computes something else, a comment on that line says so.

The tolerance: both sides round in float64. In each step the parameter and the update each have
fewer than `ROUNDINGS` roundings, relative to their own size. The averages keep their errors, so the
update of step t may have t times as many.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.conformance.table import BACKENDS, FAST, OPTIMIZERS, forced, normal

STEPS = 60
SIZE = 5
#: The roundings of a step. test_torch_database.py counts 42 for both sides, with the coarser torch.
ROUNDINGS = 42
#: Half a unit in the last place of 1.
U = 2.0**-53

Gradients = Iterator[float]


def adagrad(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Duchi, Hazan and Singer 2011, Figure 1: diagonal matrix, X all space, phi = 0."""
    total = h["initial_accumulator_value"]  # the paper's sum begins at 0
    for t, g in enumerate(gradients, 1):
        g = g + h["weight_decay"] * p  # not in the paper
        eta = h["lr"] / (1 + (t - 1) * h["lr_decay"])  # constant in the paper
        total = total + g**2
        p = p - eta * g / (h["eps"] + math.sqrt(total))
        yield p


def adam(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Kingma and Ba 2015, Algorithm 1."""
    beta1, beta2 = h["betas"]
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        g = g + h["weight_decay"] * p  # not in the paper
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        p = p - h["lr"] * m_hat / (math.sqrt(v_hat) + h["eps"])
        yield p


def amsgrad(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Reddi, Kale and Kumar 2018, Algorithm 2, with X all space and a constant alpha."""
    beta1, beta2 = h["betas"]
    m = v = v_max = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        v_max = max(v_max, v)  # of the v that is not corrected, as in the paper
        m_hat = m / (1 - beta1**t)  # not corrected in the paper
        v_hat = v_max / (1 - beta2**t)  # not corrected in the paper
        p = p - h["lr"] * m_hat / (math.sqrt(v_hat) + h["eps"])  # no eps in the paper
        yield p


def adamw(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Loshchilov and Hutter 2019, Algorithm 2, with eta_t = 1."""
    beta1, beta2 = h["betas"]
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        decay = h["lr"] * h["weight_decay"]  # the paper's lambda alone, without alpha
        p = p - (h["lr"] * m_hat / (math.sqrt(v_hat) + h["eps"]) + decay * p)
        yield p


def nadam(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Dozat 2016, Algorithm 2, with the schedule of mu that section 3 proposes."""
    beta1, beta2 = h["betas"]
    m = v = 0.0
    product = 1.0
    for t, g in enumerate(gradients, 1):
        g = g + h["weight_decay"] * p  # not in the paper
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * h["momentum_decay"]))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * h["momentum_decay"]))
        product = float32(product * float32(mu))  # kept in float32 by torch.optim
        m = beta1 * m + (1 - beta1) * g  # mu_t for beta1 in the paper
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
        v_hat = v / (1 - beta2**t)  # nu v / (1 - nu^t) in the paper, one factor too many
        p = p - h["lr"] * m_hat / (math.sqrt(v_hat) + h["eps"])
        yield p


def radam(p: float, gradients: Gradients, h: dict[str, Any]) -> Iterator[float]:
    """Run Liu et al. 2020, Algorithm 2."""
    beta1, beta2 = h["betas"]
    m = v = 0.0
    rho_inf = 2 / (1 - beta2) - 1
    for t, g in enumerate(gradients, 1):
        g = g + h["weight_decay"] * p  # not in the algorithm
        v = beta2 * v + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * g
        m_hat = m / (1 - beta1**t)
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:  # 4 in the paper
            length = math.sqrt(1 - beta2**t) / (math.sqrt(v) + h["eps"])  # no eps in the paper
            r = math.sqrt(((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho))
            p = p - h["lr"] * r * m_hat * length
        else:
            p = p - h["lr"] * m_hat
        yield p


def float32(x: float) -> float:
    """Round a Python float to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


Algorithm = Callable[[float, Gradients, dict[str, Any]], Iterator[float]]

OF_ADAM: dict[str, dict[str, Any]] = {
    "usual": {},
    "weight-decay": {"weight_decay": 0.1},
    "fast": {"lr": 0.1, "betas": (0.5, 0.7)},
    "long-memory": {"lr": 0.01, "betas": (0.99, 0.9999)},
    "large-eps": {"lr": 0.1, "eps": 1.0},
    "no-momentum": {"lr": 0.01, "betas": (0.0, 0.999)},
    "no-memory": {"lr": 0.01, "betas": (0.9, 0.0)},
    "neither": {"lr": 0.01, "betas": (0.0, 0.0), "weight_decay": 0.1},
}
OF_ADAGRAD: dict[str, dict[str, Any]] = {
    "usual": {},
    "weight-decay": {"weight_decay": 0.1},
    "lr-decay": {"lr": 0.1, "lr_decay": 0.3},
    "from-above-zero": {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
}
NEVER_RECTIFIED = {
    "never-rectified": {"lr": 0.01, "betas": (0.9, 0.5)},
    "never-rectified-at-the-bound": {"lr": 0.01, "betas": (0.9, 2 / 3)},
}
SCHEDULES = {
    "no-momentum-schedule": {"momentum_decay": 0.0},
    "steep-momentum-schedule": {"lr": 0.01, "momentum_decay": 0.5, "weight_decay": 0.1},
}
WITHOUT_L2 = {key: {**h, "weight_decay": 0.0} for key, h in OF_ADAM.items()}

#: By id: paper, optimizer, options that choose the paper's form, other options.
CASES: dict[str, tuple[Algorithm, str, dict[str, Any], dict[str, Any]]] = {
    f"{paper.__name__}-{key}": (paper, name, form, h)
    for paper, name, form, options in (
        (adagrad, "Adagrad", {}, OF_ADAGRAD),
        (adam, "Adam", {}, OF_ADAM),
        (amsgrad, "Adam", {"amsgrad": True}, WITHOUT_L2),
        (adamw, "AdamW", {}, OF_ADAM),
        (nadam, "NAdam", {}, OF_ADAM | SCHEDULES),
        (radam, "RAdam", {}, OF_ADAM | NEVER_RECTIFIED),
    )
    for key, h in options.items()
}


def assert_follows(
    paper: Algorithm,
    name: str,
    options: dict[str, Any],
    backend: str,
    initial: Sequence[float],
    gradients: Sequence[Sequence[float]],
) -> None:
    """Compare the parameter after every step with the paper's result for each element."""
    p = torch.nn.Parameter(torch.tensor(initial, dtype=torch.float64))
    optimizer = OPTIMIZERS[name].ours([p], **options)
    h = optimizer.param_groups[0]
    papers = [
        paper(start, iter(element_gradients), h)
        for start, element_gradients in zip(initial, zip(*gradients, strict=True), strict=True)
    ]
    size = largest_update = 0.0
    before = list(initial)
    for step, (g, wanted) in enumerate(zip(gradients, zip(*papers, strict=True), strict=True), 1):
        p.grad = torch.tensor(g, dtype=torch.float64)
        with forced(backend):
            optimizer.step()
        size = max(size, *map(abs, before), *map(abs, wanted))
        largest_update = max(largest_update, *(abs(x - y) for x, y in zip(wanted, before)))
        tolerance = step * 2 * U * size + step * (step + 1) / 2 * ROUNDINGS * U * largest_update
        for got, exact in zip(p.tolist(), wanted, strict=True):
            assert abs(got - exact) <= tolerance, f"step {step}: {got} instead of {exact}"
        before = list(wanted)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("paper", "name", "form", "h"), CASES.values(), ids=CASES)
def test_a_rule_follows_its_paper(
    paper: Algorithm, name: str, form: dict[str, Any], h: dict[str, Any], backend: str
) -> None:
    initial = normal((SIZE,), torch.float64, 0).tolist()
    gradients = normal((STEPS, SIZE), torch.float64, 1).tolist()
    assert_follows(paper, name, form | h, backend, initial, gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("paper", "name", "form"),
    [
        (adagrad, "Adagrad", {}),
        (adam, "Adam", {}),
        (amsgrad, "Adam", {"amsgrad": True}),
        (adamw, "AdamW", {}),
        (nadam, "NAdam", {}),
        (radam, "RAdam", {}),
    ],
    ids=["adagrad", "adam", "amsgrad", "adamw", "nadam", "radam"],
)
def test_maximize_follows_the_paper_uphill(
    paper: Algorithm, name: str, form: dict[str, Any], backend: str
) -> None:
    """Oracle: the paper with negated gradients."""
    initial = normal((SIZE,), torch.float64, 2).tolist()
    gradients = normal((STEPS, SIZE), torch.float64, 3)

    def downhill(p: float, g: Gradients, h: dict[str, Any]) -> Iterator[float]:
        return paper(p, (-x for x in g), h)

    options = form | {"maximize": True}
    assert_follows(downhill, name, options, backend, initial, gradients.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_radam_without_eps_stays_a_number_where_gradients_are_zero(backend: str) -> None:
    """Unrectified steps do not divide, so they must not compute 0 / 0."""
    gradients = [[0.0, 1.0]] * 5
    assert_follows(radam, "RAdam", {"lr": 0.1, "eps": 0.0}, backend, [1.0, 1.0], gradients)


def test_radam_rectifies_from_its_sixth_step_and_not_before() -> None:
    """An eps far above every root nearly stops the steps that divide."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = OPTIMIZERS["RAdam"].ours([p], lr=0.5, eps=1e6)
    moved = []
    for _ in range(8):
        before = p.item()
        p.grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
        moved.append(abs(p.item() - before) > 0.1)
    assert moved == [True] * 5 + [False] * 3


def test_adamw_decays_decoupled_and_adam_does_not() -> None:
    """With a gradient of 0 only a decoupled decay changes p. An L2 decay acts as a gradient."""
    for name, form, wanted in (
        ("AdamW", {}, 1 - 0.25 * 0.5),
        ("Adam", {"decoupled_weight_decay": True}, 1 - 0.25 * 0.5),
        ("NAdam", {"decoupled_weight_decay": True}, 1 - 0.25 * 0.5),
        ("RAdam", {"decoupled_weight_decay": True}, 1 - 0.25 * 0.5),
        ("Adam", {"eps": 0.0}, 1 - 0.25),
    ):
        p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = OPTIMIZERS[name].ours([p], lr=0.25, weight_decay=0.5, **form)
        p.grad = torch.zeros((), dtype=torch.float64)
        optimizer.step()
        assert abs(p.item() - wanted) <= 4 * U, name  # decay, product and sum, all below 1

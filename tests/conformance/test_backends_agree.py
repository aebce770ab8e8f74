"""Every backend gives the same bits as the reference.

Oracle: the reference backend on the same parameters and gradients. No tolerance: all backends
evaluate one graph, operation by operation, with correct rounding.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import stepforge
from stepforge.declare import NonNegative, zeros
from stepforge.ops import where
from tests.conformance.table import (
    BACKENDS,
    DTYPES,
    FAST,
    OPTIMIZERS,
    VARIANTS,
    assert_same_bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    parameter,
    run,
)

INF, NAN = float("inf"), float("nan")

#: Options of the three groups of a run, besides those of the variant. The betas are on both sides
#: of one half, where `ema` changes its form. An eps of 0 divides by 0 where gradients are 0.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "Adagrad": [
        {"lr": 1e-2},
        {"lr": 3e-1, "lr_decay": 0.5, "eps": 0.0},
        {"lr": 1e30, "eps": 1e-30, "initial_accumulator_value": 0.1},
    ],
    "NAdam": [
        {"lr": 1e-3},
        {"lr": 3e-1, "betas": (0.25, 0.4), "eps": 0.0, "momentum_decay": 0.5},
        {"lr": 1e30, "betas": (0.0, 0.0), "eps": 1e-30},
    ],
}
GROUPS |= {
    name: [
        {"lr": 1e-3},
        {"lr": 3e-1, "betas": (0.25, 0.4), "eps": 0.0},
        {"lr": 1e30, "betas": (0.0, 0.0), "eps": 1e-30},
    ]
    for name in ("Adam", "AdamW", "RAdam")
}

SHAPES = [(257,), (7, 5), (), (0, 3)]
STEPS = 8  # RAdam's form changes at its sixth


def gradient(
    distribution: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Return a gradient. A third of an extreme one's elements meet infinities and NaNs in turn."""
    if distribution == "normal":
        return normal(shape, dtype, seed)
    values = extreme(shape, dtype, seed)
    if values.dim():
        values[::9], values[1::9], values[2::9] = (INF, -INF, NAN)
        values[3::9].mul_((INF, 1.0, NAN, 1.0)[seed // 1000 % 4])  # 0 * INF is one more NaN
    return values


def missing(step: int, index: int) -> bool:
    """Return True for every third parameter in every third step: it has no gradient then."""
    return index % 3 == 1 and step % 3 == 1


@functools.lru_cache(maxsize=8)  # every other backend is compared with the same reference
def outcomes(
    backend: str, variant: str, dtype: torch.dtype, distribution: str
) -> list[dict[str, torch.Tensor]]:
    """Return every parameter with its states after every step."""
    name, options = VARIANTS[variant]
    values = normal if distribution == "normal" else extreme
    groups, found = [], []
    for group_index, group_options in enumerate(GROUPS[name]):
        params = [
            parameter(values(shape, dtype, 100 * group_index + index))
            for index, shape in enumerate(SHAPES)
        ]
        groups.append({"params": params, **group_options})
    parameters = [p for group in groups for p in group["params"]]
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours(groups, **options)
        for step in range(STEPS):
            gradients = [
                None
                if missing(step, index)
                else gradient(distribution, tuple(p.shape), dtype, 1000 * step + index)
                for index, p in enumerate(parameters)
            ]
            run(optimizer, parameters, [gradients])
            found += [
                {key: contiguous(tensor) for key, tensor in outcome(optimizer, p).items()}
                for p in parameters
            ]
    return found


#: The last variant of each rule, the one with all options on.
LAST = {name: variant for variant, (name, _) in VARIANTS.items()}


def compared_backends(distribution: str, variant: str, dtype: str) -> list[str]:
    """Return the backends to compare: Triton once for each variant, and each dtype of a rule."""
    others = [name for name in FAST if name != "reference"]
    sampled = distribution == "extreme" and (dtype == "float32" or variant in LAST.values())
    return [*others, "triton"] if sampled and "triton" in BACKENDS else others


CASES = [
    (*case, backend)
    for case in itertools.product(["normal", "extreme"], VARIANTS, DTYPES)
    for backend in compared_backends(*case)
]


@pytest.mark.parametrize(("distribution", "variant", "dtype", "backend"), CASES)
def test_a_backend_stores_the_bits_of_the_reference(
    distribution: str, variant: str, dtype: str, backend: str
) -> None:
    found = outcomes(backend, variant, DTYPES[dtype], distribution)
    wanted = outcomes("reference", variant, DTYPES[dtype], distribution)
    count = len(SHAPES) * len(GROUPS[VARIANTS[variant][0]])
    for index, (got, oracle) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(got, oracle, f"step {index // count + 1}, parameter {index % count}:")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_inputs_above_reach_the_corners_they_are_meant_for(name: str) -> None:
    values = torch.cat([extreme((257,), torch.float32, seed) for seed in range(4)])
    magnitudes = values[values != 0].abs()
    assert (values == 0).any()
    assert magnitudes.min() < torch.finfo(torch.float32).smallest_normal
    assert magnitudes.max() > 1e38
    results = outcomes("reference", f"{name}-plain", torch.float32, "extreme")
    assert any(tensor.isnan().any() for result in results for tensor in result.values())
    assert any(tensor.isinf().any() for result in results for tensor in result.values())
    steps = {float(result["step"]) for result in results[-len(SHAPES) :] if "step" in result}
    assert len(steps) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_choice_between_two_numbers(dtype: torch.dtype) -> None:
    """Python numbers take the dtype of the arithmetic, not torch's default dtype."""

    def rule(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p * where(g > 0, 1.2, h.other)

    class Chooser(stepforge.Optimizer, rule=rule):
        other: NonNegative = 0.1

    for backend in BACKENDS:
        p = torch.nn.Parameter(torch.linspace(-3, 3, 999, dtype=torch.float64).to(dtype))
        p.grad = torch.linspace(1, -1, 999, dtype=torch.float64).to(dtype)
        with forced(backend):
            Chooser([p]).step()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.linspace(-3, 3, 999, dtype=torch.float64).to(dtype).to(wide)
        factors = torch.tensor([0.1, 1.2], dtype=wide)[(p.grad > 0).long()]
        assert torch.equal(p.detach(), (values * factors).to(dtype)), backend


#: Names that generated code uses for variables of its own.
AWKWARD = ("c", "i", "at", "count", "row", "block", "left", "tl", "lane", "int", "number", "x0")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_state_may_have_any_name(backend: str) -> None:
    letters, new = ", ".join(AWKWARD), ", ".join(f"{letter} + g" for letter in AWKWARD)
    scope: dict[str, Any] = {}
    exec(
        f"def rule(h, t, p, g, {letters}):\n"
        f"    return p - h.lr * g * ({' + '.join(AWKWARD)}), {new}",
        scope,
    )
    states = {letter: zeros(f"state_{letter}") for letter in AWKWARD}
    body = {"__annotations__": {"lr": NonNegative}, "lr": 0.1, **states}
    cls = type("Awkward", (stepforge.Optimizer,), body, rule=scope["rule"])
    results = []
    for name in ("reference", backend):
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = cls([p])
        with forced(name):
            for _ in range(3):
                p.grad = torch.full((5,), 0.5)
                optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(5))

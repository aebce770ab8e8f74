"""Unusual tensors and contexts, which torch.optim supports too.

Oracle: the same values in plain tensors, or outside of the context, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import stepforge
from tests.twins import assert_identical

FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
SHAPE = (64, 64)


def normal(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(optimizer: stepforge.Optimizer, p: torch.Tensor) -> list[torch.Tensor]:
    """Return copies of a parameter and its states."""
    return [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]


@every_flag
def test_a_negative_view_is_a_parameter_like_any_other(flags: dict[str, Any]) -> None:
    negated = torch.nn.Parameter(torch._neg_view(-normal(0)))
    plain = torch.nn.Parameter(normal(0))
    assert negated.is_neg()
    results = []
    for p in (negated, plain):
        optimizer = stepforge.NAdam([p], **flags)
        for step in range(3):
            p.grad = normal(1 + step)
            optimizer.step()
        results.append([x.resolve_neg() for x in outcome(optimizer, p)])
    assert_identical(*results)


@every_flag
@pytest.mark.parametrize("first", [0, 1], ids=["at first", "in between"])
def test_zeros_without_memory_are_a_gradient(flags: dict[str, Any], first: int) -> None:
    results = []
    for zeros in (torch._efficientzerotensor(SHAPE), torch.zeros(SHAPE)):
        p = torch.nn.Parameter(normal(0))
        optimizer = stepforge.AdamW([p], **flags)
        for step in range(5):
            p.grad = zeros if (step + first) % 2 == 0 else normal(step)
            optimizer.step()
        results.append(outcome(optimizer, p))
    assert_identical(*results)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_format": "int8"}),
        (torch.bfloat16, {"master_weight_bits": 24}),
        (torch.bfloat16, {"stochastic_rounding": True, "state_format": "int8"}),
    ],
    ids=["float32", "int8", "24 bits", "stochastic"],
)
@every_flag
@pytest.mark.parametrize("cls", [stepforge.Adagrad, stepforge.NAdam])
def test_the_default_device_changes_nothing(
    cls: Any, flags: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """First steps, steps with a gradient scale, and loads, within ``torch.device("meta")``."""
    results = []
    for context in (torch.device("meta"), contextlib.nullcontext()):
        p = torch.nn.Parameter(normal(0, dtype))
        p.grad = normal(1, dtype)
        with context:
            optimizer = cls([p], **options, **flags)
            optimizer.step()
            optimizer.grad_scale = torch.full((), 4.0, device="cpu")
            optimizer.found_inf = torch.zeros((), device="cpu")
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        results.append(outcome(optimizer, p))
    assert_identical(*results)


@pytest.mark.parametrize("cls", [stepforge.Adagrad, stepforge.AdamW, stepforge.NAdam])
def test_fused_and_capturable_on_a_cpu_run_the_native_kernel(cls: Any) -> None:
    """Oracle: the for-loop, which has its scalars on the device too."""
    results = []
    for options in ({"fused": True}, {"foreach": False}):
        p = torch.nn.Parameter(normal(0))
        optimizer = cls([p], capturable=True, **options)
        for step in range(4):
            p.grad = normal(1 + step)
            optimizer.step()
        backends = [served.backend for served in stepforge.explain(optimizer).served]
        assert backends == ["native" if "fused" in options else "reference"]
        results.append(outcome(optimizer, p))
    assert_identical(*results)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
def test_a_plan_is_kept_under_a_default_dtype_of_float64(options: dict[str, Any]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(normal(0))
        p.grad = normal(1)
        optimizer = stepforge.NAdam([p], **options)
        optimizer.step()
        plan = optimizer._stepper.plans.latest
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert plan is not None
    assert optimizer._stepper.plans.latest is plan


@pytest.mark.parametrize("step", [torch.tensor(3), torch.tensor(3.0), 3, 3.0], ids=repr)
def test_a_step_count_of_any_type_loads_as_a_float32_tensor(step: Any) -> None:
    results = []
    for given in (step, torch.tensor(3.0)):
        p = torch.nn.Parameter(normal(0))
        p.grad = normal(1)
        optimizer = stepforge.AdamW([p])
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = given
        optimizer.load_state_dict(saved)
        optimizer.step()
        results.append(outcome(optimizer, p))
    assert_identical(*results)

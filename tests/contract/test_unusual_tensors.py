"""Tensors and contexts that few programs have, in which torch.optim steps too.

Oracle: the same numbers in plain tensors, or outside of the context, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import stepforge
from tests.twins import assert_identical

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
every_way = pytest.mark.parametrize("way", WAYS)
SHAPE = (64, 64)


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def held(optimizer: stepforge.Optimizer, p: torch.Tensor) -> list[torch.Tensor]:
    return [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]


@every_way
def test_a_negative_view_is_a_parameter_like_any_other(way: str) -> None:
    negated = torch.nn.Parameter(torch._neg_view(-numbers(0)))
    plain = torch.nn.Parameter(numbers(0))
    assert negated.is_neg()
    found = []
    for p in (negated, plain):
        optimizer = stepforge.NAdam([p], **WAYS[way])
        for step in range(3):
            p.grad = numbers(1 + step)
            optimizer.step()
        found.append([x.resolve_neg() for x in held(optimizer, p)])
    assert_identical(*found)


@every_way
@pytest.mark.parametrize("first", [0, 1], ids=["at first", "in between"])
def test_zeros_that_autograd_has_nowhere_in_memory_are_a_gradient(way: str, first: int) -> None:
    nowhere = torch._efficientzerotensor(SHAPE)
    found = []
    for zeros in (nowhere, torch.zeros(SHAPE)):
        p = torch.nn.Parameter(numbers(0))
        optimizer = stepforge.AdamW([p], **WAYS[way])
        for step in range(5):
            p.grad = zeros if (step + first) % 2 == 0 else numbers(step)
            optimizer.step()
        found.append(held(optimizer, p))
    assert_identical(*found)


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
@every_way
@pytest.mark.parametrize("cls", [stepforge.Adagrad, stepforge.NAdam])
def test_the_default_device_is_of_no_matter(
    cls: Any, way: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """First steps, steps with a loss scale and loads, as within ``torch.device("meta")``."""
    found = []
    for context in (torch.device("meta"), contextlib.nullcontext()):
        p = torch.nn.Parameter(numbers(0, dtype))
        p.grad = numbers(1, dtype)
        with context:
            optimizer = cls([p], **options, **WAYS[way])
            optimizer.step()
            optimizer.grad_scale = torch.full((), 4.0, device="cpu")
            optimizer.found_inf = torch.zeros((), device="cpu")
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        found.append(held(optimizer, p))
    assert_identical(*found)


@pytest.mark.parametrize("cls", [stepforge.Adagrad, stepforge.AdamW, stepforge.NAdam])
def test_fused_and_capturable_on_a_cpu_run_the_native_kernel(cls: Any) -> None:
    """Oracle: the for-loop, whose numbers are on the device as well."""
    found = []
    for options in ({"fused": True}, {"foreach": False}):
        p = torch.nn.Parameter(numbers(0))
        optimizer = cls([p], capturable=True, **options)
        for step in range(4):
            p.grad = numbers(1 + step)
            optimizer.step()
        backends = [served.backend for served in stepforge.explain(optimizer).served]
        assert backends == ["native" if "fused" in options else "reference"]
        found.append(held(optimizer, p))
    assert_identical(*found)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["default", "fused"])
def test_a_plan_is_kept_under_a_default_dtype_of_float64(options: dict[str, Any]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        p = torch.nn.Parameter(numbers(0))
        p.grad = numbers(1)
        optimizer = stepforge.NAdam([p], **options)
        optimizer.step()
        made = optimizer._stepper.plan
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert made is not None
    assert optimizer._stepper.plan is made


@pytest.mark.parametrize("step", [torch.tensor(3), torch.tensor(3.0), 3, 3.0], ids=repr)
def test_a_step_number_of_any_kind_is_loaded_as_torch_writes_it(step: Any) -> None:
    found = []
    for given in (step, torch.tensor(3.0)):
        p = torch.nn.Parameter(numbers(0))
        p.grad = numbers(1)
        optimizer = stepforge.AdamW([p])
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = given
        optimizer.load_state_dict(saved)
        optimizer.step()
        found.append(held(optimizer, p))
    assert_identical(*found)

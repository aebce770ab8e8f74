"""A kept plan is never stale. Oracle: an optimizer that makes a new plan in every step.

Each mutation happens between steps, to an optimizer with a kept plan and to its twin, which makes
new plans. Both must have the same bits from then on. All tests run with the guards in Python and
with those in C++.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from tests.step.mutations import (
    MUTATIONS,
    OPTIMIZERS,
    built,
    clear_state,
    first_state,
    gradient_missing,
    params_of,
    replace_state_tensor,
    set_gradients,
    state_loaded,
)


@pytest.fixture(autouse=True, params=["python", "cpp"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEPFORGE_GUARDS", request.param)
    return str(request.param)


#: Every backend, and both kinds of guards. What guards see does not depend on the backend.
WAYS = [("native", "python"), ("native", "cpp"), ("foreach", "cpp"), ("reference", "python")]


def history(
    optimizer: stepforge.Optimizer, mutate: Callable[[stepforge.Optimizer], None], keep: bool
) -> list[torch.Tensor]:
    """Return all parameters and states after each of a few steps around a mutation."""
    seen = []
    for step in range(7):
        if step == 3:
            mutate(optimizer)
        set_gradients(optimizer, step)
        if step >= 3 and mutate is gradient_missing:
            params_of(optimizer)[2].grad = None
        if not keep:
            optimizer._stepper.plans.clear()
        optimizer.step()
        for p in params_of(optimizer):
            seen.append(p.detach().clone())
            seen.extend(x.clone() for x in optimizer.state[p].values())
    return seen


@pytest.mark.parametrize(("backend", "guards"), WAYS, indirect=["guards"])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_kept_plan_is_as_good_as_a_new_one(
    cls: type[stepforge.Optimizer],
    mutate: Callable[[stepforge.Optimizer], None],
    backend: str,
) -> None:
    with_kept_plan = history(built(cls, backend), mutate, keep=True)
    with_new_plans = history(built(cls, "reference"), mutate, keep=False)
    assert len(with_kept_plan) == len(with_new_plans)
    for index, (one, other) in enumerate(zip(with_kept_plan, with_new_plans)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), f"tensor {index} differs"


def in_other_layouts(g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same gradient in other layouts, at other offsets and of other types."""
    double = torch.empty(*g.shape[:-1], 2 * g.shape[-1])[..., ::2]
    return {
        "parameter": torch.nn.Parameter(g.clone()),
        "of a graph": g.clone().requires_grad_() * 1,
        "transposed": g.t().contiguous().t(),
        "with gaps": double.copy_(g),
        "negated": torch._neg_view(-g),
        "shifted": torch.cat([torch.zeros(1), g.flatten()])[1:].view(g.shape),
    }


@pytest.mark.parametrize(
    "layout", ["transposed", "with gaps", "negated", "shifted", "parameter", "of a graph"]
)
def test_a_gradient_that_changes_its_layout(layout: str) -> None:
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(x) for x in torch.ones(2, 6, 5))
    optimizer, twin = stepforge.Adam([p]), stepforge.Adam([q], foreach=False)
    for step in range(6):
        g = torch.randn(6, 5)
        p.grad, q.grad = (in_other_layouts(g)[layout] if step % 3 == 2 else g), g.clone()
        optimizer.step()
        twin.step()
        assert torch.equal(p, q), f"step {step}"


def test_a_gradient_of_another_shape_in_the_same_memory() -> None:
    """A gradient is freed, and its memory becomes that of another: the address tells nothing."""
    torch.manual_seed(0)
    memory = torch.zeros(30)
    p, q = (torch.nn.Parameter(x) for x in torch.ones(2, 6, 5))
    optimizer, twin = stepforge.Adam([p]), stepforge.Adam([q], foreach=False)
    for step in range(6):
        g = torch.randn(6, 5)
        stored = memory.view(5, 6).t() if step % 3 == 2 else memory.view(6, 5)
        p.grad, q.grad = stored.copy_(g), g
        optimizer.step()
        twin.step()
        assert torch.equal(p, q), f"step {step}"


def test_a_parameter_of_another_shape_in_the_same_memory() -> None:
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(x) for x in torch.ones(2, 6, 5))
    optimizer, twin = stepforge.Adam([p]), stepforge.Adam([q], foreach=False)
    for step in range(6):
        if step == 3:
            for x in (p, q, *optimizer.state[p].values(), *twin.state[q].values()):
                if x.dim():
                    x.data = x.data.view(-1)[:20].view(4, 5)
            p.grad = q.grad = None
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        assert torch.equal(p, q), f"step {step}"


def test_a_gradient_that_shares_memory_with_a_parameter() -> None:
    """Oracle: the reference, which reads and writes in a defined order."""
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(x) for x in torch.ones(2, 6, 5))
    optimizer, twin = stepforge.Adam([p]), stepforge.Adam([q], foreach=False)
    for step in range(6):
        g = torch.randn(6, 5)
        is_shared = step in (3, 4)
        p.grad, q.grad = (p.detach(), q.detach()) if is_shared else (g, g.clone())
        optimizer.step()
        twin.step()
        assert torch.equal(p, q), f"step {step}"


def test_a_plan_is_kept_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = built(stepforge.AdamW, "native")
    set_gradients(optimizer, 0)
    optimizer.step()
    plan = optimizer._stepper.plans.latest
    for step in range(3):
        set_gradients(optimizer, step)
        optimizer.param_groups[0]["lr"] = 0.1 * step
        optimizer.step()
    assert optimizer._stepper.plans.latest is plan


def test_the_layout_check_without_torchs_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepforge.step import guards

    x = torch.zeros(3, 4)
    monkeypatch.setitem(__import__("sys").modules, "torch._C._dynamo.guards", None)
    same = guards._layout_check([x])
    assert same(torch.ones(3, 4))
    assert not same(torch.ones(4, 3).t())
    assert not same(torch.ones(3, 5))
    assert not same(x.double())
    assert not same(torch._neg_view(x))


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_a_kept_plan_keeps_no_gradient(backend: str) -> None:
    optimizer = built(stepforge.AdamW, backend)
    for step in range(3):
        set_gradients(optimizer, step)
        gradients = [weakref.ref(p.grad) for p in params_of(optimizer)]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert all(gradient() is None for gradient in gradients), f"step {step}"


def states_of(optimizer: stepforge.Optimizer) -> list[weakref.ref[torch.Tensor]]:
    """Return weak references to the states with a value for every element."""
    states = [optimizer.state[p] for p in params_of(optimizer)]
    return [
        weakref.ref(x) for state in states for key, x in state.items() if key.startswith("exp_avg")
    ]


def stepped_with_a_plan(backend: str) -> stepforge.Optimizer:
    optimizer = built(stepforge.AdamW, backend)
    for seed in range(3):
        set_gradients(optimizer, seed)
        optimizer.step()
    assert optimizer._stepper.plans.latest is not None
    return optimizer


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
@pytest.mark.parametrize("forget", [clear_state, state_loaded], ids=lambda f: f.__name__)
def test_states_that_are_dropped_are_freed_at_once(backend: str, forget: Any) -> None:
    optimizer = stepped_with_a_plan(backend)
    states = states_of(optimizer)
    forget(optimizer)
    assert all(state() is None for state in states)


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_parameters_that_are_removed_are_freed_at_once(backend: str) -> None:
    optimizer = stepped_with_a_plan(backend)
    removed = [weakref.ref(p) for p in optimizer.param_groups[1]["params"]]
    for p in optimizer.param_groups.pop()["params"]:
        del optimizer.state[p]
    del p
    assert all(p() is None for p in removed)


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_a_replaced_state_is_freed_at_once(backend: str) -> None:
    optimizer = stepped_with_a_plan(backend)
    state, name = first_state(optimizer)
    old = weakref.ref(state[name])
    replace_state_tensor(optimizer)
    assert old() is None

"""Plans are kept by the set of parameters that have a gradient, as in a mixture of experts.

Oracles: the number of plans that are built; an optimizer that makes a new plan in every step; and
one whose every step is the reference's.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.rules import ALL
from stepforge.step import kept_plans
from stepforge.step.plan import Plan
from tests.conformance.table import forced
from tests.step.mutations import (
    MUTATIONS,
    OPTIMIZERS,
    all_halved,
    built,
    first_state,
    gradient_missing,
    memory_resized,
    params_of,
    set_gradients,
)
from tests.twins import assert_identical, snapshot

#: Every backend, and both kinds of guards. What guards see does not depend on the backend.
WAYS = [("native", "python"), ("native", "cpp"), ("foreach", "cpp"), ("reference", "python")]
interpreted = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")
ALL_WAYS = [*WAYS, pytest.param("triton", "cpp", marks=interpreted)]

#: The parameters that are trained in every step; and those of each expert.
SHARED, EXPERT = [(5,), (2, 3)], [(7,), (3, 2), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float32]
#: Plans that are kept at most.
MOST = 8


def mixture(cls: type[stepforge.Optimizer], experts: int, **options: Any) -> stepforge.Optimizer:
    """Return an optimizer of shared parameters, then experts, which are param groups."""
    generator = torch.Generator().manual_seed(0)

    def params(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        return [torch.nn.Parameter(x.to(dtype)) for x, dtype in zip(values, DTYPES)]

    groups = [{"params": params(SHARED)}]
    groups += [{"params": params(EXPERT), "weight_decay": 0.1 * i} for i in range(experts)]
    return cls(groups, lr=0.05, **options)


def give(optimizer: stepforge.Optimizer, step: int, experts: Sequence[int]) -> None:
    """Set the gradients of the shared parameters and of some experts; the others have none."""
    set_gradients(optimizer, step)
    for index, group in enumerate(optimizer.param_groups[1:]):
        if index not in experts:
            for p in group["params"]:
                p.grad = None


@pytest.fixture
def plans_built(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Plan]]:
    """Return a list of all plans that are built from now on."""
    plans: list[weakref.ref[Plan]] = []
    build = Plan.build.__func__  # type: ignore[attr-defined]

    def spy(cls: type[Plan], *args: Any, **options: Any) -> Any:
        plan, launches = build(cls, *args, **options)
        plans.append(weakref.ref(plan))
        return plan, launches

    monkeypatch.setattr(Plan, "build", classmethod(spy))
    return plans


def versions(optimizer: stepforge.Optimizer) -> list[int]:
    """Return the versions of all parameters and states; not of step counts and scalar states."""
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    of_elements = [x for x in tensors if x._base is None]
    return [x._version for x in [*params_of(optimizer), *of_elements]]


@pytest.mark.parametrize("count", [2, MOST])
@pytest.mark.parametrize(
    ("cls", "backend", "guards"),
    [
        *((cls, *way) for cls in ALL.values() for way in WAYS),
        # Its interpreter takes seconds; this one has a scalar state.
        pytest.param(ALL["NAdam"], "triton", "cpp", marks=interpreted),
    ],
)
def test_sets_that_take_turns_build_no_plan_once_each_was_seen(
    cls: type[stepforge.Optimizer],
    backend: str,
    guards: str,
    count: int,
    plans_built: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    monkeypatch.setenv("STEPFORGE_GUARDS", guards)
    kept, forgetful, reference = (mixture(cls, count) for _ in range(3))
    steps = [0] * count
    # RAdam changes its form at the sixth step.
    for step in range(3 * count if count > 2 else 14):
        expert = step % count if step % 7 else 0
        active = [expert] if step % 2 else [expert, (expert + 1) % count]
        if count == 2:
            active = [expert]
        for optimizer in (kept, forgetful, reference):
            give(optimizer, step, active)
        before = len(plans_built)
        kept.step()
        assert len(plans_built) <= before + 1
        forgetful._stepper.plans.clear()
        forgetful.step()
        with forced("reference"):
            reference.step()
        for each in active:
            steps[each] += 1
        assert_identical(snapshot(kept), snapshot(forgetful))
        assert_identical(snapshot(kept), snapshot(reference))
        assert versions(kept) == versions(forgetful)
    assert_identical(kept.state_dict(), forgetful.state_dict())
    for index, group in enumerate(kept.param_groups[1:]):
        found = {float(kept.state[p]["step"]) for p in group["params"] if p in kept.state}
        assert found <= {steps[index]}

    turns = [[expert] for expert in range(count)]
    for step, active in enumerate([*turns, *turns, *turns[::-1]]):
        if step == count:
            plans_built.clear()
        give(kept, step, active)
        kept.step()
        assert kept._stepper.plans.latest is not None
    assert not plans_built


#: Some of the parameters of ``built``, in turn.
SETS = [(0, 1, 2), (0, 3, 4), (1, 2, 3, 4)]


def history(
    optimizer: stepforge.Optimizer, mutate: Callable[[stepforge.Optimizer], None], keep: bool
) -> list[torch.Tensor]:
    """Return all parameters and states after each of many steps around a few mutations."""
    seen = []
    for step in range(16):
        if step in ((6,) if mutate is all_halved else (6, 10)):
            mutate(optimizer)
        set_gradients(optimizer, step)
        for index, p in enumerate(params_of(optimizer)):
            if index not in SETS[step % 3] or (mutate is gradient_missing and index == 2):
                p.grad = None
        if not keep:
            optimizer._stepper.plans.clear()
        optimizer.step()
        for p in params_of(optimizer):
            seen.append(p.detach().clone())
            seen.extend(x.clone() for x in optimizer.state.get(p, {}).values())
    return seen


@pytest.mark.parametrize(("backend", "guards"), WAYS)
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_plan_that_waited_is_as_good_as_a_new_one(
    cls: type[stepforge.Optimizer],
    mutate: Callable[[stepforge.Optimizer], None],
    backend: str,
    guards: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mutate is memory_resized and backend == "foreach":
        pytest.skip("numpy takes square roots of states there, and forbids to resize them")
    monkeypatch.setenv("STEPFORGE_GUARDS", guards)
    with_kept_plans = history(built(cls, backend), mutate, keep=True)
    with_new_plans = history(built(cls, "reference"), mutate, keep=False)
    for index, (one, other) in enumerate(zip(with_kept_plans, with_new_plans, strict=True)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), f"tensor {index} differs"


@pytest.mark.parametrize("guards", ["python", "cpp"])
def test_a_change_of_states_costs_each_set_one_plan(
    guards: str, plans_built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then sets that take turns build none again."""
    monkeypatch.setenv("STEPFORGE_GUARDS", guards)
    optimizer = mixture(stepforge.NAdam, 3)
    step = itertools.count()

    def turn() -> int:
        plans_built.clear()
        for expert in range(3):
            give(optimizer, next(step), [expert])
            optimizer.step()
        return len(plans_built)

    assert [turn(), turn()] == [3, 0]
    first_state(optimizer)[0]["step"] = torch.tensor(30.0)  # of a shared parameter
    assert [turn(), turn()] == [3, 0]
    p = optimizer.param_groups[2]["params"][0]
    optimizer.state[p]["exp_avg"] = torch.zeros_like(p)  # of an expert
    assert [turn(), turn()] == [1, 0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [turn(), turn()] == [3, 0]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert [turn(), turn()] == [3, 0]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert turn() == 0


def test_the_set_is_not_read_while_it_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = mixture(stepforge.AdamW, 2)
    for step in range(5):
        give(optimizer, step, [0])
        if step == 2:
            monkeypatch.setattr(kept_plans, "gradient_pattern", None)
        optimizer.step()


def test_gradients_that_come_back_find_their_plan_after_a_step_without_any(
    plans_built: list[Any],
) -> None:
    optimizer = mixture(stepforge.AdamW, 2)
    for step in range(6):
        give(optimizer, step, [step % 2])
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    # Two sets, and the empty one, which is not kept.
    assert len([plan for plan in plans_built if plan() is not None]) == 2


def test_the_set_that_was_not_used_for_longest_is_forgotten(plans_built: list[Any]) -> None:
    optimizer, twin = (mixture(stepforge.NAdam, MOST + 3) for _ in range(2))
    step = itertools.count()

    def plans_for(expert: int) -> int:
        plans_built.clear()
        number = next(step)
        for each in (twin, optimizer):
            give(each, number, [expert])
        optimizer.step()
        count = len(plans_built)
        twin._stepper.plans.clear()
        twin.step()
        assert_identical(snapshot(optimizer), snapshot(twin))
        return count

    assert [plans_for(expert) for expert in range(MOST)] == [1] * MOST
    assert plans_for(0) == 0
    assert plans_for(MOST) == 1  # instead of that of expert 1
    assert [plans_for(expert) for expert in (0, 2, MOST, 1)] == [0, 0, 0, 1]
    for _ in range(2):  # more sets than plans, in a circle
        assert [plans_for(expert) for expert in range(MOST + 3)][3:] == [1] * MOST


def test_no_more_plans_are_kept_than_that(plans_built: list[Any]) -> None:
    optimizer = mixture(stepforge.AdamW, 2 * MOST)
    for step in range(3 * MOST):
        give(optimizer, step, [step % (2 * MOST)])
        optimizer.step()
    gc.collect()
    assert len(plans_built) == 3 * MOST
    assert len([plan for plan in plans_built if plan() is not None]) == MOST


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_plans_that_wait_keep_nothing_alive(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: weak references to gradients, states and parameters."""
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    optimizer = mixture(stepforge.AdamW, 3)
    for step in range(6):
        give(optimizer, step, [step % 3])
        optimizer.step()
    group = optimizer.param_groups.pop()
    states = [optimizer.state.pop(p) for p in group["params"]]
    gone = [weakref.ref(x) for p in group["params"] for x in (p, p.grad) if x is not None]
    gone += [weakref.ref(x) for state in states for key, x in state.items() if key != "step"]
    for each in (group, *states):
        each.clear()
    assert len(gone) > 2 * len(EXPERT)
    assert all(x() is None for x in gone)


def test_parameters_in_different_sets_never_share_a_step_count() -> None:
    """Oracle: the number of steps that each of them took."""
    optimizer = mixture(stepforge.AdamW, 2)
    for step in range(6):
        give(optimizer, step, [step % 2])
        optimizer.step()
    p, q = (group["params"][0] for group in optimizer.param_groups[1:])
    optimizer.state[q]["step"] = optimizer.state[p]["step"]
    for expert, expected in [(1, (3, 4)), (0, (4, 4)), (0, (5, 4)), (1, (5, 5))]:
        give(optimizer, expert, [expert])
        optimizer.step()
        assert (float(optimizer.state[p]["step"]), float(optimizer.state[q]["step"])) == expected


def test_a_state_that_the_user_keeps_is_never_written() -> None:
    """Its element of a vector becomes no other parameter's."""
    optimizer = mixture(stepforge.NAdam, 3)
    kept: list[tuple[torch.Tensor, float]] = []
    for step in range(30):
        give(optimizer, step, [step % 3])
        optimizer.step()
        state = optimizer.state[params_of(optimizer)[step % 5]]
        for key in ("step", "mu_product"):
            if key in state:
                kept.append((state[key], float(state[key])))
                state[key] = state[key].clone()
    assert all(float(x) == value for x, value in kept)


def test_a_state_that_is_put_back_counts() -> None:
    """Oracle: an optimizer that makes a new plan in every step."""
    optimizers = [mixture(stepforge.NAdam, 2) for _ in range(2)]
    aside: dict[stepforge.Optimizer, dict[str, torch.Tensor]] = {}
    for step in range(12):
        for optimizer in optimizers:
            p = optimizer.param_groups[1]["params"][0]
            if step == 4:
                aside[optimizer] = dict(optimizer.state[p])
                optimizer.state[p] = {key: x.clone() for key, x in optimizer.state[p].items()}
            if step == 8:
                optimizer.state[p] = aside[optimizer]
            give(optimizer, step, [step % 2])
            if optimizer is optimizers[1]:
                optimizer._stepper.plans.clear()
            optimizer.step()
        assert_identical(*map(snapshot, optimizers))


def test_scalar_states_stay_the_same_tensors_while_sets_take_turns() -> None:
    optimizer = mixture(stepforge.NAdam, 3)
    seen = []
    for step in range(9):
        give(optimizer, step, [step % 3])
        optimizer.step()
        seen.append([x for s in optimizer.state.values() for x in (s["step"], s["mu_product"])])
    for before, after in itertools.pairwise(seen):
        assert all(x is y for x, y in zip(before, after))

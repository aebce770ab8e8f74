"""A kept plan is never stale. Oracle: an optimizer that makes a new plan in every step.

Each mutation happens between steps, to an optimizer with a kept plan and to its twin, which makes
new plans. Both must have the same bits from then on.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge.rules import ALL

#: AdamW represents Adam, from which it inherits.
OPTIMIZERS = [cls for name, cls in ALL.items() if name != "Adam"]
SHAPES = [(7,), (3, 5), (), (4, 2, 3), (7,)]


def built(cls: type[stepforge.Optimizer], backend: str) -> stepforge.Optimizer:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05, "weight_decay": 0.1}]
    flags = {"native": {}, "foreach": {"foreach": True}, "reference": {"foreach": False}}
    return cls(groups, **flags[backend])


def params_of(optimizer: stepforge.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: stepforge.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def first_state(optimizer: stepforge.Optimizer) -> tuple[dict[str, Any], str]:
    """Return the state of the first parameter, and the key of its second moment."""
    state = optimizer.state[params_of(optimizer)[0]]
    return state, "sum" if "sum" in state else "exp_avg_sq"


def replace_state_tensor(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = torch.full_like(state[name], 0.5)


def replace_state_of_parameter(optimizer: stepforge.Optimizer) -> None:
    p = params_of(optimizer)[0]
    optimizer.state[p] = {k: v.clone() + 1 for k, v in optimizer.state[p].items()}


def delete_state(optimizer: stepforge.Optimizer) -> None:
    del optimizer.state[params_of(optimizer)[1]]


def clear_state(optimizer: stepforge.Optimizer) -> None:
    optimizer.state.clear()


def write_state(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name].fill_(2.0)
    state["step"].fill_(40.0)


def replace_step(optimizer: stepforge.Optimizer) -> None:
    first_state(optimizer)[0]["step"] = torch.tensor(30.0)


def swap_step_memory(optimizer: stepforge.Optimizer) -> None:
    first_state(optimizer)[0]["step"].data = torch.tensor(17.0)


def rekey(optimizer: stepforge.Optimizer, new_key: Callable[[Any], Any]) -> None:
    """Change the keys of ``optimizer.state``, and keep the order of its values."""
    items = [(new_key(key), value) for key, value in optimizer.state.items()]
    optimizer.state.clear()
    optimizer.state.update(items)


def states_of_two_parameters_swapped(optimizer: stepforge.Optimizer) -> None:
    first, last = params_of(optimizer)[0], params_of(optimizer)[-1]
    swapped = {first: last, last: first}
    rekey(optimizer, lambda key: swapped.get(key, key))


def state_moved_to_another_key(optimizer: stepforge.Optimizer) -> None:
    first = params_of(optimizer)[0]
    rekey(optimizer, lambda key: "aside" if key is first else key)


def parameter_and_key_of_its_state_replaced(optimizer: stepforge.Optimizer) -> None:
    old, new = params_of(optimizer)[0], torch.nn.Parameter(torch.ones(7))
    optimizer.param_groups[0]["params"][0] = new
    rekey(optimizer, lambda key: new if key is old else key)


def state_copied_to_another_dict(optimizer: stepforge.Optimizer) -> None:
    """Put the same tensors into another dict."""
    p = params_of(optimizer)[0]
    optimizer.state[p] = dict(optimizer.state[p])


def parameters_tied(optimizer: stepforge.Optimizer) -> None:
    params_of(optimizer)[-1].data = params_of(optimizer)[0].data


def states_tied(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    optimizer.state[params_of(optimizer)[-1]][name] = state[name]


def state_of_another_dtype(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = state[name].to(torch.bfloat16)


def state_memory_swapped(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name].data = state[name].data.clone() * 2


def parameter_memory_swapped(optimizer: stepforge.Optimizer) -> None:
    for p in params_of(optimizer):
        p.data = p.data.clone() + 1


def parameter_transposed_in_place(optimizer: stepforge.Optimizer) -> None:
    p = params_of(optimizer)[1]
    p.data = p.data.clone().t().contiguous().t()


def all_halved(optimizer: stepforge.Optimizer) -> None:
    for p in params_of(optimizer):
        p.data = p.data.to(torch.bfloat16)
    for p in params_of(optimizer):
        p.grad = None


def group_added(optimizer: stepforge.Optimizer) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(6))], "lr": 0.3})


def group_removed(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups.pop()


def group_replaced(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.2}


def params_reordered(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["params"].reverse()


def parameter_replaced(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(7))


def options_changed(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0].update(lr=0.125, eps=1e-3)
    optimizer.param_groups[1]["weight_decay"] = 0


def flag_changed(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[1]["maximize"] = True


def lr_becomes_a_tensor(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def lr_tensor_filled(optimizer: stepforge.Optimizer) -> None:
    if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
        lr_becomes_a_tensor(optimizer)
        set_gradients(optimizer, 77)
        optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.5)


def gradient_missing(optimizer: stepforge.Optimizer) -> None:
    params_of(optimizer)[2].requires_grad_(False)
    params_of(optimizer)[2].grad = None


def state_loaded(optimizer: stepforge.Optimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for param_state in saved["state"].values():
        param_state["step"] += 5
    optimizer.load_state_dict(saved)


def hook_that_changes_everything(optimizer: stepforge.Optimizer) -> None:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        options_changed(optimizer)
        replace_state_tensor(optimizer)

    optimizer.register_step_pre_hook(hook)


MUTATIONS: list[Callable[[stepforge.Optimizer], None]] = [
    replace_state_tensor,
    replace_state_of_parameter,
    delete_state,
    clear_state,
    write_state,
    replace_step,
    swap_step_memory,
    states_of_two_parameters_swapped,
    state_moved_to_another_key,
    parameter_and_key_of_its_state_replaced,
    state_copied_to_another_dict,
    parameters_tied,
    states_tied,
    state_of_another_dtype,
    state_memory_swapped,
    parameter_memory_swapped,
    parameter_transposed_in_place,
    all_halved,
    group_added,
    group_removed,
    group_replaced,
    params_reordered,
    parameter_replaced,
    options_changed,
    flag_changed,
    lr_becomes_a_tensor,
    lr_tensor_filled,
    gradient_missing,
    state_loaded,
    hook_that_changes_everything,
]


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
            optimizer._stepper.plan = None
        optimizer.step()
        for p in params_of(optimizer):
            seen.append(p.detach().clone())
            seen.extend(x.clone() for x in optimizer.state[p].values())
    return seen


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
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
    """Return the same gradient in other layouts and at other offsets."""
    double = torch.empty(*g.shape[:-1], 2 * g.shape[-1])[..., ::2]
    return {
        "transposed": g.t().contiguous().t(),
        "with gaps": double.copy_(g),
        "negated": torch._neg_view(-g),
        "shifted": torch.cat([torch.zeros(1), g.flatten()])[1:].view(g.shape),
    }


@pytest.mark.parametrize("layout", ["transposed", "with gaps", "negated", "shifted"])
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


def test_a_plan_is_kept_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = built(stepforge.AdamW, "native")
    set_gradients(optimizer, 0)
    optimizer.step()
    plan = optimizer._stepper.plan
    for step in range(3):
        set_gradients(optimizer, step)
        optimizer.param_groups[0]["lr"] = 0.1 * step
        optimizer.step()
    assert optimizer._stepper.plan is plan


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
    assert optimizer._stepper.plan is not None
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

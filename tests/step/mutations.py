"""Changes to an optimizer between two steps, after which a kept plan may no longer fit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

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


def state_entry_deleted_and_added_again(optimizer: stepforge.Optimizer) -> None:
    """Put the same tensor under the same key, now the last of the dict."""
    state, name = first_state(optimizer)
    state[name] = state.pop(name)


def state_deleted_and_added_again(optimizer: stepforge.Optimizer) -> None:
    p = params_of(optimizer)[0]
    optimizer.state[p] = optimizer.state.pop(p)


def parameters_swapped(optimizer: stepforge.Optimizer) -> None:
    p = params_of(optimizer)[0]
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone() + 1))


def states_swapped(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    torch.utils.swap_tensors(state[name], state[name].clone() + 1)


def parameter_set(optimizer: stepforge.Optimizer) -> None:
    p = params_of(optimizer)[0]
    with torch.no_grad():
        p.set_(p.detach().clone() + 1)


def state_set(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name].set_(state[name].clone() + 1)


def memory_shared(optimizer: stepforge.Optimizer) -> None:
    for p in params_of(optimizer)[:2]:
        p.share_memory_()
        for x in optimizer.state[p].values():
            x.share_memory_()


def memory_resized(optimizer: stepforge.Optimizer) -> None:
    """Let a storage move; the tensor keeps its shape."""
    state, name = first_state(optimizer)
    state[name].untyped_storage().resize_(1 << 16)


def gradient_requirement_flipped(optimizer: stepforge.Optimizer) -> None:
    params_of(optimizer)[0].requires_grad_(False)


def parameter_collected(optimizer: stepforge.Optimizer) -> None:
    """Let the next parameter take the memory, maybe the id too, of one that is gone."""
    params = optimizer.param_groups[0]["params"]
    gone = weakref.ref(params[0])
    del optimizer.state[params[0]]
    del params[0]
    gc.collect()
    assert gone() is None
    params.insert(0, torch.nn.Parameter(torch.full((7,), 2.0)))


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
    state_entry_deleted_and_added_again,
    state_deleted_and_added_again,
    parameters_swapped,
    states_swapped,
    parameter_set,
    state_set,
    memory_shared,
    memory_resized,
    gradient_requirement_flipped,
    parameter_collected,
]

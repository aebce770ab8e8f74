"""Changes to sharded parameters between two steps, after which a kept plan may no longer fit."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import stepforge
from tests.contract.sharded_step_ranks import placed


def sharded(mesh: DeviceMesh) -> torch.nn.Parameter:
    return torch.nn.Parameter(placed(torch.ones(4, 6), Shard(0), mesh))


def built(mesh: DeviceMesh, flags: dict[str, Any]) -> stepforge.Optimizer:
    """Return an optimizer of a sharded parameter, with a gradient."""
    optimizer = stepforge.AdamW([sharded(mesh)], lr=0.1, **flags)
    set_gradients(optimizer, mesh, 1)
    return optimizer


def set_gradients(optimizer: stepforge.Optimizer, mesh: DeviceMesh, step: int) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = placed(torch.full((4, 6), float(step)), Shard(0), mesh)


def replace_local_tensor(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    p._local_tensor = p._local_tensor.clone() + 1


def swap_memory_of_local_tensor(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    p._local_tensor.data = p._local_tensor.clone() - 1


def replace_local_tensor_of_state(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[p]["exp_avg"]
    state._local_tensor = state._local_tensor * 2


def replace_state_by_its_local_tensor(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    """A step refuses it: the state of a DTensor is no whole tensor."""
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"]._local_tensor


def move_to_another_mesh(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    """A step refuses it: gradients stay on the old mesh."""
    (p,) = optimizer.param_groups[0]["params"]
    other = init_device_mesh("cpu", (1, 1))
    p.data = distribute_tensor(p.full_tensor().detach(), other, [Shard(0), Replicate()])


def change_the_learning_rate(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def state_reloaded(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def replicate_the_gradient(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = placed(torch.ones(4, 6), Replicate(), mesh)


def replicate_a_state(optimizer: stepforge.Optimizer, mesh: DeviceMesh) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p]["exp_avg"] = placed(torch.ones(4, 6), Replicate(), mesh)


MUTATIONS = [
    replace_local_tensor,
    swap_memory_of_local_tensor,
    replace_local_tensor_of_state,
    replace_state_by_its_local_tensor,
    move_to_another_mesh,
    change_the_learning_rate,
    state_reloaded,
    replicate_the_gradient,
    replicate_a_state,
]

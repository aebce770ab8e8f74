"""Tensors that stand for others: what of a sharded one is here, and which are plain memory."""

from __future__ import annotations

import torch

__all__ = ["is_plain", "is_sharded", "local", "placed_as"]


def local(x: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is here; any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def is_plain(x: object) -> bool:
    """True for a tensor or parameter itself, False for a subclass, which may have no memory."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def is_sharded(x: torch.Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(x, "placements")


def placed_as(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The gradient of a sharded parameter, with the placements of the parameter.

    A gradient that is a ``Partial`` sum is summed. That takes a collective, in which all processes
    of the mesh take part.

    Args:
        p: the parameter.
        g: its gradient. One of the two is a DTensor.

    Raises:
        RuntimeError: only one of them is a DTensor, or they are on different meshes.
    """
    # Brings torch.distributed, which only those who shard should pay for.
    from torch.distributed.tensor import DTensor

    if not (isinstance(p, DTensor) and isinstance(g, DTensor) and p.device_mesh == g.device_mesh):
        raise RuntimeError(
            f"a parameter that is {_mesh_of(p)} has a gradient that is {_mesh_of(g)}: both must be "
            "on one mesh, or neither"
        )
    return g if p.placements == g.placements else g.redistribute(p.device_mesh, p.placements)


def _mesh_of(x: torch.Tensor) -> str:
    return f"sharded over {x.device_mesh}" if hasattr(x, "device_mesh") else "not sharded"

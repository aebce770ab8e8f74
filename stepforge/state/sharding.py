"""Sharded parameters: the local parts of DTensors, and states that are sharded alike."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.formats import Part

__all__ = [
    "empty_part",
    "first_index",
    "is_cut_within_rows",
    "is_plain",
    "is_sharded",
    "local",
    "local_columns",
    "local_part",
    "place_like",
    "redistribute_gradient",
    "shard_groups",
    "shard_like",
]


def local(x: torch.Tensor) -> torch.Tensor:
    """Return the local part of a DTensor; any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def local_part(x: torch.Tensor) -> torch.Tensor:
    """Return the local part that a DTensor holds, which is no view; any other tensor itself."""
    part: torch.Tensor = getattr(x, "_local_tensor", x)
    return part


def is_plain(x: object) -> bool:
    """Return True for a tensor or parameter itself, False for a subclass without own memory."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def is_sharded(x: torch.Tensor) -> bool:
    """Return True for a DTensor."""
    return hasattr(x, "placements")


def is_cut_within_rows(p: torch.Tensor) -> bool:
    """Return True for a parameter that is sharded along another dimension than 0."""
    placements = getattr(p, "placements", ())
    return any(not x.is_replicate() and getattr(x, "dim", None) != 0 for x in placements)


def shard_groups(p: torch.Tensor) -> tuple[Any, ...]:
    """Return the process groups over which a parameter is cut; none for any other tensor."""
    placements = getattr(p, "placements", ())
    cut = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    return tuple(p.device_mesh.get_group(dim) for dim in cut)  # type: ignore[attr-defined]


def redistribute_gradient(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a DTensor, with the placements of the parameter.

    A ``Partial`` gradient is summed. That takes a collective of all processes of the mesh.

    Args:
        p: the parameter.
        g: its gradient. At least one of the two is a DTensor.

    Raises:
        RuntimeError: only one of them is a DTensor, or they are on different meshes.
    """
    # Importing torch.distributed takes time, and only users who shard need it.
    from torch.distributed.tensor import DTensor

    if not (isinstance(p, DTensor) and isinstance(g, DTensor) and p.device_mesh == g.device_mesh):
        raise RuntimeError(
            f"a parameter that is {_mesh_of(p)} has a gradient that is {_mesh_of(g)}: both must be "
            "on one mesh, or neither"
        )
    return g if p.placements == g.placements else g.redistribute(p.device_mesh, p.placements)


def shard_like(p: torch.Tensor, part: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of a shape, sharded as the parameter is, from its local part.

    Args:
        p: the parameter.
        part: the local part.
        shape: the shape of the whole tensor.
    """
    if not hasattr(p, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape),
        stride=strides,
    )  # fmt: skip


def place_like(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Copy a state from elsewhere to the device and the placements of its parameter.

    Args:
        p: the parameter.
        x: the state, or its scales: whole, and the same in all processes; or sharded.
    """
    copied = x.detach().to(p.device, copy=True)
    if hasattr(p, "placements") == hasattr(x, "placements"):
        return copied
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(copied, DTensor):
        # gloo has no collective for int16.
        wide: Any = copied.to(torch.int32) if copied.dtype == torch.int16 else copied
        whole: torch.Tensor = wide.full_tensor()
        return whole.to(copied.dtype)
    assert isinstance(p, DTensor)
    return distribute_tensor(copied, p.device_mesh, p.placements, src_data_rank=None)


def empty_part(p: torch.Tensor, part: Part) -> torch.Tensor:
    """Return an uninitialized tensor for a part of a state, sharded as its parameter is.

    Scales belong to the local rows, also if the parameter is sharded within rows: then all
    processes that share a row have the same scales.

    Args:
        p: the parameter.
        part: gives the dtype, and says whether there is one element per element.
    """
    if not part.of_block:
        return torch.empty_like(p.detach(), dtype=part.dtype, memory_format=torch.contiguous_format)
    here, shape = local(p.detach()), part.shape(p.shape)
    rows = here.new_empty((here.shape[0], shape[1]), dtype=part.dtype)
    if not is_cut_within_rows(p):
        return shard_like(p, rows, shape)
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(p, DTensor)
    placements = [x if getattr(x, "dim", 0) == 0 else Replicate() for x in p.placements]
    return DTensor.from_local(
        rows, p.device_mesh, placements, run_check=False, shape=torch.Size(shape),
        stride=(shape[1], 1),
    )  # fmt: skip


def local_columns(p: torch.Tensor) -> torch.Tensor:
    """Return the indices, within a row of dimension 0, of the local elements of a DTensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(p, DTensor)
    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    row = p.shape[1:]
    columns = torch.arange(math.prod(row), device=p.device).view(row)
    for dim, (size, offset) in enumerate(zip(sizes[1:], offsets[1:])):
        columns = columns.narrow(dim, min(offset, row[dim]), size)
    return columns.flatten()


def first_index(p: torch.Tensor) -> int:
    """Return the index of the first local element, from which the others are counted.

    If every shard is a run of consecutive rows, it is the flat index in the whole parameter. For
    other shards it is not, but no two elements have the same index.
    """
    if not hasattr(p, "placements"):
        return 0
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return 0
    return _first_index(tuple(p.shape), mesh.shape, p.placements, tuple(coordinate))


@functools.lru_cache(maxsize=4096)
def _first_index(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...],
) -> int:
    sizes = [1 if x.is_replicate() else size for x, size in zip(placements, mesh)]
    # Replicas have the same elements.
    own = tuple(0 if size == 1 else place for size, place in zip(sizes, coordinate))
    shards = {own: _indices(shape, mesh, placements, own)}
    if any(hasattr(x, "split_factor") for x in placements):
        coordinates = itertools.product(*map(range, sizes))
        shards = {at: _indices(shape, mesh, placements, at) for at in coordinates}
    if any(len(x) and x[-1] - x[0] >= len(x) for here in shards.values() for x in here):
        # Some shards consist of several runs: count the elements of all shards before this one.
        before = itertools.takewhile(own.__ne__, shards)
        return sum(math.prod(map(len, shards[at])) for at in before)
    return sum(
        int(x[0]) * math.prod(map(len, shards[own][:dim])) * math.prod(shape[dim + 1 :])
        for dim, x in enumerate(shards[own])
        if len(x)
    )


def _indices(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    coordinate: tuple[int, ...],
) -> list[np.ndarray[Any, Any]]:
    """Return the indices along each dimension that a process has of a sharded parameter.

    Args:
        shape: the shape of the parameter.
        mesh: the shape of its mesh.
        placements: the placements of the parameter.
        coordinate: the coordinate of the process in the mesh.
    """
    indices = [np.arange(size) for size in shape]
    for placement, size, place in zip(placements, mesh, coordinate):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            # A strided shard has a chunk of each of several pieces.
            pieces = _chunks(indices[dim], getattr(placement, "split_factor", 1))
            indices[dim] = np.concatenate([_chunks(piece, size)[place] for piece in pieces])
    return indices


def _chunks(x: np.ndarray[Any, Any], count: int) -> list[np.ndarray[Any, Any]]:
    """Cut an array as torch.chunk does, but always into ``count`` chunks, the last ones empty."""
    size = -(-len(x) // count)
    return [x[size * i : size * (i + 1)] for i in range(count)]


def _mesh_of(x: torch.Tensor) -> str:
    return f"sharded over {x.device_mesh}" if hasattr(x, "device_mesh") else "not sharded"

"""What each of several processes does for the tests of sharded optimizers.

Run as ``python -m tests.contract.ranks RANK PROCESSES FOLDER``. For each case a model is sharded,
trained, saved, and restored; what the first process finds, with whole tensors, it writes to
``results.pt`` in the folder, and all processes the checkpoint of a case to a folder of its name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import stepforge
from stepforge.checkpoint import full_precision_weights, to_torch

LR, SEED = 0.1, 9
BEFORE, AFTER = range(3), range(3, 6)
#: Rows that two processes do not share evenly, with a block that rows cut short; one row, so that
#: a process has none; and one that is too small for codes.
SHAPES = ((65, 200), (1, 5000), (65,), (4, 64, 32))


class Case(NamedTuple):
    """A run: an optimizer with options, of parameters of a dtype."""

    cls: type
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


CASES = {
    "int8": Case(stepforge.AdamW, {"state_format": "int8", "amsgrad": True}),
    "bfloat16": Case(stepforge.Adagrad, {"state_format": "bfloat16"}),
    "24 bits": Case(
        stepforge.AdamW, {"state_format": "int8", "master_weight_bits": 24}, torch.bfloat16
    ),
    "32 bits": Case(stepforge.RAdam, {"master_weight_bits": 32}, torch.bfloat16),
    "stochastic": Case(
        stepforge.NAdam, {"state_format": "int8", "stochastic_rounding": True}, torch.bfloat16
    ),
}


class Model(torch.nn.Module):
    """Nothing but parameters."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.params = torch.nn.ParameterList(
            torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES
        )


def built(case: Case, mesh: DeviceMesh | None, seed: int = 0) -> tuple[Model, Any]:
    """A model, sharded unless there is no mesh, and its optimizer."""
    model = Model(case.dtype, seed)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, case.cls(model.parameters(), lr=LR, rounding_seed=SEED, **case.options)


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    """Steps over gradients that follow from step and parameter, whatever the sharding."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = g
        optimizer.step()


def whole(value: Any) -> Any:
    """Nested values with whole tensors."""
    if isinstance(value, DTensor):
        if value.dtype == torch.int16:  # which no collective operation takes
            return value.to(torch.int32).full_tensor().to(torch.int16)
        return value.detach().full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def held(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """All numbers of a run, whole."""
    params = list(model.parameters())
    return whole({"params": params, "state": [dict(optimizer.state[p]) for p in params]})


def save(model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
    """Writes a distributed checkpoint."""
    checkpoint.save(_state(model, optimizer), checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
    """Reads a distributed checkpoint of any number of processes."""
    state = _state(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def misplaced(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """The states that are not sharded as their parameters are, row by row."""
    return [
        key
        for p in model.parameters()
        for key, x in optimizer.state[p].items()
        if x.dim()
        and not (
            isinstance(x, DTensor)
            and x.device_mesh == p.device_mesh
            and x.placements == p.placements
            and len(x.to_local()) == len(p.to_local())
        )
    ]


def found(case: Case, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """What a case comes to."""
    model, optimizer = built(case, mesh)
    train(model, optimizer, BEFORE)
    results = {
        "saved": held(model, optimizer),
        "misplaced": misplaced(model, optimizer),
        "exported": whole(to_torch(optimizer)["state"]),
        "weights": whole(full_precision_weights(model, optimizer)),
    }
    save(model, optimizer, folder)
    # The state dict of all processes, in one that has whole parameters.
    gathering, gathering_optimizer = built(case, None)
    gathering_optimizer.load_state_dict(optimizer.state_dict())
    results["gathered"] = held(gathering, gathering_optimizer)["state"]
    train(model, optimizer, AFTER)
    resumed, its_optimizer = built(case, mesh, seed=1)
    load(resumed, its_optimizer, folder)
    results["loaded"] = held(resumed, its_optimizer)
    train(resumed, its_optimizer, AFTER)
    # The state dict of one process, whole in all of them.
    plain, plain_optimizer = built(case, None)
    train(plain, plain_optimizer, BEFORE)
    moved, moved_optimizer = built(case, mesh)
    train(moved, moved_optimizer, range(1))
    moved_optimizer.load_state_dict(plain_optimizer.state_dict())
    for p, q in zip(moved.parameters(), plain.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.data, mesh, p.placements, src_data_rank=None))
    results["misplaced"] += misplaced(moved, moved_optimizer)
    train(moved, moved_optimizer, AFTER)
    return results | {
        "trained": held(model, optimizer),
        "resumed": held(resumed, its_optimizer),
        "moved": held(moved, moved_optimizer),
    }


def cut_through_rows(mesh: DeviceMesh) -> dict[str, Any]:
    """A parameter of which each process has a part of every row, stepped alike everywhere."""
    options = {"state_format": "int8", "stochastic_rounding": True}
    cut = torch.nn.Parameter(
        distribute_tensor(
            torch.ones(64, 256, dtype=torch.bfloat16), mesh, [Shard(1)], src_data_rank=None
        )
    )
    optimizer = stepforge.Adam([cut], lr=2**-10, **options)
    cut.grad = torch.ones_like(cut)
    optimizer.step()
    return {"weight": whole(cut), "state": whole(dict(optimizer.state[cut]))}


def cut_through_blocks(mesh: DeviceMesh) -> dict[str, Any]:
    """States in codes, whole in all processes, loaded where each has a part of every row.

    Parts and their scales are of fitting shapes, but a part has elements of more blocks.
    """
    options = {"lr": LR, "state_format": "int8"}
    whole_p = torch.nn.Parameter(torch.ones(16, 3, 256))
    source = stepforge.Adam([whole_p], **options)
    train(torch.nn.ParameterList([whole_p]), source, BEFORE)
    cut = torch.nn.Parameter(
        distribute_tensor(whole_p.detach(), mesh, [Shard(2)], src_data_rank=None)
    )
    optimizer = stepforge.Adam([cut], **options)
    optimizer.load_state_dict(source.state_dict())
    return {
        "found": whole(dict(optimizer.state[cut])),
        "expected": to_torch(source)["state"][0],
    }


def main(rank: int, processes: int, folder: Path) -> None:
    """Runs all cases in one of several processes."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    results = {name: found(case, mesh, folder / name) for name, case in CASES.items()}
    results["cut"] = cut_through_rows(mesh)
    results["cut through blocks"] = cut_through_blocks(mesh)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

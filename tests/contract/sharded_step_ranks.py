"""What each of several processes does for the tests of a step of DTensors.

Run as ``python -m tests.contract.sharded_step_ranks RANK PROCESSES FOLDER``. Each case is stepped
on a mesh; what its parameters and states are then, whole, the first process writes to
``results.pt`` in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepforge

STEPS = 4
#: Rows that two processes do not share evenly; one row, so that one of them has none.
SHAPES = ((7, 6), (1, 5), (4, 3, 2), (9,))


class Case(NamedTuple):
    """How a parameter and its gradient are placed, and the options of the optimizer."""

    of_parameter: Any
    of_gradient: Any
    options: dict[str, Any]


CASES = {
    f"{where}, {flags}": Case(*placements, options)
    for where, placements in {
        "rows": (Shard(0), Shard(0)),
        "columns": (Shard(-1), Shard(-1)),
        "whole": (Replicate(), Replicate()),
        "a sum not taken yet": (Replicate(), Partial()),
        "a sum scattered": (Shard(0), Partial()),
        "a gradient placed otherwise": (Shard(0), Replicate()),
    }.items()
    for flags, options in {
        "default": {},
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
    }.items()
}


def gradient(number: int, step: int) -> torch.Tensor:
    """Whole numbers, of which halves are exact, so that a sum of parts is the whole."""
    generator = torch.Generator().manual_seed(10 * step + number)
    return torch.randint(-50, 50, SHAPES[number], generator=generator).float()


def start(number: int) -> torch.Tensor:
    return torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(number))


def placed(x: torch.Tensor, placement: Any, mesh: DeviceMesh) -> DTensor:
    """A tensor on a mesh, the parts of a sum being equal."""
    if isinstance(placement, Partial):
        return DTensor.from_local(x / mesh.size(), mesh, [placement], run_check=False)
    if isinstance(placement, Shard):
        placement = Shard(placement.dim % x.dim())
    return distribute_tensor(x, mesh, [placement], src_data_rank=None)


def stepped(case: Case, mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """All parameters and states after a few steps; on whole tensors without a mesh."""

    def on_mesh(x: torch.Tensor, placement: Any) -> torch.Tensor:
        return x if mesh is None else placed(x, placement, mesh)

    params = [
        torch.nn.Parameter(on_mesh(start(number), case.of_parameter))
        for number in range(len(SHAPES))
    ]
    optimizer = stepforge.NAdam(params, lr=0.05, **case.options)
    for step in range(STEPS):
        for number, p in enumerate(params):
            p.grad = on_mesh(gradient(number, step), case.of_gradient)
        optimizer.step()
    found = {}
    for number, p in enumerate(params):
        for key, x in {"p": p.detach(), **optimizer.state[p]}.items():
            found[f"{number}.{key}"] = x.full_tensor() if isinstance(x, DTensor) else x.clone()
    return found


def main(rank: int, processes: int, folder: Path) -> None:
    """Runs all cases in one of several processes."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    results = {name: stepped(case, mesh) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""One rank of ``test_sharded_steps.py``, and helpers of both.

Run as ``python -m tests.contract.sharded_step_ranks RANK PROCESSES FOLDER``. Each case is stepped
on a mesh. The first process writes the parameters and states, as whole tensors, to ``results.pt``
in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepforge
from tests.process_groups import process_group

STEPS = 4
#: Includes rows that two processes cannot share evenly, and one row, so that one process has none.
SHAPES = ((7, 6), (1, 5), (4, 3, 2), (9,))


class Case(NamedTuple):
    """The placements of a parameter and its gradient, and the options of the optimizer."""

    parameter: Any
    gradient: Any
    options: dict[str, Any]


#: The sum of squares of the gradients below is exact in any order, so the norm has the same bits.
CLIPPED = {"max_grad_norm": 20.0, "skip_nonfinite": True}
MEASURED = {"telemetry": True}
CASES = {
    f"{name}, {flags}": Case(*placements, options)
    for name, placements in {
        "rows": (Shard(0), Shard(0)),
        "columns": (Shard(-1), Shard(-1)),
        "whole": (Replicate(), Replicate()),
        "partial gradient, whole parameter": (Replicate(), Partial()),
        "partial gradient, sharded parameter": (Shard(0), Partial()),
        "whole gradient, sharded parameter": (Shard(0), Replicate()),
    }.items()
    for flags, options in {
        "default": {},
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "for-loop": {"foreach": False},
        "clipped": CLIPPED,
        "measured": MEASURED,
    }.items()
}


def gradient(index: int, step: int) -> torch.Tensor:
    """Return a gradient of integers: their halves are exact, so equal parts sum to the whole."""
    generator = torch.Generator().manual_seed(10 * step + index)
    return torch.randint(-50, 50, SHAPES[index], generator=generator).float()


def start(index: int) -> torch.Tensor:
    """Return the initial values of a parameter."""
    return torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(index))


def placed(x: torch.Tensor, placement: Any, mesh: DeviceMesh) -> DTensor:
    """Return a tensor on a mesh. The terms of a partial tensor are equal."""
    if isinstance(placement, Partial):
        return DTensor.from_local(x / mesh.size(), mesh, [placement], run_check=False)
    if isinstance(placement, Shard):
        placement = Shard(placement.dim % x.dim())
    return distribute_tensor(x, mesh, [placement], src_data_rank=None)


def stepped(case: Case, mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """Return all parameters and states after a few steps; without a mesh, of whole tensors."""

    def on_mesh(x: torch.Tensor, placement: Any) -> torch.Tensor:
        return x if mesh is None else placed(x, placement, mesh)

    params = [
        torch.nn.Parameter(on_mesh(start(index), case.parameter)) for index in range(len(SHAPES))
    ]
    optimizer = stepforge.NAdam(params, lr=0.05, **case.options)
    for step in range(STEPS):
        for index, p in enumerate(params):
            g = gradient(index, step)
            if step == 2 and index == 0 and "skip_nonfinite" in case.options:
                g[-1, -1] = torch.nan  # which only the last process has, if any has only a part
            p.grad = on_mesh(g, case.gradient)
        optimizer.step()
    tensors = optimizer.metrics()
    if "telemetry" in case.options:
        by_parameter = optimizer.metrics(by="parameter").items()
        tensors |= {f"{name} of {k}": x for k, found in by_parameter for name, x in found.items()}
        # Sums of the sums of parts differ in the last bits of float64, which this hides.
        tensors = {name: x.float() for name, x in tensors.items()}
    for index, p in enumerate(params):
        for key, x in {"p": p.detach(), **optimizer.state[p]}.items():
            tensors[f"{index}.{key}"] = x.full_tensor() if isinstance(x, DTensor) else x.clone()
    return tensors


def main(rank: int, processes: int, folder: Path) -> None:
    """Run all cases in one of several processes."""
    torch.set_num_threads(1)
    with process_group(folder / "store", rank, processes):
        mesh = init_device_mesh("cpu", (processes,))
        results = {name: stepped(case, mesh) for name, case in CASES.items()}
        if rank == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""One rank of ``test_sharded_formats.py``, and helpers of both.

Run as ``python -m tests.checkpoint.sharded_format_ranks RANK PROCESSES FOLDER``. Each case shards,
trains, saves and restores a model. The first process writes the results, as whole tensors, to
``results.pt`` in the folder. All processes write the checkpoint of a case to a folder of its name.
Two processes shard along one dimension of a mesh, four along two.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import stepforge
from stepforge.checkpoint import full_precision_weights, to_torch
from stepforge.state.sharding import first_index, local
from tests.process_groups import process_group

LR, SEED = 0.1, 9
BEFORE, AFTER = range(3), range(3, 6)
#: Rows that two processes cannot share evenly and that end within a block; one row, so that one
#: process has none; a parameter too small for int8 states; and one that is shared evenly.
SHAPES = ((65, 200), (1, 5000), (65,), (4, 64, 32))


class Case(NamedTuple):
    """An optimizer, its options, and its parameters' dtype."""

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


#: The cases on a mesh of two dimensions: together they have every kind of tensor and of rounding.
IN_TWO_DIMENSIONS = ("24 bits", "stochastic")


class Model(torch.nn.Module):
    """A model of parameters without a forward pass."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.params = torch.nn.ParameterList(
            torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES
        )


def built(case: Case, mesh: DeviceMesh | None, seed: int = 0) -> tuple[Model, Any]:
    """Return a model and its optimizer. Without a mesh the model is not sharded."""
    model = Model(case.dtype, seed)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, case.cls(model.parameters(), lr=LR, rounding_seed=SEED, **case.options)


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    """Step with gradients that depend on the step and the parameter, not on the sharding."""
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = g
        optimizer.step()


def whole(value: Any) -> Any:
    """Return nested values with each DTensor gathered into a whole tensor."""
    if isinstance(value, DTensor):
        if value.dtype == torch.int16:  # no collective operation takes int16
            return value.to(torch.int32).full_tensor().to(torch.int16)
        return value.detach().full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def whole_run(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return all parameters and states, as whole tensors."""
    params = list(model.parameters())
    return whole({"params": params, "state": [dict(optimizer.state[p]) for p in params]})


def save(model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
    """Write a distributed checkpoint."""
    checkpoint.save(_state(model, optimizer), checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
    """Read a distributed checkpoint of any number of processes."""
    state = _state(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def misplaced_states(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """Return the keys of states that are not sharded as their parameters are, row by row."""
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


def results_of(case: Case, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Run a case, and return the tensors to compare."""
    model, optimizer = built(case, mesh)
    train(model, optimizer, BEFORE)
    results = {
        "saved": whole_run(model, optimizer),
        "misplaced": misplaced_states(model, optimizer),
        "exported": whole(to_torch(optimizer)["state"]),
        "weights": whole(full_precision_weights(model, optimizer)),
    }
    save(model, optimizer, folder)
    # A sharded state dict into whole parameters.
    gathering, gathering_optimizer = built(case, None)
    gathering_optimizer.load_state_dict(optimizer.state_dict())
    results["gathered"] = whole_run(gathering, gathering_optimizer)["state"]
    train(model, optimizer, AFTER)
    resumed, resumed_optimizer = built(case, mesh, seed=1)
    load(resumed, resumed_optimizer, folder)
    results["loaded"] = whole_run(resumed, resumed_optimizer)
    train(resumed, resumed_optimizer, AFTER)
    # A whole state dict, the same in all processes, into sharded parameters.
    plain, plain_optimizer = built(case, None)
    train(plain, plain_optimizer, BEFORE)
    distributed, distributed_optimizer = built(case, mesh)
    train(distributed, distributed_optimizer, range(1))
    distributed_optimizer.load_state_dict(plain_optimizer.state_dict())
    for p, q in zip(distributed.parameters(), plain.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.data, mesh, p.placements, src_data_rank=None))
    results["misplaced"] += misplaced_states(distributed, distributed_optimizer)
    train(distributed, distributed_optimizer, AFTER)
    return results | {
        "trained": whole_run(model, optimizer),
        "resumed": whole_run(resumed, resumed_optimizer),
        "distributed": whole_run(distributed, distributed_optimizer),
    }


def cut_through_rows(mesh: DeviceMesh) -> dict[str, Any]:
    """Step a parameter whose rows are cut: every process has a part of each row."""
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
    """Load whole int8 states into a parameter whose rows are cut.

    The shapes of the parts and of their scales fit, but a part has elements of several blocks.
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
        "loaded": whole(dict(optimizer.state[cut])),
        "expected": to_torch(source)["state"][0],
    }


def flat_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model whose matrices have rows that are long enough for int8 states."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 96)).to(dtype)


def backward(model: torch.nn.Module, step: int) -> None:
    """Set the gradients of a batch that is the same in all processes."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 128, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().sum().backward()


def flattened(use_orig_params: bool) -> dict[str, Any]:
    """Run FSDP1: two steps, a sharded checkpoint, two more steps. Record warnings and errors."""
    device = torch.device("cpu")

    def wrapped(dtype: torch.dtype = torch.float32) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(
            flat_model(dtype), device_id=device, use_orig_params=use_orig_params
        )

    model = wrapped()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = stepforge.AdamW(model.parameters(), lr=LR, state_format="int8")
    for step in range(2):
        backward(model, step)
        optimizer.step()
    results: dict[str, Any] = {
        "warnings": [str(x.message) for x in caught if "state_format" in str(x.message)],
        "explained": str(stepforge.explain(optimizer)),
        "dtypes": sorted({str(x.dtype) for s in optimizer.state.values() for x in s.values()}),
    }
    resumed = wrapped()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = stepforge.AdamW(resumed.parameters(), lr=0.5, state_format="float32")
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    with FullyShardedDataParallel.state_dict_type(resumed, StateDictType.SHARDED_STATE_DICT):
        resumed_optimizer.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(resumed, resumed_optimizer, saved)
        )
    for name, fsdp_model, its_optimizer in (
        ("trained", model, optimizer),
        ("resumed", resumed, resumed_optimizer),
    ):
        for step in range(2, 4):
            backward(fsdp_model, step)
            its_optimizer.step()
        with FullyShardedDataParallel.summon_full_params(fsdp_model):
            results[name] = [p.detach().clone() for p in fsdp_model.module.parameters()]
    bfloat16_model = wrapped(torch.bfloat16)
    for width in (24, 32):
        try:
            stepforge.AdamW(bfloat16_model.parameters(), master_weight_bits=width)
        except ValueError as error:
            results[f"{width} bits"] = str(error)
    return results


def replicated(zero: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Train bfloat16 replicas by DDP, each process with all states or with its share."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit

    model = DistributedDataParallel(flat_model(torch.bfloat16))
    options = {"lr": LR, "rounding_seed": SEED, **options}
    params = model.parameters()
    optimizer: Any = (
        ZeroRedundancyOptimizer(params, optimizer_class=stepforge.AdamW, **options)
        if zero
        else stepforge.AdamW(params, **options)
    )
    for step in range(3):
        backward(model, step)
        optimizer.step()
    own = [p.detach().clone() for p in model.module.parameters()]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return {"params": own, "processes": gathered}


def gather_int16_error(mesh: DeviceMesh) -> str:
    """Return the error of gathering low bits in int16."""
    model, optimizer = built(CASES["32 bits"], mesh)
    train(model, optimizer, range(1))
    try:
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        return str(error)
    return "no error"


def in_two_dimensions(case: Case, mesh: DeviceMesh | None) -> tuple[torch.nn.Module, Any]:
    """Return two layers under tensor parallelism and FSDP2, and their optimizer.

    Tensor parallelism cuts the first layer along its outputs and the second along its inputs. So
    the rows of the first are cut twice, by ``_StridedShard`` and ``Shard``. The rows and the
    columns of the second are cut once each.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(130, 65), torch.nn.Linear(65, 96)).to(case.dtype)
    if mesh is not None:
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    return model, case.cls(model.parameters(), lr=LR, rounding_seed=SEED, **case.options)


def step_with_placements(case: Case, mesh: DeviceMesh, placements: Any) -> dict[str, Any]:
    """Step one matrix with these placements, or whole if there are none."""
    x = torch.randn(72, 200, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    if placements is not None:
        x = distribute_tensor(x, mesh, placements, src_data_rank=None)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(x)
    optimizer = case.cls(model.parameters(), lr=LR, rounding_seed=SEED, **case.options)
    train(model, optimizer, range(1))
    first = first_index(model.weight)
    ranges: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranges, (first, first + local(model.weight).numel()))
    return whole_run(model, optimizer) | {
        "misplaced": misplaced_states(model, optimizer) if placements else [],
        "index ranges": ranges,
    }


#: Ways to train replicas, and the options of each.
REPLICATED: dict[str, dict[str, Any]] = {
    "DDP": {"state_format": "int8", "master_weight_bits": 24},
    "DDP, stochastic": {"state_format": "int8", "stochastic_rounding": True},
    "ZeRO": {"state_format": "float32", "master_weight_bits": 32},
    "ZeRO, stochastic": {"state_format": "int8", "stochastic_rounding": True},
}
#: Placements that cut the rows of a matrix over a mesh of two dimensions.
PLACEMENTS = {
    "rows twice": [Shard(0), Shard(0)],
    "rows of replicas": [Replicate(), Shard(0)],
    "rows, strided": [_StridedShard(0, split_factor=2), Shard(0)],
    "replicas of pieces": [Replicate(), _StridedShard(0, split_factor=3)],
    "pieces of parts": [Shard(0), _StridedShard(0, split_factor=2)],
}
#: The placements that give each process consecutive rows.
IN_ORDER = ("rows twice", "rows of replicas", "rows, strided")


def on_one_dimension(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Return the results of two processes."""
    results = {name: results_of(case, mesh, folder / name) for name, case in CASES.items()}
    results["cut"] = cut_through_rows(mesh)
    results["cut through blocks"] = cut_through_blocks(mesh)
    results["flat"] = {orig: flattened(orig) for orig in (False, True)}
    results["replicated"] = {
        name: replicated(name.startswith("ZeRO"), options) for name, options in REPLICATED.items()
    }
    results["int16"] = gather_int16_error(mesh)
    return results


def on_two_dimensions(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """Return the results of four processes."""
    results: dict[str, Any] = {}
    for name in IN_TWO_DIMENSIONS:
        case = CASES[name]
        model, optimizer = in_two_dimensions(case, mesh)
        train(model, optimizer, BEFORE)
        save(model, optimizer, folder / name)
        results[name] = {
            "saved": whole_run(model, optimizer),
            "misplaced": misplaced_states(model, optimizer),
            "placements": [str(p.placements) for p in model.parameters()],
        }
        resumed, resumed_optimizer = in_two_dimensions(case, mesh)
        load(resumed, resumed_optimizer, folder / name)
        train(resumed, resumed_optimizer, AFTER)
        results[name]["resumed"] = whole_run(resumed, resumed_optimizer)
    # FSDP2 takes a mesh of two dimensions for HSDP: replicas of shards.
    model, optimizer = built(CASES["stochastic"], mesh)
    train(model, optimizer, BEFORE)
    results["HSDP"] = whole_run(model, optimizer) | {
        "placements": [str(p.placements) for p in model.parameters()]
    }
    results["placements"] = {
        name: step_with_placements(CASES["stochastic"], mesh, placements)
        for name, placements in ({"whole": None} | PLACEMENTS).items()
    }
    return results


def main(rank: int, processes: int, folder: Path) -> None:
    """Run all cases in one of several processes."""
    torch.set_num_threads(1)
    with process_group(folder / "store", rank, processes):
        if processes == 2:
            results = on_one_dimension(init_device_mesh("cpu", (2,)), folder)
        else:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
            results = on_two_dimensions(mesh, folder)
        if rank == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

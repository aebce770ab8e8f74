"""One rank of ``test_resharding.py``, which loads any checkpoint into any optimizer.

Run as ``python -m tests.checkpoint.resharding_ranks RANK PROCESSES FOLDER`` for each number of
processes, all at once. Each process group saves its own checkpoints, waits for those of the other
groups, and loads them all. Each process compares its own part of the loaded tensors. It writes
the problems that it found to ``RANK-of-PROCESSES.pt`` in the folder, an empty list for each
comparison without one.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import stepforge
from stepforge.checkpoint import load_distributed
from tests.checkpoint.sharded_format_ranks import train, whole
from tests.decoding import decode_state, join_low_bits
from tests.process_groups import process_group

STEPS = range(2)
#: The time to wait for the checkpoints of the other process groups.
TIMEOUT_S = 1800


class Format(NamedTuple):
    """An optimizer, the dtype of its parameters, and its options."""

    cls: type
    dtype: torch.dtype
    options: dict[str, Any]


FORMATS = {
    "torch": Format(torch.optim.AdamW, torch.float32, {}),
    "float32": Format(stepforge.AdamW, torch.float32, {}),
    "bfloat16": Format(stepforge.AdamW, torch.float32, {"state_format": "bfloat16"}),
    "int8": Format(stepforge.AdamW, torch.float32, {"state_format": "int8"}),
    "24": Format(
        stepforge.AdamW, torch.bfloat16, {"state_format": "float32", "master_weight_bits": 24}
    ),
    "32": Format(stepforge.AdamW, torch.bfloat16, {"master_weight_bits": 32}),
    "24-int8": Format(
        stepforge.AdamW, torch.bfloat16, {"state_format": "int8", "master_weight_bits": 24}
    ),
}
#: The layouts of the model, by the number of processes.
LAYOUTS = {1: ("plain", "fsdp1"), 2: ("fsdp2", "tp"), 3: ("fsdp3",)}
ALL = [(layout, name) for group in LAYOUTS.values() for layout in group for name in FORMATS]
MOMENTS = ("exp_avg", "exp_avg_sq")
#: Tensor parallelism gives each process a part of every row of this parameter: no int8 states.
CUT = "down.weight"


class Model(torch.nn.Module):
    """Two layers: 200 rows, which three processes cannot share evenly, and rows of two blocks."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 200, dtype=dtype)
        self.down = torch.nn.Linear(200, 65, bias=False, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


def built(layout: str, format_: Format, mesh: DeviceMesh, seed: int) -> tuple[Model, Any]:
    """Return a model in a layout, and its optimizer."""
    model = Model(format_.dtype, seed)
    if layout.startswith("fsdp"):
        fully_shard(model, mesh=mesh)
    elif layout == "tp":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh, plan, src_data_rank=None)
    return model, format_.cls(model.parameters(), lr=0.01, **format_.options)


def save(layout: str, name: str, mesh: DeviceMesh, folder: Path) -> None:
    """Train, write a distributed checkpoint, and write the whole tensors beside it."""
    model, optimizer = built(layout, FORMATS[name], mesh, seed=0)
    train(model, optimizer, STEPS)
    # State dicts come nested or flattened, under keys that the user chooses. Every second format
    # has the flattened form.
    is_flat = list(FORMATS).index(name) % 2 == 1
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    state = get_state_dict(model, optimizer, options=options)
    keys = ("app", "optim") if is_flat else ("model", "optimizer")
    checkpoint.save(dict(zip(keys, state)), checkpoint_id=folder / f"{layout}-{name}")
    tensors = {key: whole({"p": p, **optimizer.state[p]}) for key, p in model.named_parameters()}
    if mesh.get_rank() == 0:
        torch.save(tensors, folder / f"{layout}-{name}.pt")


def load(layout: str, target: str, folder: Path, source: str, mesh: DeviceMesh) -> Any:
    """Return a model and its optimizer after loading, torch.optim's by torch's own functions."""
    model, optimizer = built(layout, FORMATS[target], mesh, seed=1)
    if target != "torch":
        load_distributed(model, optimizer, folder / source)
        return model, optimizer
    is_flat = list(FORMATS).index(source.split("-", 1)[1]) % 2 == 1
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    own = dict(
        zip(
            ("app", "optim") if is_flat else ("model", "optimizer"),
            get_state_dict(model, optimizer, options=options),
        )
    )
    checkpoint.load(own, checkpoint_id=folder / source)
    set_optimizer_state_dict(
        model, optimizer, own["optim" if is_flat else "optimizer"], options=options
    )
    return model, optimizer


def part_of_whole(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a whole tensor, sharded like a parameter."""
    if not isinstance(p, DTensor):
        return x
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None).to_local()


def local_part(x: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def differences(
    name: str, p: torch.Tensor, state: dict[str, Any], saved: dict[str, Any], same: bool
) -> Iterator[str]:
    """Yield the differences between a loaded parameter, with its state, and the saved one.

    Args:
        name: the name of the parameter.
        p: the loaded parameter.
        state: its state.
        saved: the whole parameter that was saved, as ``p``, and its state.
        same: True if all bits must be equal.
    """
    found = {key: local_part(x) for key, x in state.items()}
    expected = {key: part_of_whole(x, p) if x.dim() else x for key, x in saved.items()}
    if same:
        stored = {"p": local_part(p), **found}
        differing = {
            key
            for key in stored.keys() | expected.keys()
            if key not in stored
            or key not in expected
            or stored[key].dtype != expected[key].dtype
            or not torch.equal(stored[key], expected[key])
        }
        if differing:
            yield f"{name}: not the same bits: {sorted(differing)}"
    if float(found["step"]) != float(saved["step"]):
        yield f"{name}: step is {found['step']}"
    # A weight of 24 bits is rounded to 16 bits of fraction, and by as much again if the low bits
    # round up to more than 8 bits can hold: 2**-15 in all. Any other weight has all bits of the
    # saved one, except in torch.optim, which loads the model's bfloat16 without low bits.
    exact = part_of_whole(join_low_bits(saved["p"], saved), p)
    allowed = exact.abs() * (2.0**-15 if "low_bits_8" in found else 0.0)
    if type(state) is TorchState:
        exact = part_of_whole(saved["p"].float(), p)
    if ((join_low_bits(local_part(p), found) - exact).abs() > allowed).any():
        yield f"{name}: weights"
    for key in MOMENTS:
        x = part_of_whole(decode_state(saved, key), p)
        got = decode_state(found, key)
        if f"{key}_codes" in found:
            # Two codes differ by an eighth of a power of two; rounding errs by half of that. First
            # moments below the smallest code become 0: 1.0625 * 2**-15 of the scale, and the scale
            # is less than 1.07 times the largest element of the block.
            lost = 2.0**-14 * x.abs().max() if key == "exp_avg" and x.numel() else 0.0
            bound = x.abs() / 16 + lost
        elif found[key].dtype == torch.bfloat16:
            bound, x = torch.zeros_like(x), x.float().bfloat16().double()
        else:
            bound = torch.zeros_like(x)
        if got.shape != x.shape or ((got - x).abs() > bound).any():
            yield f"{name}: {key}"


@functools.cache
def saved_in(file: Path) -> dict[str, dict[str, Any]]:
    """Return the whole parameters and states of a checkpoint."""
    tensors: dict[str, dict[str, Any]] = torch.load(file, weights_only=True)
    return tensors


class TorchState(dict[str, Any]):
    """The state of a parameter in torch.optim."""


def problems(layout: str, target: str, source: str, mesh: DeviceMesh, folder: Path) -> list[str]:
    """Load a checkpoint, and return the differences from the saved tensors."""
    from_layout, from_format = source.split("-", 1)
    saved = saved_in(folder / f"{source}.pt")
    if target == "torch" and "int8" in from_format:
        try:
            load(layout, target, folder, source, mesh)
        except checkpoint.CheckpointException as error:
            message = str(error)
            return [] if "Missing key" in message and ".exp_avg" in message else [message]
        return ["torch.optim loaded codes as values"]
    model, optimizer = load(layout, target, folder, source, mesh)
    found: list[str] = []
    for name, p in model.named_parameters():
        cut_alike = name != CUT or (from_layout == "tp") == (layout == "tp")
        state = optimizer.state[p]
        found += differences(
            name,
            p,
            TorchState(state) if target == "torch" else state,
            saved[name],
            from_format == target and (cut_alike or "int8" not in target),
        )
    if optimizer.param_groups[0]["lr"] != 0.01:
        found.append(f"lr is {optimizer.param_groups[0]['lr']}")
    return found


def wait_for(files: list[Path]) -> None:
    """Wait until the files exist."""
    end = time.monotonic() + TIMEOUT_S
    while not all(file.exists() for file in files):
        if time.monotonic() > end:
            raise TimeoutError(f"{[str(x) for x in files if not x.exists()]} did not appear")
        time.sleep(0.2)


def main(rank: int, processes: int, folder: Path) -> None:
    """Save and load in one of several processes."""
    torch.set_num_threads(1)
    with process_group(folder / f"store-{processes}", rank, processes):
        mesh = init_device_mesh("cpu", (processes,))
        for layout in LAYOUTS[processes]:
            for name in FORMATS:
                save(layout, name, mesh, folder)
        torch.distributed.barrier()
        (folder / f"saved-{rank}-{processes}").touch()
        wait_for([folder / f"saved-{i}-{n}" for n in LAYOUTS for i in range(n)])
        results = {
            (layout, target): {
                f"{a}-{b}": problems(layout, target, f"{a}-{b}", mesh, folder) for a, b in ALL
            }
            for layout in LAYOUTS[processes]
            for target in FORMATS
        }
        torch.save(results, folder / f"{rank}-of-{processes}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

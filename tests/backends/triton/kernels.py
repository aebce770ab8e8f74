"""How the tests here run a kernel, and look into what is kept of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from unittest import mock

import pytest
import torch

import stepforge
from stepforge.backends import reference, triton
from stepforge.backends.triton.table import Table
from stepforge.program import Graph
from tests.backends.graphs import Row, batch_of

#: Where kernels can run. A test of both runs on one, and skips the other.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def by_kernels_only() -> Iterator[None]:
    """Fails if the Triton backend leaves something to the reference."""
    with mock.patch.object(reference, "run", side_effect=AssertionError("not by a kernel")):
        yield


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values in memory of the same layout on a device; on the CPU the tensor itself."""
    if device.type == "cpu":
        return x
    whole = x.new_empty(0).set_(x.untyped_storage()).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def by_kernel(
    graph: Graph,
    rows: Sequence[Row],
    numbers: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
    device: torch.device,
) -> list[Row]:
    """The results of each row, given its coefficients; the rows stay as they are."""
    copies = [{name: moved(_copied(x), device) for name, x in row.items()} for row in rows]
    with by_kernels_only():
        triton.run(batch_of(graph, copies, numbers, arithmetic))
    return [{name: row[name].cpu() for name in graph.results} for row in copies]


def _copied(x: torch.Tensor) -> torch.Tensor:
    """A copy of the whole memory, seen alike."""
    memory = x.new_empty(0).set_(x.untyped_storage().clone())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def tables(optimizer: stepforge.Optimizer) -> list[Table]:
    """The tables that an optimizer's plan keeps; fails if it keeps no plan."""
    assert optimizer._stepper.plan is not None
    found = []
    for launch in optimizer._stepper.plan.launches:
        assert isinstance(launch.table, triton.Tables)
        found += launch.table.tables
    return found


def uploads(optimizer: stepforge.Optimizer) -> dict[str, int]:
    """How often each part of an optimizer's tables was uploaded."""
    names = ("rows", "gradients", "coefficients", "members")
    return {name: sum(getattr(t, name).uploads for t in tables(optimizer)) for name in names}


def on_host(outcome: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in outcome.items()}

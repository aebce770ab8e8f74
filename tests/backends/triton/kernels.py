"""Helpers to run or compile a Triton kernel, and to inspect the tables of a plan."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import stepforge
from stepforge.backends import reference, triton
from stepforge.backends.triton.table import Table
from stepforge.program import Graph
from tests.backends.graphs import Columns, batch_of, in_new_process

#: The devices that can run kernels. A test of both runs on one of them and skips the other.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def by_kernels_only() -> Iterator[None]:
    """Fail if the Triton backend leaves a parameter to the reference."""
    with mock.patch.object(reference, "run", side_effect=AssertionError("not by a kernel")):
        yield


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device, in memory of the same layout; on the CPU the tensor itself."""
    if device.type == "cpu":
        return x
    whole = x.new_empty(0).set_(x.untyped_storage()).to(device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def by_kernel(
    graph: Graph,
    params: Sequence[Columns],
    coefficients: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
    device: torch.device,
) -> list[Columns]:
    """Return the results for each parameter, and leave the arguments unchanged."""
    copies = [{name: moved(_copied(x), device) for name, x in param.items()} for param in params]
    with by_kernels_only():
        triton.run(batch_of(graph, copies, coefficients, arithmetic))
    return [{name: param[name].cpu() for name in graph.results} for param in copies]


def _copied(x: torch.Tensor) -> torch.Tensor:
    """Return the same view of a copy of the whole memory."""
    memory = x.new_empty(0).set_(x.untyped_storage().clone())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def compiled_in_new_process(function: Callable[[], None], folder: Path, *, timeout_s: float) -> Any:
    """Return what a function prints in JSON, called where Triton compiles instead of interpreting.

    Args:
        function: a function of a test module.
        folder: for what is compiled.
        timeout_s: the time that it may take.
    """
    printed = in_new_process(
        function,
        timeout_s=timeout_s,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(folder),
        STEPFORGE_CACHE=str(folder / "kernels"),
    )
    return json.loads(printed)


def tables(optimizer: stepforge.Optimizer) -> list[Table]:
    """Return the tables of an optimizer's plan; fail if it has no plan."""
    assert optimizer._stepper.plans.latest is not None
    found = []
    for launch in optimizer._stepper.plans.latest.launches:
        assert isinstance(launch.table, triton.Tables)
        found += launch.table.tables
    return found


def uploads(optimizer: stepforge.Optimizer) -> dict[str, int]:
    """Return how often each part of an optimizer's tables was uploaded."""
    names = ("rows", "gradients", "coefficients", "members")
    return {name: sum(getattr(t, name).uploads for t in tables(optimizer)) for name in names}


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in tensors.items()}

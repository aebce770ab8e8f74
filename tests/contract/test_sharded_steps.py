"""A step of DTensors stores what a step of whole tensors does, by every backend.

Oracle: the same parameters whole, in one process, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepforge
from tests.contract.sharded_step_ranks import CASES, Case, placed, stepped
from tests.process_groups import run_ranks
from tests.twins import assert_identical

# What modules of torch say of themselves when they are used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    with tempfile.NamedTemporaryFile() as file:
        store = torch.distributed.FileStore(file.name, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What two processes have found in each case."""
    module = "tests.contract.sharded_step_ranks"
    folder = run_ranks(module, (2,), lambda: tmp_path_factory.mktemp("steps"))
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return stepped(Case(None, None, {}), None)


@pytest.mark.parametrize("name", CASES)
def test_one_process_steps_sharded_parameters_as_whole_ones(
    name: str, mesh: DeviceMesh, expected: dict[str, torch.Tensor]
) -> None:
    assert_identical(values_of(stepped(CASES[name], mesh), expected), list(expected.values()))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_sharded_parameters_as_whole_ones(
    name: str, of_two: Any, expected: dict[str, torch.Tensor]
) -> None:
    assert_identical(values_of(of_two[name], expected), list(expected.values()))


def values_of(found: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors, in that order."""
    assert set(found) == set(like)
    return [found[key] for key in like]


def sharded(mesh: DeviceMesh) -> torch.nn.Parameter:
    return torch.nn.Parameter(placed(torch.ones(4, 6), Shard(0), mesh))


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=["default", "fused"])
def test_the_native_kernel_serves_sharded_parameters(
    flags: dict[str, Any], mesh: DeviceMesh
) -> None:
    optimizer = stepforge.AdamW([sharded(mesh)], **flags)
    assert [served.backend for served in stepforge.explain(optimizer).served] == ["native"]


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_step_between_forward_and_backward_is_noticed_of_sharded_parameters(
    flags: dict[str, Any], mesh: DeviceMesh
) -> None:
    p = sharded(mesh)
    p.grad = placed(torch.ones(4, 6), Shard(0), mesh)
    optimizer = stepforge.AdamW([p], **flags)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_on_another_mesh_is_refused_and_changes_nothing(mesh: DeviceMesh) -> None:
    p, q = sharded(mesh), torch.nn.Parameter(torch.ones(4, 6))
    q.grad = torch.ones(4, 6)
    other = init_device_mesh("cpu", (1, 1))
    p.grad = distribute_tensor(torch.ones(4, 6), other, [Replicate(), Replicate()])
    optimizer = stepforge.AdamW([q, p])
    with pytest.raises(RuntimeError, match="both must be on one mesh, or neither"):
        optimizer.step()
    assert torch.equal(q, torch.ones(4, 6))


def test_a_gradient_of_terms_is_summed_once(mesh: DeviceMesh) -> None:
    """And stays as it was for its owner."""
    p = sharded(mesh)
    p.grad = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False)
    stepforge.AdamW([p]).step()
    assert isinstance(p.grad, DTensor)
    assert p.grad.placements == (Partial(),)

"""A step of DTensors gives the results of a step of whole tensors, in every backend.

Oracle: the same parameters as whole tensors in one process, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepforge
from tests.contract.sharded_step_ranks import CASES, Case, placed, stepped
from tests.process_groups import run_ranks
from tests.twins import assert_identical

# Modules of torch warn that they are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Run two processes; return the results of each case."""
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
    assert_identical(in_order_of(expected, stepped(CASES[name], mesh)), list(expected.values()))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_sharded_parameters_as_whole_ones(
    name: str, by_two: Any, expected: dict[str, torch.Tensor]
) -> None:
    assert_identical(in_order_of(expected, by_two[name]), list(expected.values()))


def in_order_of(
    expected: dict[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the results in the order of the expected ones."""
    assert set(results) == set(expected)
    return [results[key] for key in expected]


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


def test_a_partial_gradient_is_summed_once(mesh: DeviceMesh) -> None:
    """It stays ``Partial`` for the user."""
    p = sharded(mesh)
    p.grad = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False)
    stepforge.AdamW([p]).step()
    assert isinstance(p.grad, DTensor)
    assert p.grad.placements == (Partial(),)

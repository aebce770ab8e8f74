"""A step of DTensors gives the results of a step of whole tensors, in every backend.

Oracle: the same parameters as whole tensors in one process, bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepforge
from tests.contract.sharded_mutations import MUTATIONS, sharded
from tests.contract.sharded_step_ranks import CASES, CLIPPED, MEASURED, STEPS, Case, placed, stepped
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


@functools.cache
def whole(option: str) -> dict[str, torch.Tensor]:
    """Return the results of whole parameters, which do not depend on other options."""
    options = next((x for x in (CLIPPED, MEASURED) if option in x), {})
    return stepped(Case(None, None, options), None)


@pytest.mark.parametrize("name", CASES)
def test_one_process_steps_sharded_parameters_as_whole_ones(name: str, mesh: DeviceMesh) -> None:
    expected = whole(next(iter(CASES[name].options), ""))
    assert_identical(in_order_of(expected, stepped(CASES[name], mesh)), list(expected.values()))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_sharded_parameters_as_whole_ones(name: str, by_two: Any) -> None:
    expected = whole(next(iter(CASES[name].options), ""))
    assert_identical(in_order_of(expected, by_two[name]), list(expected.values()))


def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_of_all(by_two: Any) -> None:
    results = by_two["rows, clipped"]
    assert results["skipped"] == 1
    assert results["0.step"] == STEPS - 1
    assert results["clip_factor"] < 1


def in_order_of(
    expected: dict[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the results in the order of the expected ones."""
    assert set(results) == set(expected)
    return [results[key] for key in expected]


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


# Kept plans.


@pytest.mark.parametrize(
    "mutate",
    MUTATIONS,
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
@pytest.mark.parametrize("guards", ["python", "cpp"])
def test_a_kept_plan_of_dtensors_is_as_good_as_a_new_one(
    guards: str, backend: str, mutate: Any, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an optimizer that builds a new plan for every step; errors too."""
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    monkeypatch.setenv("STEPFORGE_GUARDS", guards)

    def history(*, forgets: bool) -> list[Any]:
        p = sharded(mesh)
        optimizer = stepforge.AdamW([p], lr=0.1)
        seen: list[Any] = []
        for step in range(6):
            if step == 3:
                with torch.no_grad():
                    mutate(optimizer, mesh)
            p.grad = placed(torch.full((4, 6), float(step + 1)), Shard(0), mesh)
            if forgets:
                optimizer._stepper.plans.clear()
            try:
                optimizer.step()
            except RuntimeError as error:
                seen.append(str(error).partition("at 0x")[0])
            state = optimizer.state[p]
            seen += [p._local_tensor.clone(), *(x.clone() for x in state.values())]
        return seen

    for got, wanted in zip(history(forgets=False), history(forgets=True), strict=True):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(
                getattr(got, "_local_tensor", got), getattr(wanted, "_local_tensor", wanted)
            )
        else:
            assert got == wanted


def test_a_plan_of_dtensors_is_kept(mesh: DeviceMesh) -> None:
    p = sharded(mesh)
    optimizer = stepforge.AdamW([p])
    plans = []
    for step in range(3):
        p.grad = placed(torch.full((4, 6), float(step + 1)), Shard(0), mesh)
        optimizer.step()
        plans.append(optimizer._stepper.plans.latest)
    assert plans[0] is not None
    assert plans[1] is plans[0]
    assert plans[2] is plans[0]


def test_a_step_count_may_be_a_dtensor(mesh: DeviceMesh) -> None:
    """Oracle: an optimizer whose step count is a plain tensor."""
    counts = [torch.tensor(7.0), distribute_tensor(torch.tensor(7.0), mesh, [Replicate()])]
    params = []
    for count in counts:
        p = sharded(mesh)
        optimizer = stepforge.AdamW([p], lr=0.1)
        for step in range(5):
            if step == 2:
                optimizer.state[p]["step"] = count
            p.grad = placed(torch.full((4, 6), float(step + 1)), Shard(0), mesh)
            optimizer.step()
        assert float(optimizer.state[p]["step"]) == 10.0
        params.append(p._local_tensor)
    assert torch.equal(*params)

"""Tensors that are alike, and what one of them stands for.

Oracle: each parameter by itself, in an optimizer of its own, and tensors compared pair by pair.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import stepforge
from stepforge.rules import ALL
from stepforge.state.alike import differences, grouped, layout_differences
from stepforge.state.layout import state_layout
from stepforge.state.values import completed, initial_states

every_optimizer = pytest.mark.parametrize("cls", ALL.values())


class Logged(torch.Tensor):
    """A subclass of Tensor, which may have no memory of its own."""


def _inference(*shape: int) -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(shape)


#: Objects of which none is like another.
UNLIKE: dict[str, Callable[[], Any]] = {
    "plain": lambda: torch.ones(2, 3),
    "dtype": lambda: torch.ones(2, 3, dtype=torch.float64),
    "shape": lambda: torch.ones(3, 2),
    "dimensions": lambda: torch.ones(2, 3, 1),
    "strides": lambda: torch.ones(3, 2).t(),
    "expanded": lambda: torch.ones(3).expand(2, 3),
    "device": lambda: torch.ones(2, 3, device="meta"),
    "inference": lambda: _inference(2, 3),
    "layout": lambda: torch.ones(2, 3).to_sparse(),
    "subclass": lambda: torch.ones(2, 3).as_subclass(Logged),
    "number": lambda: 1.0,
    "nothing": lambda: None,
}


@pytest.mark.parametrize("pair", list(itertools.combinations(UNLIKE, 2)), ids="-".join)
def test_one_difference_tells_objects_apart(pair: tuple[str, str]) -> None:
    first, second = (UNLIKE[name] for name in pair)
    objects = [first(), first(), second(), first(), second()]
    found = grouped(range(5), layout_differences(objects))
    expected: list[list[int]] = []
    for name, places in zip(pair, ([0, 1, 3], [2, 4])):
        # Tensors without plain memory are like themselves only.
        alone = name in ("layout", "subclass")
        expected += [[place] for place in places] if alone else [places]
    assert list(map(list, found)) == sorted(expected)


def test_a_parameter_is_like_a_tensor() -> None:
    tensors = [torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.zeros(2)]
    assert list(layout_differences(tensors)) == []
    assert grouped(tensors, []) == [tensors]
    assert grouped([], []) == []


def test_differences_number_what_is_read() -> None:
    (column,) = differences(len, ["a", "bc", "d", "ef", "ghi"])
    assert column[0] == column[2]
    assert column[1] == column[3]
    assert len(set(column)) == 3


#: Parameters of several dtypes, shapes and strides, some alike, large enough for int8 states.
def _params() -> list[torch.nn.Parameter]:
    made = [
        torch.randn(64, 80),
        torch.randn(64, 80, dtype=torch.bfloat16),
        torch.randn(80, 64).t(),
        torch.randn(3),
        torch.randn(2, dtype=torch.complex64),
        torch.randn(64, 160)[:, ::2],
        torch.randn(()),
        torch.empty(0, 4),
    ]
    return [torch.nn.Parameter(x.detach().clone(), True) for x in made * 2] + [
        torch.nn.Parameter(x, True) for x in made
    ]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_format": "float32"},
    {"state_format": "bfloat16"},
    {"state_format": "int8"},
    {"master_weight_bits": 24, "state_format": "int8"},
    {"master_weight_bits": 32},
    {"capturable": True},
]


@every_optimizer
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_made_together_are_those_made_alone(cls: Any, options: dict[str, Any]) -> None:
    if "master_weight_bits" in options:
        params = [p for p in _params() if not p.is_complex()]
    else:
        params = _params()
    group = cls(params, **options).param_groups[0]
    together = initial_states(cls.rule, params, group)
    for p, state in zip(params, together, strict=True):
        (alone,) = completed(state_layout(cls.rule, group, p), [p], group, [{}])
        assert list(state) == list(alone)
        for key, x in state.items():
            assert (x.dtype, x.shape, x.device) == (alone[key].dtype, alone[key].shape, p.device)
            assert x.stride() == alone[key].stride()
            assert torch.equal(x, alone[key])


@every_optimizer
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_state_has_memory_of_its_own(cls: Any, options: dict[str, Any]) -> None:
    """So that it is freed, pickled and moved alone, as torch.optim's is."""
    params = [p for p in _params() if not p.is_complex()]
    optimizer = cls(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    layouts = [state_layout(cls.rule, optimizer.param_groups[0], p) for p in params]
    states = [optimizer.state[p][x.key] for p, lay in zip(params, layouts) for x in lay.tensors]
    storages = [x.untyped_storage() for x in states if x.numel()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for x in states:
        assert x.untyped_storage().nbytes() == x.numel() * x.itemsize
        assert x._base is None


Spoil = Callable[[torch.nn.Parameter, dict[str, Any]], None]


def _state(key: str, make: Callable[[torch.Tensor], Any]) -> Spoil:
    return lambda p, state: state.update({key: make(state[key])})


def _expand(p: torch.nn.Parameter, _: dict[str, Any]) -> None:
    p.data = torch.ones(1).expand(3)


def _sparse_gradient(p: torch.nn.Parameter, _: dict[str, Any]) -> None:
    p.grad = torch.ones(3).to_sparse()


#: Faults of a single parameter that a step finds.
FAULTS: dict[str, Spoil] = {
    "parameter without own elements": _expand,
    "sparse gradient": _sparse_gradient,
    "state of another shape": _state("exp_avg", lambda x: torch.zeros(4)),
    "state of integers": _state("exp_avg", lambda x: x.long()),
    "complex state": _state("exp_avg", lambda x: x.to(torch.complex64)),
    "sparse state": _state("exp_avg", lambda x: x.to_sparse()),
    "state that is a number": _state("exp_avg", lambda x: 0.5),
    "state on another device": _state("exp_avg", lambda x: x.to("meta")),
    "inference state": _state("exp_avg_sq", lambda x: _inference(3)),
    "expanded state": _state("exp_avg_sq", lambda x: torch.zeros(1).expand(3)),
    "step count of two": _state("step", lambda x: torch.ones(2)),
    "step count that is a number": _state("step", lambda x: 1),
    "complex step count": _state("step", lambda x: x.to(torch.complex64)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", range(5))
def test_a_fault_among_parameters_that_are_alike_is_found(fault: str, place: int) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones(3)
    together = stepforge.Adam(params)
    together.step()
    bad = params[place]
    FAULTS[fault](bad, together.state[bad])
    alone = stepforge.Adam([bad])
    alone.state[bad] = together.state[bad]
    with pytest.raises((RuntimeError, TypeError)) as expected:
        alone.step()
    good = [p for p in params if p is not bad]
    before = copy.deepcopy([(p.detach(), together.state[p]) for p in good])
    keys = list(together.state)
    with pytest.raises(type(expected.value)) as found:
        together.step()
    assert str(found.value) == str(expected.value)
    assert list(together.state) == keys
    for p, (weight, state) in zip(good, before, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(together.state[p][key], x) for key, x in state.items())


@pytest.mark.parametrize("place", range(5))
def test_a_fault_of_a_first_step_leaves_no_state(place: int) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones(3)
    params[place].grad = torch.ones(3).to_sparse()
    optimizer = stepforge.Adam(params)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert not optimizer.state
    assert all(p.tolist() == [1.0] * 3 for p in params)


@every_optimizer
def test_parameters_of_many_kinds_step_as_each_alone(cls: Any) -> None:
    torch.manual_seed(0)
    params = _params()
    twins = copy.deepcopy(params)
    together, alone = cls(params), [cls([p]) for p in twins]
    for step in range(3):
        for p, twin in zip(params, twins):
            p.grad = torch.randn_like(p) if step != 1 or p.numel() != 3 else None
            twin.grad = None if p.grad is None else p.grad.clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
    for p, twin, optimizer in zip(params, twins, alone):
        assert torch.equal(p, twin)
        assert list(together.state[p]) == list(optimizer.state[twin])
        for key, x in together.state[p].items():
            assert torch.equal(x, optimizer.state[twin][key]), key


def test_step_counts_of_one_element_become_elements() -> None:
    """A checkpoint of another program may have counts of shape (1,)."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = stepforge.Adam(params)
    optimizer.step()
    optimizer.state[params[1]]["step"] = torch.tensor([4.0])
    optimizer.step()
    assert [optimizer.state[p]["step"].shape for p in params] == [torch.Size([])] * 3
    assert [float(optimizer.state[p]["step"]) for p in params] == [2.0, 5.0, 2.0]


# DTensors.


def _on(mesh: DeviceMesh, placement: Any, x: torch.Tensor) -> torch.Tensor:
    return DTensor.from_local(x, mesh, [placement] * mesh.ndim, run_check=False)


#: DTensors of which none is like another.
UNLIKE_SHARDED: dict[str, Callable[[DeviceMesh], torch.Tensor]] = {
    "plain": lambda mesh: torch.ones(2, 3),
    "sharded": lambda mesh: _on(mesh, Shard(0), torch.ones(2, 3)),
    "dimension": lambda mesh: _on(mesh, Shard(1), torch.ones(2, 3)),
    "replicated": lambda mesh: _on(mesh, Replicate(), torch.ones(2, 3)),
    "partial": lambda mesh: _on(mesh, Partial(), torch.ones(2, 3)),
    "mesh": lambda mesh: _on(_other_mesh(), Shard(0), torch.ones(2, 3)),
    "shape": lambda mesh: _on(mesh, Shard(0), torch.ones(3, 2)),
    "dtype": lambda mesh: _on(mesh, Shard(0), torch.ones(2, 3, dtype=torch.float64)),
}


@functools.cache
def _other_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1, 1))


@pytest.fixture
def fresh_mesh(mesh: DeviceMesh) -> Iterator[DeviceMesh]:
    """Return the mesh; the other one ends with its process group."""
    yield mesh
    _other_mesh.cache_clear()


@pytest.mark.parametrize("pair", list(itertools.combinations(UNLIKE_SHARDED, 2)), ids="-".join)
def test_one_difference_tells_sharded_tensors_apart(
    pair: tuple[str, str], fresh_mesh: DeviceMesh
) -> None:
    first, second = (UNLIKE_SHARDED[name] for name in pair)
    objects = [make(fresh_mesh) for make in (first, first, second, first, second)]
    found = grouped(range(5), layout_differences(objects))
    assert list(map(list, found)) == [[0, 1, 3], [2, 4]]


def test_local_parts_tell_sharded_tensors_apart(mesh: DeviceMesh) -> None:
    tensors = [_on(mesh, Shard(0), torch.ones(4, 3)) for _ in range(3)]
    assert isinstance(tensors[1], DTensor)
    tensors[1]._local_tensor = torch.ones(2, 3)
    found = grouped(range(3), layout_differences(tensors))
    assert list(map(list, found)) == [[0, 2], [1]]


@pytest.mark.parametrize("place", range(3))
def test_gradients_of_sharded_parameters_are_redistributed_one_by_one(
    place: int, mesh: DeviceMesh
) -> None:
    params = [torch.nn.Parameter(_on(mesh, Shard(0), torch.ones(4, 3))) for _ in range(3)]
    for index, p in enumerate(params):
        placement = Partial() if index == place else Shard(0)
        p.grad = _on(mesh, placement, torch.full((4, 3), index + 1.0))
    optimizer = stepforge.Adam(params, betas=(0.5, 0.999))
    optimizer.step()
    averages = [optimizer.state[p]["exp_avg"] for p in params]
    assert [x.placements for x in averages] == [(Shard(0),)] * 3
    assert [float(x.to_local().max()) for x in averages] == [0.5, 1.0, 1.5]
    assert len({x.to_local().untyped_storage().data_ptr() for x in averages}) == 3

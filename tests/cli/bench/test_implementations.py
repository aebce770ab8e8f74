"""Implementations and lower bounds: each does what its name says, and all take turns."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

import stepforge
from stepforge.backends.disk_cache import BuildError
from stepforge.cli import devices
from stepforge.cli.bench import lower_bounds
from stepforge.cli.bench.arrangements import Arrangement
from stepforge.cli.bench.device_settings import settings_for
from stepforge.cli.bench.implementations import (
    ACCESS,
    GPU_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    LIMIT,
    OUR_FOREACH,
    OURS,
    PLAINLY,
    TORCH,
    Implementation,
    start_if_available,
)
from stepforge.cli.bench.lower_bounds import bytes_per_element
from stepforge.cli.bench.measure import make_gradients, measure_implementations
from stepforge.cli.bench.workloads import WORKLOADS, Workload
from stepforge.cli.timing.copies import Copy
from stepforge.rules import ALL

OPTIMIZERS = [i for i in IMPLEMENTATIONS if i.bound is None]
WITHOUT_FUSED = [i.name for i in IMPLEMENTATIONS if i.name != "torch fused"]


def test_only_some_optimizers_have_a_fused_implementation_of_torch():
    assert len({i.name for i in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS)
    for name in ALL:
        existing = {i.name for i in IMPLEMENTATIONS if i.exists(name)}
        assert existing - {"torch fused"} == set(WITHOUT_FUSED)
        assert ("torch fused" in existing) == (name in ("Adagrad", "Adam", "AdamW"))


@pytest.mark.parametrize("implementation", OPTIMIZERS, ids=lambda i: i.name)
def test_an_implementation_steps_its_own_copies_on_fresh_gradients(implementation):
    """Oracle: torch.optim.Adam, stepped by hand."""
    gradients = make_gradients([(3, 2), (4,)])
    before = [gradient.clone() for gradient in gradients]
    runner = implementation.start("Adam", gradients)
    params = [gradient.clone() for gradient in gradients]
    optimizer = torch.optim.Adam(params)
    seen = set()
    for _ in range(2):
        runner.set_gradients(gradients)
        runner.step()
        seen |= {id(p.grad) for p in runner.params} | {p.grad.data_ptr() for p in runner.params}
        for p, gradient in zip(params, gradients):
            p.grad = gradient.clone()
        optimizer.step()
    for ours, p, gradient, original in zip(runner.params, params, gradients, before):
        torch.testing.assert_close(ours, p)
        assert torch.equal(gradient, original)
        assert gradient.data_ptr() not in seen


@pytest.mark.parametrize("implementation", [TORCH, OURS], ids=lambda i: i.name)
def test_groups_hold_all_parameters_with_rates_of_their_own(implementation):
    runner = implementation.start("RAdam", make_gradients(5 * [(2,)]), Arrangement(groups=3))
    groups = runner.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 2, 1]
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, runner.params))
    assert len({group["lr"] for group in groups}) == 3


def test_only_arranged_workloads_have_a_plain_step_beside_them():
    settings = settings_for(devices.CPU)
    arranged = {"groups", "sharded", "compiled", "fused", "captured", "clipped", "clipped-large"}
    arranged |= {"metrics", "metrics-large", "metrics-tiny"}
    loops = {"torch foreach", "stepforge foreach", "stepforge reference"}
    left_out = {
        "compiled": {"torch foreach"},
        "fused": {"torch", *loops},
        "captured": {"access", *loops},
    }
    for name in ("metrics", "metrics-large", "metrics-tiny"):
        left_out[name] = {"stepforge foreach", "stepforge reference"}
    for name, workload in WORKLOADS.items():
        implementations = settings.implementations_for(workload)
        assert (PLAINLY in implementations) == (name in arranged)
        assert [i for i in implementations if i is not PLAINLY] == [
            i for i in IMPLEMENTATIONS if i.name not in left_out.get(name, ())
        ]
    runner = PLAINLY.start("Adam", make_gradients(3 * [(2,)]), Arrangement(groups=3))
    assert len(runner.optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ALL)
def test_foreach_is_what_runs_without_a_compiler(name, monkeypatch):
    """Oracle: the backend that STEPFORGE_BACKEND=foreach chooses."""
    make = getattr(stepforge, name)
    p = torch.zeros(1, requires_grad=True)
    ours = stepforge.explain(make([p], **OUR_FOREACH.flags))
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    forced = stepforge.explain(make([p]))
    assert ours.served[0].backend == forced.served[0].backend == "foreach"


def first_step_of(workload: Workload) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return the parameter, its gradient and its state, after what is measured first of Adam's."""
    started = []

    class Noted(Implementation):
        def start(self, *arguments):
            started.append(super().start(*arguments))
            return started[0]

    ours = Noted(OURS.name, "", stepforge)
    settings = replace(settings_for(devices.CPU), implementations=[ours])
    measure_implementations("Adam", workload, settings, rounds=1)
    (runner,) = started
    (p,) = runner.params
    return p, p.grad, runner.optimizer.state[p]


@pytest.mark.parametrize("name", ["bfloat16", "zeros", "denormals"])
def test_dtype_and_gradients_are_those_of_the_workload(name):
    """Oracle: the smallest normal float32."""
    workload = replace(WORKLOADS[name], shapes=((50, 4),))
    p, gradient, state = first_step_of(workload)
    second = state["exp_avg_sq"]
    assert p.dtype == gradient.dtype == second.dtype == workload.dtype
    assert 0.005 < p.float().std() < 0.02
    if name == "zeros":
        assert not gradient.any()
        assert not torch.signbit(gradient).any()
        assert not second.any()
    elif name == "denormals":
        assert 0.5e-20 < gradient.std() < 2e-20
        assert 0 < second.max() < torch.finfo(torch.float32).tiny
    else:
        assert 0.005 < gradient.float().std() < 0.02


def test_gradients_are_the_same_on_each_device():
    (here,), (there,) = (make_gradients([(4, 2)], device) for device in ("cpu", "meta"))
    assert there.device.type == "meta"
    assert (there.shape, there.dtype) == (here.shape, here.dtype)


# Lower bounds. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_limit_moves_what_a_step_moves(name):
    """Oracle: the bytes that the targets are stated for, and arrays of ones."""
    assert bytes_per_element(name) == (20 if name == "Adagrad" else 28)
    ones = [torch.ones(5), torch.ones(70_000), torch.ones(2, 3)]
    try:
        limit = LIMIT.start(name, ones)
    except BuildError as error:
        pytest.skip(str(error))
    limit.set_gradients(ones)
    limit.step()
    moments = 1 if name == "Adagrad" else 2
    assert len(limit.tensors) == 2 + moments
    values = {n: {float(t.min()) for t in ts} | {float(t.max()) for t in ts}
              for n, ts in limit.tensors.items()}  # fmt: skip
    assert values.pop("g") == {1.0}
    assert values.pop("p") == {2.0}
    assert list(values.values()) == moments * [{1.0}]  # from zero


@pytest.mark.parametrize("name", ALL)
def test_the_limit_moves_as_many_bytes_in_bfloat16(name):
    """Oracle: two bytes for each element of each tensor, and words of four."""
    gradients = [torch.ones(8, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)]
    try:
        limit = LIMIT.start(name, gradients)
    except BuildError as error:
        pytest.skip(str(error))
    limit.set_gradients(gradients)
    limit.step()
    assert {t.dtype for ts in limit.tensors.values() for t in ts} == {torch.float32}
    assert [[t.nbytes for t in ts] for ts in limit.tensors.values()] == len(limit.tensors) * [
        [16, 8]
    ]
    assert limit.starts.tolist() == [0, 4, 6]
    assert {float(t.max()) for t in limit.tensors["p"]} == {2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_the_limit_copies_half_of_what_a_step_moves(name, dtype):
    """A copy reads each byte and writes it. Oracle: the bytes that the targets are stated for."""
    gradients = [torch.ones(shape, dtype=dtype) for shape in [(5,), (2, 3), ()]]
    limit = GPU_IMPLEMENTATIONS[0].start(name, gradients)
    assert isinstance(limit, Copy)
    assert 2 * limit.source.nbytes == 12 * bytes_per_element(name, dtype)
    assert bytes_per_element(name, dtype) * 4 == dtype.itemsize * bytes_per_element(name)
    limit.source.random_()
    limit.set_gradients(gradients)
    limit.step()
    assert torch.equal(limit.target, limit.source)
    assert limit.target.data_ptr() != limit.source.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_access_touches_what_a_step_writes_and_changes_nothing(name):
    """Oracle: autograd's version counters, and arrays of ones."""
    ones = [torch.ones(5), torch.ones(2, 3)]
    access = ACCESS.start(name, ones)
    access.set_gradients(ones)
    before = [x._version for x in access.written]
    access.step()
    assert len(access.written) == 2 * (2 if name == "Adagrad" else 3)
    assert [x._version for x in access.written] == [version + 1 for version in before]
    assert all(torch.equal(p, one) for p, one in zip(access.params, ones))


# Missing implementations. -------------------------------------------------------------------------


def test_the_limit_is_left_out_without_a_compiler(monkeypatch):
    def no_kernel(*_):
        raise BuildError("no C compiler is on the PATH")

    monkeypatch.setattr(lower_bounds, "Kernel", no_kernel)
    one = Workload("one", ((2,),))
    times = measure_implementations("NAdam", one, settings_for(devices.CPU), rounds=1)
    assert list(times) == [name for name in WITHOUT_FUSED if name != LIMIT.name]


def test_gpu_implementations_have_the_names_of_those_on_a_cpu():
    """Only the reference is missing, as its launches would take too long."""
    names = [i.name for i in IMPLEMENTATIONS]
    assert [i.name for i in GPU_IMPLEMENTATIONS] == [n for n in names if n != "stepforge reference"]


class Lacking(torch.optim.Adam):
    """Raises only at its first step that the device has no such kernel, as torch does."""

    def step(self, closure=None):
        raise NotImplementedError("Could not run 'aten::_fused_adam_'")


def test_a_kernel_that_the_device_lacks_is_left_out():
    library = types.SimpleNamespace(Adam=Lacking)
    fused = replace(GPU_IMPLEMENTATIONS[4], library=library)
    assert fused.name == "torch fused"
    gradients = make_gradients([(2,)])
    assert start_if_available(fused, "Adam", gradients) is None
    one = Workload("one", ((2,),))
    settings = replace(settings_for(devices.CPU), implementations=[fused, OURS])
    times = measure_implementations("Adam", one, settings, rounds=1)
    assert list(times) == [OURS.name]
    settings = replace(settings, implementations=[Implementation("x", "", library)])
    with pytest.raises(NotImplementedError):  # for any other implementation it is an error
        measure_implementations("Adam", one, settings, rounds=1)

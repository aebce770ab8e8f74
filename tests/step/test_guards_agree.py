"""Guards in C++ give the answers of the guards in Python.

Oracle: the guards in Python, recorded at the same moment: the same reason in the same words, or the
same tensors.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import stepforge
from stepforge import extension
from stepforge.backends.aliasing import addresses
from stepforge.step.guards import Guards, PythonGuards, Source, Watched, in_cpp
from stepforge.step.launch import StepTensors
from stepforge.step.params import params_with_gradient
from stepforge.step.plan import Plan
from tests.contract.sharded_mutations import MUTATIONS as SHARDED_MUTATIONS
from tests.contract.sharded_mutations import built as built_sharded
from tests.step.mutations import (
    MUTATIONS,
    built,
    first_state,
    flag_changed,
    parameters_tied,
    params_of,
    replace_state_tensor,
    set_gradients,
)

# Modules of torch warn that they are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _with_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")


def stepped() -> stepforge.Optimizer:
    """Return an optimizer after a step, with gradients."""
    optimizer = built(stepforge.AdamW, "native")
    set_gradients(optimizer, 0)
    optimizer.step()
    return optimizer


def both_kinds(optimizer: stepforge.Optimizer) -> tuple[Guards, Guards]:
    """Return guards in Python and in C++ of the optimizer as it is."""
    stepper = optimizer._stepper
    assert stepper.plans.latest is not None
    watched = watched_by(optimizer)
    python = PythonGuards.record(watched, stepper.groups, stepper.state)
    cpp = in_cpp(watched, stepper.groups, stepper.state)
    assert cpp is not None
    return python, cpp


def watched_by(optimizer: stepforge.Optimizer) -> Watched:
    """Return what the kept plan of an optimizer depends on, by a new plan of the same step."""
    stepper = optimizer._stepper
    params = stepper.checked(params_with_gradient(stepper.groups, stepper.state))
    _, launches = Plan.build(stepper.rule, params, stepper.groups)
    members = [p for group in stepper.groups for p in group["params"]]
    return Watched.by(stepper.rule, launches, members, stepper.state)


def assert_same_answer(
    optimizer: stepforge.Optimizer, kinds: tuple[Guards, Guards], source: Source | None = None
) -> str | None:
    """Compare both answers; return the reason, or None if the plan is fresh."""
    groups = optimizer.param_groups
    source = optimizer.state if source is None else source
    wanted, got = (guards.find(groups, source) for guards in kinds)
    if isinstance(wanted, str) or isinstance(got, str):
        assert got == wanted
        return wanted
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert_same_tensors(one, other)
    return None


def assert_same_tensors(got: StepTensors, wanted: StepTensors) -> None:
    for column in ("params", "gradients", "states", "sharded"):
        ones, others = getattr(got, column), getattr(wanted, column)
        assert len(ones) == len(others)
        assert all(one is other for one, other in zip(ones, others)), column
    out = np.zeros(len(wanted.gradients), np.uint64)
    got.write_addresses(out)
    assert out.tolist() == addresses(wanted.gradients).tolist()


@pytest.mark.parametrize("backend", ["native", "foreach"])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", [stepforge.AdamW, stepforge.NAdam])
def test_a_change_between_two_steps_gets_the_same_answer(
    cls: type[stepforge.Optimizer], mutate: Callable[[stepforge.Optimizer], None], backend: str
) -> None:
    optimizer = built(cls, backend)
    for seed in range(2):
        set_gradients(optimizer, seed)
        optimizer.step()
    kinds = both_kinds(optimizer)
    assert assert_same_answer(optimizer, kinds) is None
    set_gradients(optimizer, 3)
    assert assert_same_answer(optimizer, kinds) is None
    mutate(optimizer)
    for p in params_of(optimizer):  # gradients of before may not fit the parameters any more
        p.grad = torch.ones_like(p)
    assert_same_answer(optimizer, kinds)


#: The mutations after which the same launches may run on.
HARMLESS = {
    "write_state",
    "states_of_two_parameters_swapped",
    "state_copied_to_another_dict",
    "options_changed",
    "group_replaced",
    "lr_becomes_a_tensor",
    "lr_tensor_filled",
    "state_entry_deleted_and_added_again",
    "hook_that_changes_everything",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_a_change_of_memory_is_seen(mutate: Callable[[stepforge.Optimizer], None]) -> None:
    optimizer = stepped()
    kinds = both_kinds(optimizer)
    mutate(optimizer)
    reason = assert_same_answer(optimizer, kinds)
    if mutate.__name__ not in HARMLESS:
        assert reason is not None


def without_first_gradient(optimizer: stepforge.Optimizer) -> None:
    params_of(optimizer)[0].grad = None


def gradient_transposed(optimizer: stepforge.Optimizer) -> None:
    g = params_of(optimizer)[1].grad
    assert g is not None
    params_of(optimizer)[1].grad = g.t().contiguous().t()


def gradient_of_a_graph(optimizer: stepforge.Optimizer) -> None:
    g = params_of(optimizer)[1].grad
    assert g is not None
    params_of(optimizer)[1].grad = g.requires_grad_() * 1


def gradient_of_a_subclass(optimizer: stepforge.Optimizer) -> None:
    class Subclass(torch.Tensor):
        pass

    g = params_of(optimizer)[1].grad
    assert g is not None
    params_of(optimizer)[1].grad = g.as_subclass(Subclass)


def state_is_a_number(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = 2.0


def state_is_missing(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    del state[name]


def state_is_no_dict(optimizer: stepforge.Optimizer) -> None:
    optimizer.state[params_of(optimizer)[0]] = 3  # type: ignore[assignment]


def state_on_the_meta_device(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = state[name].to("meta")


def state_is_sparse(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = state[name].to_sparse()


def state_is_negated(optimizer: stepforge.Optimizer) -> None:
    state, name = first_state(optimizer)
    state[name] = torch._neg_view(state[name])


def decay_turned_on(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[1]["weight_decay"] = 0


def decay_an_equal_number(optimizer: stepforge.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = group["weight_decay"] * 3


def decay_a_tensor(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.0)


def two_changes(optimizer: stepforge.Optimizer) -> None:
    gradient_transposed(optimizer)
    replace_state_tensor(optimizer)


def three_changes(optimizer: stepforge.Optimizer) -> None:
    two_changes(optimizer)
    state = optimizer.state[params_of(optimizer)[-1]]
    del state["step"]


def state_added_after_the_others(optimizer: stepforge.Optimizer) -> None:
    """Add a state as that of a parameter that had no gradient before."""
    optimizer.state["aside"] = {"step": torch.tensor(1.0)}  # type: ignore[index]


def state_added_before_the_others(optimizer: stepforge.Optimizer) -> None:
    known = dict(optimizer.state)
    optimizer.state.clear()
    state_added_after_the_others(optimizer)
    optimizer.state.update(known)


def last_state_deleted(optimizer: stepforge.Optimizer) -> None:
    del optimizer.state[params_of(optimizer)[-1]]


def members_and_flags(optimizer: stepforge.Optimizer) -> None:
    flag_changed(optimizer)
    without_first_gradient(optimizer)


@pytest.mark.parametrize(
    "change",
    [
        without_first_gradient,
        gradient_transposed,
        gradient_of_a_graph,
        gradient_of_a_subclass,
        state_is_a_number,
        state_is_missing,
        state_is_no_dict,
        state_on_the_meta_device,
        state_is_sparse,
        state_is_negated,
        decay_turned_on,
        decay_an_equal_number,
        decay_a_tensor,
        two_changes,
        three_changes,
        state_added_after_the_others,
        state_added_before_the_others,
        last_state_deleted,
        members_and_flags,
    ],
    ids=lambda f: f.__name__,
)
def test_an_unusual_change_gets_the_same_answer(
    change: Callable[[stepforge.Optimizer], None],
) -> None:
    optimizer = stepped()
    kinds = both_kinds(optimizer)
    change(optimizer)
    reason = assert_same_answer(optimizer, kinds)
    harmless = (decay_an_equal_number, decay_a_tensor, state_added_after_the_others)
    assert (reason is None) == (change in harmless)


@pytest.mark.parametrize("name", ["STEPFORGE_BACKEND", "STEPFORGE_ISA"])
def test_an_environment_variable_that_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepped()
    kinds = both_kinds(optimizer)
    monkeypatch.setenv(name, "")
    assert assert_same_answer(optimizer, kinds) is not None
    monkeypatch.undo()
    monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")
    assert assert_same_answer(optimizer, kinds) is None


def test_inference_mode_changes_what_kernels_may_do() -> None:
    optimizer = stepped()
    kinds = both_kinds(optimizer)
    with torch.inference_mode():
        assert_same_answer(optimizer, kinds)


@pytest.mark.parametrize("change", [None, gradient_transposed, replace_state_tensor])
def test_tensors_that_are_given(change: Callable[[stepforge.Optimizer], None] | None) -> None:
    optimizer = stepped()
    source = given(optimizer)
    stepper = optimizer._stepper
    params = stepper.checked(source)
    _, launches = Plan.build(stepper.rule, params, stepper.groups)
    members = params_of(optimizer)
    watched = Watched.by(stepper.rule, launches, members, members, is_given=True)
    cpp = in_cpp(watched, stepper.groups, source)
    assert cpp is not None
    kinds = PythonGuards.record(watched, stepper.groups, source), cpp
    assert assert_same_answer(optimizer, kinds, source) is None
    assert assert_same_answer(optimizer, kinds, source[1:]) is not None
    if change is not None:
        change(optimizer)
        assert assert_same_answer(optimizer, kinds, given(optimizer)) is not None


def given(optimizer: stepforge.Optimizer) -> list[Any]:
    """Return the tensors of a step, as the operator of torch.compile is given them."""
    members = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return [
        (index, p, p.grad, group, optimizer.state[p]) for index, (p, group) in enumerate(members)
    ]


@pytest.mark.parametrize("mutate", SHARDED_MUTATIONS, ids=lambda f: f.__name__)
def test_a_change_of_dtensors_gets_the_same_answer(
    mutate: Callable[[stepforge.Optimizer, DeviceMesh], None], mesh: DeviceMesh
) -> None:
    optimizer = built_sharded(mesh, {})
    optimizer.step()
    kinds = both_kinds(optimizer)
    assert assert_same_answer(optimizer, kinds) is None
    mutate(optimizer, mesh)
    assert_same_answer(optimizer, kinds)


def test_memory_that_is_apart_is_known_to_be() -> None:
    optimizer = stepped()
    _, cpp = both_kinds(optimizer)
    for seed in range(5):
        set_gradients(optimizer, seed)
        found = cpp.find(optimizer.param_groups, optimizer.state)
        assert not isinstance(found, str)
        assert all(tensors.disjoint for tensors in found)


@pytest.mark.parametrize("column", ["params", "states"])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_gradient_that_touches_other_memory_is_never_called_apart(
    column: str, offset: int
) -> None:
    """Its first, its last or all of its elements are those of a parameter or state."""
    p = torch.nn.Parameter(torch.randn(102)[1:101])
    p.grad = torch.ones(100)
    optimizer = stepforge.AdamW([p])
    optimizer.step()
    second = torch.randn(102)[1:101]
    optimizer.state[p]["exp_avg"] = second
    optimizer.step()
    _, cpp = both_kinds(optimizer)
    target = p.detach() if column == "params" else second
    p.grad = target.as_strided((100,), (1,), target.storage_offset() + offset)
    found = cpp.find(optimizer.param_groups, optimizer.state)
    assert not isinstance(found, str)
    assert not found[0].disjoint


def test_tied_parameters_are_never_called_apart() -> None:
    optimizer = built(stepforge.AdamW, "native")
    parameters_tied(optimizer)
    set_gradients(optimizer, 0)
    optimizer.step()
    _, cpp = both_kinds(optimizer)
    found = cpp.find(optimizer.param_groups, optimizer.state)
    assert not isinstance(found, str)
    assert not all(tensors.disjoint for tensors in found)


def test_found_tensors_are_freed_with_the_answer() -> None:
    optimizer = stepped()
    _, cpp = both_kinds(optimizer)
    found = cpp.find(optimizer.param_groups, optimizer.state)
    assert not isinstance(found, str)
    p = params_of(optimizer)[0]
    gradient = weakref.ref(p.grad)
    p.grad = None
    gc.collect()
    assert found[0].gradients[0].shape == p.shape  # the answer keeps its tensors
    del found
    gc.collect()
    assert gradient() is None


def test_versions_count_writes_to_parameters_and_states_only() -> None:
    """Oracle: the versions before. Step counts are written, and counted, elsewhere."""
    optimizer = stepped()
    python, cpp = both_kinds(optimizer)
    for guards in (python, cpp):
        found = guards.find(optimizer.param_groups, optimizer.state)
        assert not isinstance(found, str)
        tensors = [
            (x, 0 if key == "step" else 1)
            for p in params_of(optimizer)
            for key, x in [("p", p), *optimizer.state[p].items()]
        ]
        before = [x._version for x, _ in tensors]
        for each in found:
            each.increment_versions()
        after = [x._version for x, _ in tensors]
        assert [b - a for a, b in zip(before, after)] == [count for _, count in tensors]


def test_addresses_are_written_only_where_they_fit() -> None:
    optimizer = stepped()
    _, cpp = both_kinds(optimizer)
    found = cpp.find(optimizer.param_groups, optimizer.state)
    assert not isinstance(found, str)
    out = np.zeros(len(found[0].gradients) + 1, np.uint64)
    with pytest.raises(ValueError, match="an array of"):
        found[0].write_addresses(out)
    assert not out.any()


def test_a_step_that_waits_for_the_extension_takes_it_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_extension = extension.module()
    answers: list[Any] = ["it is being built"]
    monkeypatch.setattr(extension, "module", lambda: answers[-1])
    optimizer = built(stepforge.AdamW, "native")
    for seed in range(2):
        set_gradients(optimizer, seed)
        optimizer.step()
    plan = optimizer._stepper.plans.latest
    assert plan is not None
    assert isinstance(plan.guards, PythonGuards)
    answers.append(built_extension)
    for seed in range(3):
        set_gradients(optimizer, seed)
        optimizer.step()
        assert optimizer._stepper.plans.latest is plan
        assert not isinstance(plan.guards, PythonGuards)

"""Scalars on the device: step counts, learning rates, gradient scales.

Oracles: the reference with the same options; the state before a skipped step. No tolerance on the
CPU; test_gpu.py compares compiled kernels within a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import stepforge
from stepforge.backends import triton
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.triton import kernel, table
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.state.elements import Elements
from stepforge.step import scalar_states
from stepforge.step.scalar_states import ScalarStates
from tests.backends.triton.kernels import by_kernels_only, tables
from tests.conformance.table import (
    OPTIMIZERS,
    VARIANTS,
    assert_same_bits,
    contiguous,
    forced,
    lazily_negated,
    normal,
    outcome,
    parameter,
    run,
)
from tests.twins import assert_identical, snapshot

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = [(7,), (3, 5), (), (0, 2)]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(shape, dtype, 100 * step + k) for k, shape in enumerate(SHAPES)]


def params_of(optimizer: stepforge.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def outcomes(optimizer: stepforge.Optimizer) -> list[dict[str, torch.Tensor]]:
    params = params_of(optimizer)
    return [{k: contiguous(x) for k, x in outcome(optimizer, p).items()} for p in params]


def assert_equal(one: stepforge.Optimizer, other: stepforge.Optimizer) -> None:
    for got, oracle in zip(outcomes(one), outcomes(other), strict=True):
        assert_same_bits(got, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_device_scalars_give_the_reference_s_bits(variant: str, dtype: torch.dtype) -> None:
    name, options = VARIANTS[variant]
    if dtype != torch.float32 and not variant.endswith("plain"):
        pytest.skip("the plain form represents all in this dtype")

    def train(backend: str) -> list[dict[str, torch.Tensor]]:
        params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
        lr = torch.tensor(0.01)
        groups = [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.02}]
        found = []
        with forced(backend):
            optimizer = OPTIMIZERS[name].ours(groups, capturable=True, **options)
            for step in range(6 if name == "RAdam" else 3):  # its form changes at the sixth
                if step == 2:
                    lr.mul_(3)
                run(optimizer, params, [gradients(step, dtype)])
                found += outcomes(optimizer)
            assert optimizer._stepper.plans.latest is not None
        return found

    for got, oracle in zip(train("triton"), train("reference"), strict=True):
        assert_same_bits(got, oracle)


class Trained:
    """A capturable optimizer and its twin, which makes a new plan in every step."""

    def __init__(self, name: str, **options: Any) -> None:
        self.optimizers = [self._built(name, options) for _ in range(2)]
        self.step = 0

    def _built(self, name: str, options: dict[str, Any]) -> stepforge.Optimizer:
        params = [parameter(normal(shape, torch.float32, k)) for k, shape in enumerate(SHAPES)]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        return OPTIMIZERS[name].ours(groups, lr=torch.tensor(0.01), capturable=True, **options)

    def advance(self, steps: int = 1, members: Collection[int] = range(len(SHAPES))) -> None:
        """Step those of the parameters that have the given indices."""
        for _ in range(steps):
            for optimizer in self.optimizers:
                for k, p in enumerate(params_of(optimizer)):
                    g = normal(p.shape, p.dtype, 100 * self.step + k)
                    p.grad = g if k in members else None
            with_kept_plan, with_new_plans = self.optimizers
            with_kept_plan.step()
            with_new_plans._stepper.plans.clear()
            with_new_plans.step()
            assert_identical(snapshot(with_kept_plan), snapshot(with_new_plans))
            self.step += 1


def lr_filled(optimizer: stepforge.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(0.5)


def lr_replaced(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def lr_of_one_element(optimizer: stepforge.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor([0.25])


def state_replaced(optimizer: stepforge.Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    for key in list(state):
        state[key] = state[key].clone() + 1


def steps_written(optimizer: stepforge.Optimizer) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(20.0)


def group_added(optimizer: stepforge.Optimizer) -> None:
    optimizer.add_param_group({"params": [parameter(torch.ones(6))], "lr": 0.3})


def state_loaded(optimizer: stepforge.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES: list[Callable[[stepforge.Optimizer], None]] = [
    lr_filled,
    lr_replaced,
    lr_of_one_element,
    state_replaced,
    steps_written,
    group_added,
    state_loaded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["AdamW", "NAdam"])  # without and with a scalar state
def test_no_kept_plan_is_stale(
    name: str, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    trained = Trained(name)
    trained.advance(2)
    before = {key: torch.clone(x) for key, x in outcome_of_first(trained).items()}
    for optimizer in trained.optimizers:
        change(optimizer)
    trained.advance(2)
    assert not torch.equal(before["p"], outcome_of_first(trained)["p"])


def outcome_of_first(trained: Trained) -> dict[str, torch.Tensor]:
    optimizer = trained.optimizers[0]
    return outcome(optimizer, optimizer.param_groups[0]["params"][0])


def test_a_kept_plan_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables and its vectors of scalar states stay those of the first step."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    trained = Trained("NAdam")
    trained.advance(1)
    optimizer = trained.optimizers[0]
    plan, first = optimizer._stepper.plans.latest, tables(optimizer)
    scalars = [state[key] for state in optimizer.state.values() for key in ("step", "mu_product")]
    with by_kernels_only():
        trained.advance(3)
    assert optimizer._stepper.plans.latest is plan
    assert tables(optimizer) == first
    now = [state[key] for state in optimizer.state.values() for key in ("step", "mu_product")]
    assert all(x is y for x, y in zip(now, scalars, strict=True))


# A captured graph holds the addresses of scalar states, and uploads nothing from the host.


@every_optimizer
def test_a_captured_step_uploads_nothing_and_keeps_nothing(
    name: str,
    capturing: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = Trained(name)
    trained.advance(2)
    with monkeypatch.context() as patch:
        patch.setattr(table, "uploaded", None)
        capturing(True)
        trained.advance(2)
        capturing(False)
    trained.advance(2)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"Adagrad"}))  # it has states before
def test_a_first_step_cannot_be_captured(name: str, capturing: Callable[[bool], None]) -> None:
    """Nothing changes."""
    trained = Trained(name)
    capturing(True)
    for optimizer in trained.optimizers:
        before = [p.clone() for p in params_of(optimizer)]
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"step once before the capture$"):
            optimizer.step()
        assert not optimizer.state
        assert all(map(torch.equal, params_of(optimizer), before))
    capturing(False)
    trained.advance(2)


@every_optimizer
def test_a_captured_step_writes_only_what_has_changed(
    name: str, capturing: Callable[[bool], None]
) -> None:
    """Oracle: a launch has 256 words of 32 bits, and two are the address of a gradient."""
    optimizer, *_ = Trained(name).optimizers
    for step in range(4):
        if step != 2:  # which finds those of before
            for k, p in enumerate(params_of(optimizer)):
                p.grad = normal(p.shape, p.dtype, 100 * step + k)
        with mock.patch.object(kernel, "_writer", wraps=kernel._writer) as writer:
            capturing(step >= 2)
            optimizer.step()
            capturing(False)
        assert writer.call_count == (len(tables(optimizer)) if step == 3 else 0)


@every_optimizer
def test_scalar_states_stay_where_a_captured_graph_reads_them(
    name: str, capturing: Callable[[bool], None]
) -> None:
    """In steps outside the graph: without a plan, with fewer gradients, and with all again."""
    trained = Trained(name)
    keys = ("step", "mu_product") if name == "NAdam" else ("step",)

    def addresses() -> list[int]:
        states = trained.optimizers[0].state.values()
        return [state[key].data_ptr() for state in states for key in keys]

    trained.advance(1)
    for optimizer in trained.optimizers:
        optimizer.load_state_dict(optimizer.state_dict())  # scalars are separate tensors again
    captured = addresses()
    capturing(True)
    trained.advance(1)
    capturing(False)
    trained.advance(2)
    assert addresses() == captured
    for optimizer in trained.optimizers:
        optimizer.param_groups[0]["params"][0].grad = None
        optimizer.step()
    assert addresses() == captured
    trained.advance(1)
    assert addresses() == captured


@every_optimizer
def test_sets_of_gradients_that_take_turns_leave_captured_scalar_states_where_they_are(
    name: str, capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of before the capture serve on; a new set runs without one, and moves nothing."""
    trained = Trained(name)
    kept = trained.optimizers[0]
    keys = ("step", "mu_product") if name == "NAdam" else ("step",)

    def plan_of(*members: int) -> Any:
        trained.advance(members=members)
        return kept._stepper.plans.latest

    one, other = plan_of(1, 2), plan_of(0, 1, 2)  # 0 comes before 1, but its element after
    third = plan_of(3)
    before = [state[key].data_ptr() for state in kept.state.values() for key in keys]
    capturing(True)
    with monkeypatch.context() as patch:  # by kernels
        patch.setattr(Elements, "read", None)
        assert plan_of(0, 1, 2) is other
    capturing(False)
    assert plan_of(1, 2) is one
    assert plan_of(3) is third
    assert plan_of(0, 1, 2) is other
    capturing(True)
    with monkeypatch.context() as patch:
        patch.setattr(table, "uploaded", None)
        patch.setattr(scalar_states, "uploaded", None)
        assert plan_of(0, 1, 3) is None  # its positions would have to be uploaded
    capturing(False)
    assert plan_of(0, 1, 3) is not None  # all of them have an element already
    assert plan_of(1, 2) is one
    assert before == [state[key].data_ptr() for state in kept.state.values() for key in keys]


# Gradient scales.


def scaled_step(
    optimizer: stepforge.Optimizer, scaled: list[torch.Tensor], scale: Any, found_inf: Any
) -> None:
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf
    run(optimizer, params_of(optimizer), [scaled])
    del optimizer.grad_scale, optimizer.found_inf


def built(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> stepforge.Optimizer:
    params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
    return OPTIMIZERS[name].ours(params, **options)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("scale", [torch.tensor(64.0), None], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor([2.0])], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
@every_optimizer
def test_a_step_that_the_device_skips_leaves_everything_untouched(
    name: str, options: dict[str, bool], found: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """At the first and at later steps. The next step is as if there had been no skipped one."""
    optimizer, twin = (built(name, lr=0.1, **options) for _ in range(2))
    zero = torch.zeros_like(found)
    for step in range(4):
        bad = [torch.full_like(g, torch.inf) for g in gradients(step)]
        before = outcomes(optimizer) if step else None
        scaled_step(optimizer, bad, scale, found)
        after = outcomes(optimizer)
        if before is not None:
            for got, oracle in zip(after, before, strict=True):
                assert_same_bits(got, oracle)
        assert {float(x["step"]) for x in after} == {step}
        factor = 1 if scale is None else 64
        scaled_step(optimizer, [g * factor for g in gradients(step)], scale, zero)
        run(twin, params_of(twin), [gradients(step)])
        assert_equal(optimizer, twin)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
@every_optimizer
def test_a_step_that_the_device_skips_counts_for_no_set_of_gradients(
    name: str, options: dict[str, bool]
) -> None:
    """Oracle: an optimizer that takes the other steps only."""
    optimizer, twin = (built(name, lr=0.1, **options) for _ in range(2))
    zero = torch.zeros(())
    for step in range(9):
        given = gradients(step)
        for each in (optimizer, twin):
            for k, p in enumerate(params_of(each)):
                p.grad = given[k] if k % 3 != step % 3 else None
        optimizer.grad_scale, optimizer.found_inf = None, zero + (step in (4, 5, 6))
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if step not in (4, 5, 6):
            twin.step()
        assert_equal(optimizer, twin)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("as_float", [False, True])
def test_unscaling_rounds_once(dtype: torch.dtype, as_float: bool) -> None:
    """Oracle: gradients multiplied before the step by the reciprocal, in the arithmetic's dtype."""
    params = [parameter(normal((50,), dtype, k)) for k in range(2)]
    twins = [torch.nn.Parameter(contiguous(p)) for p in params]
    optimizer, twin = stepforge.NAdam(params), stepforge.NAdam(twins)
    inverse = torch.tensor(3.0).double().reciprocal().to(dtype)
    for step in range(3):
        scaled = [normal((50,), p.dtype, 9 + step) for p in params]
        scaled_step(optimizer, scaled, 3.0 if as_float else torch.tensor(3.0), torch.tensor(0.0))
        run(twin, twins, [[g * inverse for g in scaled]])
    for p, q in zip(params, twins):
        assert_same_bits(outcome(optimizer, p), outcome(twin, q))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_by_the_reference_is_skipped_too(
    found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference needs the device's scale and flag as Python floats. Oracle: no scaler."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    monkeypatch.setattr(GradScale, "on_host", property(lambda self: False))
    optimizer, twin = built("Adam"), built("Adam")
    before = [contiguous(p) for p in params_of(optimizer)]
    scaled_step(
        optimizer,
        [lazily_negated(g * 64) for g in gradients(0)],
        torch.tensor(64.0),
        torch.tensor(found),
    )
    if found:
        assert all(map(torch.equal, before, (x["p"] for x in outcomes(optimizer))))
        assert {float(x["step"]) for x in outcomes(optimizer)} == {0.0}
    else:
        run(twin, params_of(twin), [gradients(0)])
        assert_equal(optimizer, twin)


def test_a_gradient_scale_is_read_for_step_counts_on_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot use a flag on the device of the parameter, so the host reads it."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    p = parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = stepforge.Adam([p])
    (bound,) = optimizer._stepper._bind_new(optimizer.param_groups, optimizer.state)
    scale = GradScale(torch.tensor(2.0), torch.tensor(0.0))
    elsewhere = ScalarStates({"step": [torch.zeros(1, device="meta")]})
    with mock.patch.object(triton, "run") as run_backend:
        bound.run(scale)
        replace(bound, scalars=elsewhere).run(scale)
    scales = [call.args[2] for call in run_backend.call_args_list]
    assert scales[0] is scale
    assert scales[1] == GradScale(2.0, 0.0)


# Compilation of a step.


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_runs_the_kernels(
    capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same optimizer without compilation."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    torch._dynamo.reset()
    optimizer, plain = (built("NAdam", capturable=capturable) for _ in range(2))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        for p, g in zip(params_of(optimizer), gradients(seed), strict=True):
            p.grad = g
        with by_kernels_only():
            step()
        run(plain, params_of(plain), [gradients(seed)])
        assert_equal(optimizer, plain)
    torch._dynamo.reset()

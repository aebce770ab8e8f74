"""Numbers that only the device knows: step counts, learning rates, what a gradient scaler says.

Oracles: the reference with the same options; what was there before a step that is skipped. No
tolerance, on the CPU; where kernels are compiled test_gpu.py compares within a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import stepforge
from stepforge.backends import triton
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.triton import table
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.step.uniform import ScalarStates
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
from tests.triton.kernels import by_kernels_only, tables
from tests.twins import assert_identical, snapshot

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = [(7,), (3, 5), (), (0, 2)]
STEPS = 8  # RAdam's form changes at its sixth


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(shape, dtype, 100 * step + k) for k, shape in enumerate(SHAPES)]


def each_outcome(optimizer: stepforge.Optimizer) -> list[dict[str, torch.Tensor]]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{k: contiguous(x) for k, x in outcome(optimizer, p).items()} for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_of_the_device_give_the_reference_s_bits(variant: str, dtype: torch.dtype) -> None:
    name, options = VARIANTS[variant]
    if dtype != torch.float32 and not variant.endswith("plain"):
        pytest.skip("the plain form stands for all in this dtype")

    def train(backend: str) -> list[dict[str, torch.Tensor]]:
        params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
        lr = torch.tensor(0.01)
        groups = [{"params": params[:2], "lr": lr}, {"params": params[2:], "lr": 0.02}]
        found = []
        with forced(backend):
            optimizer = OPTIMIZERS[name].ours(groups, capturable=True, **options)
            for step in range(STEPS):
                if step == 4:
                    lr.mul_(3)
                run(optimizer, params, [gradients(step, dtype)])
                found += each_outcome(optimizer)
            assert optimizer._stepper.plan is not None
        return found

    for got, oracle in zip(train("triton"), train("reference"), strict=True):
        assert_same_bits(got, oracle)


class Trained:
    """A capturable optimizer and its twin, which makes its plan anew in every step."""

    def __init__(self, name: str, **options: Any) -> None:
        self.optimizers = [self._built(name, options) for _ in range(2)]
        self.step = 0

    def _built(self, name: str, options: dict[str, Any]) -> stepforge.Optimizer:
        params = [parameter(normal(shape, torch.float32, k)) for k, shape in enumerate(SHAPES)]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        return OPTIMIZERS[name].ours(groups, lr=torch.tensor(0.01), capturable=True, **options)

    def advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            for optimizer in self.optimizers:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for k, p in enumerate(params):
                    p.grad = normal(p.shape, p.dtype, 100 * self.step + k)
            kept, anew = self.optimizers
            kept.step()
            anew._stepper.plan = None
            anew.step()
            assert_identical(snapshot(kept), snapshot(anew))
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
@every_optimizer
def test_no_kept_plan_is_stale(
    name: str, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    trained = Trained(name)
    trained.advance(2)
    before = {key: torch.clone(x) for key, x in outcome_of_first(trained).items()}
    for optimizer in trained.optimizers:
        change(optimizer)
    trained.advance(3)
    assert not torch.equal(before["p"], outcome_of_first(trained)["p"])


def outcome_of_first(trained: Trained) -> dict[str, torch.Tensor]:
    optimizer = trained.optimizers[0]
    return outcome(optimizer, optimizer.param_groups[0]["params"][0])


def test_a_kept_plan_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables and its vectors of numbers are those of the first step."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    trained = Trained("NAdam")
    trained.advance(1)
    optimizer = trained.optimizers[0]
    plan, first = optimizer._stepper.plan, tables(optimizer)
    numbers = [state[key] for state in optimizer.state.values() for key in ("step", "mu_product")]
    with by_kernels_only():
        trained.advance(3)
    assert optimizer._stepper.plan is plan
    assert tables(optimizer) == first
    now = [state[key] for state in optimizer.state.values() for key in ("step", "mu_product")]
    assert all(x is y for x, y in zip(now, numbers, strict=True))


# A graph that is captured keeps the addresses of numbers, and sends nothing from the host.


@pytest.mark.parametrize("steps_before", [0, 2])
@every_optimizer
def test_a_captured_step_sends_nothing_and_keeps_nothing(
    name: str,
    steps_before: int,
    capturing: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = Trained(name)
    trained.advance(steps_before)
    with monkeypatch.context() as patch:
        patch.setattr(table, "_uploaded", None)
        capturing(True)
        trained.advance(2)
        capturing(False)
    trained.advance(2)


@every_optimizer
def test_numbers_stay_where_a_captured_graph_knows_them(
    name: str, capturing: Callable[[bool], None]
) -> None:
    """Whatever is stepped without it: without a plan, with other gradients, and all again."""
    trained = Trained(name)
    keys = ("step", "mu_product") if name == "NAdam" else ("step",)

    def addresses() -> list[int]:
        states = trained.optimizers[0].state.values()
        return [state[key].data_ptr() for state in states for key in keys]

    trained.advance(1)
    for optimizer in trained.optimizers:
        optimizer.load_state_dict(optimizer.state_dict())  # numbers are apart again
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


# What a gradient scaler says.


def scaled_step(
    optimizer: stepforge.Optimizer, given: list[torch.Tensor], scale: Any, found_inf: Any
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.grad_scale, optimizer.found_inf = scale, found_inf
    run(optimizer, params, [given])
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
    """After none and after some steps; the step after it is the one that it would have been."""
    optimizer, twin = (built(name, lr=0.1, **options) for _ in range(2))
    nothing = torch.zeros_like(found)
    for step in range(4):
        bad = [torch.full_like(g, torch.inf) for g in gradients(step)]
        before = each_outcome(optimizer) if step else None
        scaled_step(optimizer, bad, scale, found)
        after = each_outcome(optimizer)
        if before is not None:
            for got, oracle in zip(after, before, strict=True):
                assert_same_bits(got, oracle)
        assert {float(x["step"]) for x in after} == {step}
        factor = 1 if scale is None else 64
        scaled_step(optimizer, [g * factor for g in gradients(step)], scale, nothing)
        params = [p for group in twin.param_groups for p in group["params"]]
        run(twin, params, [gradients(step)])
        for got, oracle in zip(each_outcome(optimizer), each_outcome(twin), strict=True):
            assert_same_bits(got, oracle)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("as_number", [False, True])
def test_a_scale_is_divided_by_in_one_rounding(dtype: torch.dtype, as_number: bool) -> None:
    """Oracle: the product with the reciprocal in the arithmetic, computed beforehand."""
    params = [parameter(normal((50,), dtype, k)) for k in range(2)]
    twins = [torch.nn.Parameter(contiguous(p)) for p in params]
    optimizer, twin = stepforge.NAdam(params), stepforge.NAdam(twins)
    inverse = torch.tensor(3.0).double().reciprocal().to(dtype)
    for step in range(3):
        given = [normal((50,), p.dtype, 9 + step) for p in params]
        scaled_step(optimizer, given, 3.0 if as_number else torch.tensor(3.0), torch.tensor(0.0))
        run(twin, twins, [[g * inverse for g in given]])
    for p, q in zip(params, twins):
        assert_same_bits(outcome(optimizer, p), outcome(twin, q))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_what_has_to_go_in_order_is_skipped_too(
    found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference steps it, which must be told what the device knows. Oracle: no scaler."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    monkeypatch.setattr(GradScale, "on_host", property(lambda self: False))
    optimizer, twin = built("Adam"), built("Adam")
    before = [x["p"] for x in each_outcome_of_params(optimizer)]
    scaled_step(
        optimizer,
        [lazily_negated(g * 64) for g in gradients(0)],
        torch.tensor(64.0),
        torch.tensor(found),
    )
    if found:
        assert all(map(torch.equal, before, (x["p"] for x in each_outcome(optimizer))))
        assert {float(x["step"]) for x in each_outcome(optimizer)} == {0.0}
    else:
        run(twin, twin.param_groups[0]["params"], [gradients(0)])
        for got, oracle in zip(each_outcome(optimizer), each_outcome(twin), strict=True):
            assert_same_bits(got, oracle)


def each_outcome_of_params(optimizer: stepforge.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [{"p": contiguous(p)} for p in optimizer.param_groups[0]["params"]]


def test_step_counts_of_the_host_are_not_told_by_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A count on another device than its parameter cannot take what that one finds: it is read."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    p = parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = stepforge.Adam([p])
    (bound,) = optimizer._stepper._bind_new()
    scale = GradScale(torch.tensor(2.0), torch.tensor(0.0))
    elsewhere = ScalarStates({"step": [torch.zeros(1, device="meta")]})
    with mock.patch.object(triton, "run") as run_backend:
        bound.run(scale)
        replace(bound, scalars=elsewhere).run(scale)
    given = [call.args[2] for call in run_backend.call_args_list]
    assert given[0] is scale
    assert given[1] == GradScale(2.0, 0.0)


# Beside a step: compilation.


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_runs_the_kernels(
    capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same optimizer stepped plainly."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    torch._dynamo.reset()
    optimizer, plain = (built("NAdam", capturable=capturable) for _ in range(2))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for number in range(3):
        params = optimizer.param_groups[0]["params"]
        for p, g in zip(params, gradients(number), strict=True):
            p.grad = g
        with by_kernels_only():
            step()
        run(plain, plain.param_groups[0]["params"], [gradients(number)])
        for got, oracle in zip(each_outcome(optimizer), each_outcome(plain), strict=True):
            assert_same_bits(got, oracle)
    torch._dynamo.reset()

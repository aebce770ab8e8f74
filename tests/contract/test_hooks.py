"""Step hooks, closures, profiler records and ``zero_grad``.

Oracle: torch's documentation of hooks. Where it says nothing: the torch.optim twin, which runs
through the same tests.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import stepforge
from tests.twins import (
    LR,
    OPTIMIZERS,
    assert_identical,
    assert_params_close,
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    run,
    snapshot,
    tolerance,
    twin_of,
)

either_library = pytest.mark.parametrize(
    "make",
    [*OPTIMIZERS, *map(twin_of, OPTIMIZERS)],
    ids=lambda make: f"{make.__module__.partition('.')[0]}-{make.__name__}",
)


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Return a list to which global hooks append during a test."""
    record: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: record.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: record.append("global post")),
    ]
    yield record
    for handle in handles:
        handle.remove()


def _record_local(optimizer: torch.optim.Optimizer, record: list[str]) -> list[Any]:
    return [
        optimizer.register_step_pre_hook(lambda *_: record.append("local pre")),
        optimizer.register_step_post_hook(lambda *_: record.append("local post")),
    ]


@either_library
def test_hooks_run_around_the_step_in_order_and_once(make: type, calls: list[str]) -> None:
    params = make_params()
    optimizer = make(params, lr=LR)
    _record_local(optimizer, calls)
    give_gradients(params, 0)
    optimizer.step(lambda: calls.append("step"))
    assert calls == ["global pre", "local pre", "step", "local post", "global post"]


@either_library
def test_pre_hooks_see_the_parameters_before_and_post_hooks_after(make: type) -> None:
    params = make_params()
    optimizer = make(params, lr=LR)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(params[2].item()))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(params[2].item()))
    start = params[2].item()
    run(optimizer, params, range(1))
    assert seen == [start, params[2].item()]
    assert seen[0] != seen[1]


@either_library
def test_hooks_get_the_optimizer_and_its_arguments(make: type) -> None:
    optimizer = make(make_params())
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda *given: seen.append(given))
    optimizer.register_step_post_hook(lambda *given: seen.append(given))
    optimizer.step(closure=None)
    for opt, args, kwargs in seen:
        assert opt is optimizer
        assert args == (optimizer,)
        assert kwargs == {"closure": None}
    assert len(seen) == 2


@either_library
def test_a_pre_hook_may_change_the_arguments(make: type) -> None:
    optimizer = make(make_params())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: 3.0}))
    assert optimizer.step() == 3.0


@either_library
def test_a_pre_hook_that_returns_something_else_is_refused(make: type) -> None:
    params = make_params()
    optimizer = make(params)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: 3)
    give_gradients(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@either_library
def test_removed_hooks_run_no_more(make: type, calls: list[str]) -> None:
    optimizer = make(make_params())
    for handle in _record_local(optimizer, calls):
        handle.remove()
    optimizer.step()
    assert calls == ["global pre", "global post"]


@either_library
def test_hooks_belong_to_one_optimizer(make: type) -> None:
    first, second = make(make_params()), make(make_params())
    record: list[str] = []
    _record_local(first, record)
    second.step()
    assert record == []
    first.step()
    assert record == ["local pre", "local post"]


# torch.optim itself fires hooks twice in a subclass, so it is no oracle for these tests.


def _subclass(cls: type) -> type:
    class Recording(cls):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            return ("from the subclass", result)

    return Recording


@pytest.mark.parametrize("parent_first", [True, False], ids=["after its parent", "alone"])
@each_optimizer
def test_a_subclass_that_calls_super_fires_hooks_once(
    cls: type, parent_first: bool, calls: list[str]
) -> None:
    parent = type(cls.__name__, (cls,), {})
    if parent_first:
        parent(make_params()).step()
    calls.clear()
    params = make_params()
    optimizer = _subclass(parent)(params, lr=LR)
    _record_local(optimizer, calls)
    give_gradients(params, 0)
    expected = ["global pre", "local pre", "step", "local post", "global post"]
    assert optimizer.step(lambda: calls.append("step")) == ("from the subclass", None)
    assert calls == expected
    optimizer.step(lambda: calls.append("step"))
    assert calls == expected * 2


@each_optimizer
def test_a_subclass_of_a_subclass_fires_hooks_once(cls: type, calls: list[str]) -> None:
    inner = _subclass(cls)
    inner(make_params()).step()
    optimizer = _subclass(inner)(make_params())
    calls.clear()
    assert optimizer.step() == ("from the subclass", ("from the subclass", None))
    assert calls == ["global pre", "global post"]


@each_optimizer
def test_the_parent_of_a_subclass_still_fires_hooks(cls: type, calls: list[str]) -> None:
    _subclass(cls)(make_params()).step()
    calls.clear()
    cls(make_params()).step()
    assert calls == ["global pre", "global post"]


@each_optimizer
def test_hooks_fire_again_after_a_step_that_raised(cls: type, calls: list[str]) -> None:
    def failing() -> float:
        raise ArithmeticError("diverged")

    optimizer = _subclass(cls)(make_params())
    with pytest.raises(ArithmeticError, match="diverged"):
        optimizer.step(failing)
    assert calls == ["global pre"]
    optimizer.step()
    assert calls == ["global pre", "global pre", "global post"]


def test_hooks_fire_again_after_an_interrupt_at_any_line_before_them(calls: list[str]) -> None:
    """Oracle: the hooks of the next step. Ctrl-C is an exception between two lines."""
    optimizer = stepforge.AdamW(make_params())
    wrapper = type(optimizer).step.__code__  # type: ignore[attr-defined]
    interrupted: list[int] = []

    def interrupt(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not calls and frame.f_lineno not in interrupted:
            interrupted.append(frame.f_lineno)
            raise KeyboardInterrupt
        return interrupt if frame.f_code is wrapper else None

    tracing = sys.gettrace()
    while not calls:
        sys.settrace(interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            optimizer.step()
        sys.settrace(tracing)
        after, _ = calls.copy(), calls.clear()
        optimizer.step()
        assert calls == ["global pre", "global post"], f"interrupted at line {interrupted[-1]}"
        calls[:] = after
    assert len(interrupted) > 3


@each_optimizer
def test_a_step_within_another_optimizers_closure_fires_its_hooks(
    cls: type, calls: list[str]
) -> None:
    outer, inner = cls(make_params()), cls(make_params())
    outer.step(inner.step)
    assert calls == ["global pre", "global pre", "global post", "global post"]


# Profiler


@either_library
def test_the_profiler_records_step_and_zero_grad(make: type) -> None:
    params = make_params()
    optimizer = make(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, params, range(2))
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    name = make.__name__
    assert counts[f"Optimizer.step#{name}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{name}.zero_grad"] == 1


@each_optimizer
def test_the_profiler_records_a_subclass_once_by_its_own_name(cls: type) -> None:
    cls(make_params()).step()
    optimizer = _subclass(cls)(make_params())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    recorded = {event.key for event in profile.key_averages() if "Optimizer." in event.key}
    assert recorded == {
        "Optimizer.step#Recording.step",
        "Optimizer.zero_grad#Recording.zero_grad",
    }


# Closures


@pytest.mark.parametrize("grad_enabled", [True, False])
@either_library
def test_a_closure_is_called_once_with_gradients_on_before_they_are_read(
    make: type, grad_enabled: bool
) -> None:
    params, direct = make_params(), make_params()
    optimizer, plain = make(params, lr=LR), make(direct, lr=LR)
    modes: list[bool] = []

    def closure() -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    with torch.set_grad_enabled(grad_enabled):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() is grad_enabled
    assert modes == [True]
    assert loss.item() == sum((p**2).sum() for p in direct).item()
    for p in direct:
        p.grad = 2 * p.detach()
    plain.step()
    assert_identical([p.detach() for p in params], [p.detach() for p in direct])


@either_library
def test_the_closure_may_be_given_by_keyword(make: type) -> None:
    assert make(make_params()).step(closure=lambda: 1.5) == 1.5


@each_optimizer
def test_a_closure_that_raises_changes_nothing(cls: type) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)

    def failing() -> float:
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        optimizer.step(failing)
    assert_unchanged(optimizer, before)


# Steps without gradients, and zero_grad


@pytest.mark.parametrize("steps", [0, 2])
@either_library
def test_a_step_without_gradients_does_nothing(make: type, steps: int) -> None:
    params = make_params()
    optimizer = make(params, weight_decay=0.5)
    run(optimizer, params, range(steps))
    optimizer.zero_grad()
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert_unchanged(optimizer, before)


@either_library
def test_gradients_are_not_written(make: type) -> None:
    params = make_params()
    optimizer = make(params, weight_decay=0.5, maximize=True)
    give_gradients(params, 0)
    gradients = [p.grad for p in params]
    before = snapshot(optimizer)["grads"]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
    assert_identical(snapshot(optimizer)["grads"], before)


@pytest.mark.parametrize("foreach", [True, False])
@either_library
def test_zero_grad(make: type, foreach: bool) -> None:
    params = make_params()
    optimizer = make(params, lr=LR, foreach=foreach)
    give_gradients(params, 0)
    gradients = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    for p, g in zip(params, gradients, strict=True):
        assert p.grad is g
        assert g.count_nonzero() == 0
    give_gradients(params, 0)
    optimizer.zero_grad()
    assert [p.grad for p in params] == [None] * len(params)


@each_optimizer
def test_a_step_on_zeroed_gradients_is_the_twins(cls: type) -> None:
    params, twins = make_params(), make_params()
    for optimizer, owned in ((cls(params, lr=LR), params), (twin_of(cls)(twins, lr=LR), twins)):
        run(optimizer, owned, range(3))
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    assert_params_close(params, twins, **tolerance(torch.float32, 4))


@each_optimizer
def test_the_step_returns_what_the_closure_returns_untouched(cls: type) -> None:
    result = object()
    assert cls(make_params()).step(lambda: result) is result


def test_the_base_class_is_not_for_use() -> None:
    with pytest.raises(TypeError, match="Optimizer has no rule"):
        stepforge.Optimizer(make_params())

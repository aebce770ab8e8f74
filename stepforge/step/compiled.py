"""The step under ``torch.compile``: outside of the graph, or as one operator in it.

A compiler that traced the step would take its numbers for constants, and could not see into its
kernels. So it gains nothing from a step in its graph, and takes milliseconds to pass hundreds of
tensors. The plain step runs outside of the graph, unless there must be one graph
(``fullgraph=True``, ``torch.export``). Then the compiler sees the operator ``stepforge::step``,
which names the tensors that it reads and writes, and steps them when it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from stepforge.state.sharding import is_plain
from stepforge.step.params import ParamStep, enter_new_states, params_with_gradient
from stepforge.step.stepper import Stepper
from stepforge.step.traced import TracedParams

__all__ = ["step"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _outside_graph(function: _Function) -> _Function:
    """Mark a function that the compiler must not trace, but call."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def step(stepper: Stepper, state: dict[Any, Any], plain_step: Callable[[], None]) -> None:
    """Step an optimizer. The compiler traces this function.

    Args:
        stepper: the optimizer's stepper.
        state: the optimizer's state.
        plain_step: steps the optimizer without compilation, if it cannot be traced.
    """
    if stepper.is_traceable():
        _call_operator(stepper, cast(TracedParams, stepper.traced), state)
    else:
        step_outside(plain_step)


@_outside_graph
def step_outside(plain_step: Callable[[], None]) -> None:
    """Step without compilation."""
    plain_step()


def _call_operator(stepper: Stepper, traced: TracedParams, state: dict[Any, Any]) -> None:
    """Call the operator on every parameter that has a gradient."""
    # All gradients before any state: once the compiler has seen the keys of optimizer.state it
    # finds parameters there, and guards the identity of their gradients.
    indices = [index for index, p in enumerate(traced.params) if p.grad is not None]
    params = [traced.params[index] for index in indices]
    gradients = [p.grad for p in params]
    groups = [traced.groups[index] for index in indices]
    entries = [state[p] for p in params]
    states = [entry[key] for entry, index in zip(entries, indices) for key in traced.keys[index]]
    if params:
        torch.ops.stepforge.step(params, gradients, states, stepper.number, groups, indices)


@_outside_graph  # if the compiler has given up the step's frame, it tries the frames within
def _make_traceable(stepper: Stepper) -> bool:
    """Prepare a stepper to be traced; return False if its step runs outside of the graph.

    The states must exist when the compiler traces, and must not share memory: a compiler may not
    write to tensors that alias others.
    """
    if not _needs_one_graph():
        return False
    try:
        params = stepper.checked(params_with_gradient(stepper.groups, stepper.state))
    except (RuntimeError, TypeError, ValueError):
        return False  # the step outside of the graph raises the error
    if any(param.group["differentiable"] or not _is_visible(param) for param in params):
        return False
    enter_new_states(params, stepper.state)
    for param in params:
        for key, tensor in param.state.items():
            if isinstance(tensor, torch.Tensor) and tensor._base is not None:
                param.state[key] = tensor.clone()
    stepper.traced = TracedParams.of(stepper.rule, stepper.groups)
    _steppers[stepper.number] = stepper
    return True


Stepper.make_traceable = _make_traceable
# The compiler takes its result for a constant. It is a method, since torch 2.10 and 2.11 pass no
# objects to a function marked so.
torch.compiler.assume_constant_result(Stepper.is_traceable)  # type: ignore[no-untyped-call]


def _needs_one_graph() -> bool:
    """Return True if a compiler is tracing that may not leave its graph."""
    if torch._guards.TracingContext.try_get() is None:
        return False  # it has left the graph already, and runs what follows as it is
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        return bool(tracer.one_graph or tracer.error_on_graph_break)
    except (ImportError, AttributeError):  # private to torch: another version may not have it
        return True


def _is_visible(param: ParamStep) -> bool:
    """Return True if the compiler can see all tensors of a parameter."""
    states = [x for x in param.state.values() if isinstance(x, torch.Tensor)]
    return all(is_plain(x) and not x.is_sparse for x in (param.p, param.g, *states))


_steppers: weakref.WeakValueDictionary[int, Stepper] = weakref.WeakValueDictionary()


_library = torch.library.Library("stepforge", "DEF")  # type: ignore[no-untyped-call]
# torch.library.custom_op would wrap it in layers of Python that count versions, tensor by tensor:
# the kernels do so themselves, in less time.
_library.define(  # type: ignore[no-untyped-call]
    "step(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] states, "
    "int stepper, int[] groups, int[] indices) -> ()"
)


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
def _step(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    stepper: int,
    groups: Sequence[int],
    indices: Sequence[int],
) -> None:
    """Step parameters by their optimizer's rule.

    Args:
        params: the parameters.
        gradients: the gradient of each.
        states: the state of each, in the order of its layout's keys, one parameter's after the
            other's.
        stepper: the number of the optimizer's stepper.
        groups: the index of the param group of each.
        indices: the index of each among all parameters of the optimizer.
    """
    owner = _steppers[stepper]
    if owner.traced is None or not owner.traced.match(owner.groups):
        raise RuntimeError(
            "the parameters of a param group have changed since the step was compiled: "
            "call torch.compiler.reset()"
        )
    rest = iter(states)
    entries = [{key: next(rest) for key in owner.traced.keys[index]} for index in indices]
    of_groups = [owner.groups[index] for index in groups]
    with torch.no_grad():
        owner.step_given(list(zip(indices, params, gradients, of_groups, entries)))


@torch.library.register_fake("stepforge::step", lib=_library)  # type: ignore[untyped-decorator]
def _(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    stepper: int,
    groups: Sequence[int],
    indices: Sequence[int],
) -> None:
    """Return nothing; the schema says what is written."""
